"""Bytes that a run needs on each GPU, from the model's config and the layout. Standard library only.

Parameters, gradients and optimizer states are counted tensor by tensor, from the same tables that the weights
are loaded by. Activations are the tensors that the layers of `model.py` save for the backward pass.

Legend: tp, pp, cp, ep = tensor-, pipeline-, context- and expert-parallel size, dp = data-parallel size,
h = hidden size, V = vocabulary, tokens = those of a micro-batch, padding included.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from siren_megatron.architecture import Architecture
from siren_megatron.run_options import ParallelOptions

OPTIMIZER_BYTES = 8
"""Adam's two moments, float32."""
MASTER_BYTES = 4
"""The float32 copy of a bfloat16 parameter; float32 parameters are their own."""
GRADIENT_BYTES = 4
"""Gradients are summed in float32."""
FUSED_LINEAR_SHARE = 0.25
"""Logits over this share of a rank's states are not kept (`--fused-linear auto`)."""
CHUNK_MB = 64
CHUNK_ROWS = 256
"""`--entropy-chunk-mb 0`: a chunk of logits has 64 MiB, or so many rows where these are more. A product of
fewer rows with the head spends its time on reading the head's weight and its gradient."""


@dataclass(frozen=True)
class Counts:
    """Parameters that one GPU holds: those that all data-parallel ranks repeat, and experts'."""

    dense: int = 0
    expert: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.dense + other.dense, self.expert + other.expert)


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, by purpose."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    vllm: float = 0.0
    reserve: float = 0.0

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


def parameter_counts(architecture: Architecture, parallel: ParallelOptions, stage: int) -> Counts:
    """Parameters of a rank of pipeline stage `stage`, counted from 0."""
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    layers_here = architecture.layers // pp
    is_first, is_last = stage == 0, stage == pp - 1
    total = Counts()
    for key, rule in architecture.table.items():
        shapes = architecture.source_shapes(rule)
        if rule.cut == "vocab":
            if key.startswith("embedding."):
                # A tied head of another stage is a copy of the embedding.
                here = is_first or (is_last and architecture.tied)
            else:
                here = is_last and not architecture.tied
            size = architecture.padded_vocab(tp) // tp * shapes[0][1]
            total += Counts(dense=size * here)
            continue
        if not rule.per_layer:
            total += Counts(dense=sum(math.prod(shape) for shape in shapes) * is_last)
            continue
        cut = 1 if rule.cut == "replicated" else parallel.expert_tensor_size if rule.per_expert else tp
        size = sum(math.prod(shape) for shape in shapes) // cut * layers_here
        if rule.per_expert:
            total += Counts(expert=size * (architecture.experts // parallel.expert_model_parallel_size))
        else:
            total += Counts(dense=size)
    return total


def total_parameters(architecture: Architecture) -> int:
    """Parameters of the whole model, without Megatron's padding of the vocabulary."""
    return sum(math.prod(shape) for shape in architecture.hf_shapes().values())


def active_parameters(architecture: Architecture) -> int:
    """Parameters that a token passes through: of the experts only the chosen ones."""
    if not architecture.experts:
        return total_parameters(architecture)
    expert = 3 * architecture.hidden * architecture.expert_ffn * architecture.layers
    return total_parameters(architecture) - (architecture.experts - architecture.experts_per_token) * expert


def data_parallel_sizes(parallel: ParallelOptions, world_size: int) -> tuple[int, int]:
    """Ranks that share the optimizer states of a dense and of an expert's parameter."""
    same_layers = world_size // parallel.pipeline_model_parallel_size
    dense = same_layers // parallel.tensor_model_parallel_size
    expert = same_layers // (parallel.expert_model_parallel_size * parallel.expert_tensor_size)
    return dense, expert


def state_bytes(
    architecture: Architecture, parallel: ParallelOptions, *, stage: int, world_size: int, bf16: bool
) -> tuple[float, float, float]:
    """Bytes of parameters, gradients and optimizer states of a rank of pipeline stage `stage`."""
    counts = parameter_counts(architecture, parallel, stage)
    dense_ranks, expert_ranks = data_parallel_sizes(parallel, world_size)
    if not parallel.use_distributed_optimizer:
        dense_ranks = expert_ranks = 1
    number = counts.dense + counts.expert
    each = OPTIMIZER_BYTES + (MASTER_BYTES if bf16 else 0)
    optimizer = each * (counts.dense / dense_ranks + counts.expert / expert_ranks)
    return number * (2 if bf16 else 4), number * GRADIENT_BYTES, optimizer


def layer_activation_bytes(
    architecture: Architecture,
    parallel: ParallelOptions,
    *,
    bf16: bool,
    packed: bool,
    fused_norm: bool = True,
) -> float:
    """Bytes a token of this context rank that one layer keeps for its backward pass, no full recomputation.

    The norms compute in float32 and keep that copy of their input. Rotated queries and keys stand beside the
    projection's output, whose values attention reads; the gate, its activation and the product are kept.

    Args:
        packed: attention's output is put together from that of the packed sequences, and so held twice.
        fused_norm: as on CUDA; torch's formula on CPUs keeps the normalised input as well.
    """
    tp, element = parallel.tensor_model_parallel_size, 2 if bf16 else 4
    split = tp if parallel.sequence_parallel else 1
    norm = 4 if fused_norm else 8
    norms = 2 * (norm + element) * architecture.hidden / split
    queries, keys = architecture.queries / tp, architecture.keys / tp
    projected, rotated, context = queries + 2 * keys, queries + keys, queries * (2 if packed else 1)
    if parallel.recompute_granularity == "selective":
        # Attention's own output is made again; its inputs and what the next matrix reads stay.
        context = queries
    attention = element * (projected + rotated + context) + 4 * architecture.heads / tp
    if architecture.qk_norm:
        attention += norm * (queries + keys)
    if architecture.experts:
        # Rows are copied to their experts, and back: two more tensors of the hidden size a choice.
        width = architecture.experts_per_token * architecture.expert_ffn / parallel.expert_tensor_size
        rows = architecture.experts_per_token * architecture.hidden / split
        mlp = element * (4 * width + 2 * rows) + 4 * architecture.experts
    else:
        mlp = element * 4 * architecture.ffn / tp
    return norms + attention + mlp


def activation_bytes(
    architecture: Architecture,
    parallel: ParallelOptions,
    *,
    stage: int,
    tokens: int,
    micro_batches: int,
    bf16: bool,
    packed: bool,
) -> float:
    """Bytes that a rank of stage `stage` holds at the schedule's peak.

    With full recomputation a layer keeps its input only, and one unit of layers is whole again at a time.
    """
    pp, element = parallel.pipeline_model_parallel_size, 2 if bf16 else 4
    layers = architecture.layers // pp
    tokens_here = tokens / parallel.context_parallel_size
    each = layer_activation_bytes(architecture, parallel, bf16=bf16, packed=packed)
    under_way: float = min(pp - stage, micro_batches)
    if parallel.virtual_stages:
        # Interleaved 1F1B keeps a share (pp - 1)/(pp·v) more (Narayanan et al. 2021, section 2.2).
        under_way *= 1 + (pp - 1) / (pp * parallel.num_virtual_stages_per_pipeline_rank)
    if parallel.recompute_granularity == "full":
        split = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
        kept = element * architecture.hidden / split * layers / parallel.recompute_num_layers
        return tokens_here * (kept * under_way + each * min(parallel.recompute_num_layers, layers))
    return tokens_here * each * layers * under_way


def fuses_linear(option: str, logits: float, states: float) -> bool:
    """Whether a micro-batch's logits are computed twice, a chunk at a time, in place of being kept.

    A third product with the head is paid where the logits would raise the rank's memory notably, and nowhere
    else.

    Args:
        option: `--fused-linear`.
        logits: bytes of the logits of a micro-batch's response tokens on this rank.
        states: bytes of this rank's parameters, gradients and optimizer states.
    """
    return option == "on" or (option == "auto" and logits > FUSED_LINEAR_SHARE * states)


def chunk_bytes(chunk_mb: int, row_bytes: int) -> int:
    """Bytes of a chunk of logits.

    Args:
        chunk_mb: `--entropy-chunk-mb`.
        row_bytes: of the logits of one token on this rank.
    """
    return chunk_mb * 2**20 or max(CHUNK_MB * 2**20, CHUNK_ROWS * row_bytes)


def logit_bytes(
    architecture: Architecture,
    parallel: ParallelOptions,
    *,
    tokens: int,
    bf16: bool,
    states: float,
    fused_linear: str = "auto",
    chunk_mb: int = 0,
) -> float:
    """Bytes at the vocabulary's peak on a last-stage rank: the logits and a chunk, or a chunk alone.

    The logits are those of the response tokens; all tokens are taken for response tokens here.

    Args:
        fused_linear, states: as in `fuses_linear`.
        chunk_mb: `--entropy-chunk-mb`.
    """
    columns = architecture.padded_vocab(parallel.tensor_model_parallel_size)
    columns //= parallel.tensor_model_parallel_size
    row = (2 if bf16 else 4) * columns
    whole = tokens / parallel.context_parallel_size * row
    chunk = min(whole, chunk_bytes(chunk_mb, row))
    return chunk if fuses_linear(fused_linear, whole, states) else whole + chunk


def kv_cache_bytes_per_token(architecture: Architecture, *, bf16: bool) -> int:
    """Bytes of keys and values of one token in vLLM's cache, all layers, over all GPUs of the server."""
    return 2 * architecture.layers * architecture.keys * (2 if bf16 else 4)
