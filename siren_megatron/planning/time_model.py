"""Seconds that a step takes on GPUs: compute, memory bandwidth, network, and the rollouts' lengths.

An estimate for choosing a layout, not a promise. `ASSUMPTIONS` are its constants; docs/slurm.md says where
they come from and compares the outcome with published figures. Standard library only.

Legend: tp, pp, cp, dp, ep as in `memory_model`; tokens = prompt and response of all responses of a step.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from statistics import NormalDist

from siren_megatron.architecture import Architecture
from siren_megatron.planning.hardware import Gpu
from siren_megatron.planning.memory_model import active_parameters, kv_cache_bytes_per_token, total_parameters
from siren_megatron.run_options import ParallelOptions

SHARES = ("matrix_efficiency", "expert_efficiency", "link_efficiency", "memory_efficiency", "overlap")
MAY_BE_ZERO = ("overlap", "decode_overhead_ms", "all_reduce_us", "length_spread", "step_overhead_s")


@dataclass(frozen=True)
class Assumptions:
    """What the estimate takes for granted.

    Args:
        matrix_efficiency: share of the peak rate that large matrix products reach.
        expert_efficiency: the same for the small products of experts.
        link_efficiency: share of link and network bandwidth that collectives reach.
        memory_efficiency: share of memory bandwidth that decoding reaches.
        overlap: share of data-parallel communication hidden behind compute.
        decode_overhead_ms: milliseconds of each decoding step beside compute: scheduler, sampling, launches.
        all_reduce_us: microseconds of one small all-reduce over a server's GPUs (two a layer).
        length_spread: standard deviation of the logarithm of response lengths (log-normal, cut at the limit).
        max_sequences: sequences that a server runs at a time.
        weight_sync_gbps: bytes a second of a weight update over one process, in 1e9 (a run of today: the
            first rank gathers the model and hands it on through shared memory).
        step_overhead_s: seconds a step outside all of this: rewards, batches, metrics.
    """

    matrix_efficiency: float = 0.6
    expert_efficiency: float = 0.2
    link_efficiency: float = 0.7
    memory_efficiency: float = 0.7
    overlap: float = 0.5
    decode_overhead_ms: float = 4.0
    all_reduce_us: float = 15.0
    length_spread: float = 0.6
    max_sequences: int = 256
    weight_sync_gbps: float = 2.0
    step_overhead_s: float = 3.0

    def lines(self) -> list[str]:
        return [f"{field.name} {getattr(self, field.name):g}" for field in fields(self)]

    def changed(self, settings: Iterable[str]) -> Assumptions:
        """These, with each `name=value` of `settings` put in.

        Raises:
            ValueError: there is no such name, or its value is out of range; the line names it.
        """
        values = {}
        for setting in settings:
            name, _, text = setting.partition("=")
            if name not in {field.name for field in fields(self)}:
                raise ValueError(
                    f"--assume {name}: unknown (known: {', '.join(f.name for f in fields(self))})"
                )
            try:
                value = type(getattr(self, name))(text)
            except ValueError:
                raise ValueError(f"--assume {setting}: {text!r} is no number") from None
            if not (0 < value < math.inf or (value == 0 and name in MAY_BE_ZERO)):
                raise ValueError(f"--assume {setting}: it has to be a positive number")
            if name in SHARES and value > 1:
                raise ValueError(f"--assume {setting}: a share is at most 1")
            values[name] = value
        return replace(self, **values)


ASSUMPTIONS = Assumptions()


@dataclass(frozen=True)
class Workload:
    """What one step does.

    Args:
        responses: responses of a step.
        prompt_length: mean tokens of a prompt.
        response_length: mean tokens of a response.
        max_response_length: tokens at which a response is cut.
        optimizer_steps: optimizer steps of a rollout step.
        logprob_passes: forward passes beside the update (the policy's log-probs; one more with a reference).
        micro_batches: micro-batches of one rank and optimizer step.
    """

    responses: int
    prompt_length: float
    response_length: float
    max_response_length: int
    optimizer_steps: int
    micro_batches: int
    logprob_passes: int = 1

    @property
    def tokens(self) -> float:
        return self.responses * (self.prompt_length + self.response_length)


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by stage; with `overlaps` the rollout of a later step is made during the passes."""

    rollout: float
    logprob: float
    train: float
    weight_sync: float
    other: float
    overlaps: bool = False

    @property
    def total(self) -> float:
        passes = self.logprob + self.train
        both = max(self.rollout, passes) if self.overlaps else self.rollout + passes
        return both + self.weight_sync + self.other


def forward_flops_per_token(architecture: Architecture, length: float) -> float:
    """Floating-point operations a token of a forward pass: matrices, head, causal attention."""
    embedding = 0 if architecture.tied else architecture.vocab * architecture.hidden
    matrices = 2.0 * (active_parameters(architecture) - embedding)
    return matrices + 2.0 * architecture.layers * architecture.queries * length


def training_pass_seconds(
    architecture: Architecture,
    parallel: ParallelOptions,
    gpu: Gpu,
    *,
    tokens: float,
    length: float,
    world_size: int,
    gpus_per_node: int,
    micro_batches: int,
    passes: float,
    assumptions: Assumptions = ASSUMPTIONS,
) -> float:
    """Seconds of forward and backward passes over `tokens` on `world_size` GPUs, bubbles included.

    Args:
        tokens: of all ranks together.
        length: mean sequence length.
        micro_batches: of one rank; the pipeline's waiting time is (pp - 1)/(micro-batches·virtual stages).
        passes: in units of a forward pass: 1 forward only, 3 with backward, 4 with full recomputation.
    """
    rate = gpu.bf16_tflops * 1e12 * _efficiency(architecture, assumptions)
    compute = passes * forward_flops_per_token(architecture, length) * tokens / (world_size * rate)
    pp, tp, cp = (
        parallel.pipeline_model_parallel_size,
        parallel.tensor_model_parallel_size,
        parallel.context_parallel_size,
    )
    # Two all-reduces (or reduce-scatter with all-gather) a layer and pass, of bfloat16 activations.
    here = tokens / (world_size / (tp * pp))
    layers = architecture.layers / pp
    local = (gpu.link_gbps if tp <= gpus_per_node else gpu.network_gbps) * 1e9 * assumptions.link_efficiency
    tensor = passes * layers * 2 * 2 * 2 * architecture.hidden * here * (tp - 1) / tp / local
    context = passes * layers * 2 * 2 * architecture.keys / tp * here * (cp - 1) / local
    experts = 0.0
    if parallel.expert_model_parallel_size > 1:
        ep = parallel.expert_model_parallel_size
        wire = (
            (gpu.link_gbps if ep <= gpus_per_node else gpu.network_gbps) * 1e9 * assumptions.link_efficiency
        )
        moved = 2 * architecture.experts_per_token * 2 * architecture.hidden * here / tp * (ep - 1) / ep
        experts = passes * layers * moved / wire
    virtual = parallel.num_virtual_stages_per_pipeline_rank
    bubble = 1 + (pp - 1) / (max(1, micro_batches) * virtual)
    return (compute + tensor + context + experts) * bubble


def _efficiency(architecture: Architecture, assumptions: Assumptions) -> float:
    return assumptions.expert_efficiency if architecture.experts else assumptions.matrix_efficiency


def optimizer_seconds(
    architecture: Architecture,
    parallel: ParallelOptions,
    gpu: Gpu,
    *,
    world_size: int,
    gpus_per_node: int,
    assumptions: Assumptions = ASSUMPTIONS,
) -> float:
    """Seconds of one optimizer step: float32 gradients out, bfloat16 parameters in, Adam's memory traffic."""
    parts = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    parts *= parallel.expert_model_parallel_size if architecture.experts else 1
    mine = total_parameters(architecture) / parts
    ranks = max(1, world_size // (parts * parallel.context_parallel_size)) * parallel.context_parallel_size
    link = gpu.link_gbps if world_size <= gpus_per_node else gpu.network_gbps
    wire = link * 1e9 * assumptions.link_efficiency
    moved = 6 * mine * (ranks - 1) / ranks / wire * (1 - assumptions.overlap)
    adam = mine / ranks * 30 / (gpu.memory_gbps * 1e9 * assumptions.memory_efficiency)
    return moved + adam


def response_lengths(count: int, mean: float, limit: int, spread: float) -> list[int]:
    """`count` lengths at even quantiles of a log-normal cut at `limit`, with mean `mean` where it can be.

    Args:
        spread: standard deviation of the lengths' logarithm; 0 = all alike.
    """
    if spread <= 0 or mean >= limit:
        return [max(1, min(limit, round(mean)))] * count
    quantiles = [NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)]

    def draw(middle: float) -> list[float]:
        return [min(limit, math.exp(middle + spread * q)) for q in quantiles]

    low, high = math.log(mean) - 4 * spread, math.log(limit) + 4 * spread
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(draw(middle)) / count < mean else (low, middle)
    return [max(1, round(length)) for length in draw(low)]


def decode_seconds(
    architecture: Architecture,
    gpu: Gpu,
    lengths: Sequence[int],
    *,
    prompt_length: float,
    server_gpus: int,
    kv_cache_tokens: float,
    assumptions: Assumptions = ASSUMPTIONS,
) -> float:
    """Seconds that one server of `server_gpus` GPUs takes for responses of these lengths.

    A decoding step reads the weights once and every running sequence's keys and values; or it is bound by
    compute. Sequences enter as others end (continuous batching), up to `max_sequences` and the cache's room.
    """
    bandwidth = gpu.memory_gbps * 1e9 * assumptions.memory_efficiency * server_gpus
    rate = gpu.bf16_tflops * 1e12 * assumptions.matrix_efficiency * server_gpus
    kv = kv_cache_bytes_per_token(architecture, bf16=True)
    total_bytes, active = 2.0 * total_parameters(architecture), active_parameters(architecture)
    fixed = assumptions.decode_overhead_ms * 1e-3
    if server_gpus > 1:
        fixed += 2 * architecture.layers * assumptions.all_reduce_us * 1e-6
    mean_context = prompt_length + sum(lengths) / len(lengths) / 2
    room = max(1, min(assumptions.max_sequences, int(kv_cache_tokens // (prompt_length + max(lengths)))))
    waiting = sorted(lengths, reverse=True)  # the longest first would be best; the last one decides anyway
    waiting = waiting[1::2] + waiting[::2][::-1]
    running: list[int] = []
    done = 0
    seconds = len(lengths) * prompt_length * 2 * active / rate
    while waiting or running:
        while waiting and len(running) < room:
            heapq.heappush(running, done + waiting.pop())
        steps = running[0] - done
        batch = len(running)
        reached = 1.0
        if architecture.experts:
            share = architecture.experts_per_token / architecture.experts
            reached = (2 * active + (total_bytes - 2 * active) * (1 - (1 - share) ** batch)) / total_bytes
        memory = (total_bytes * reached + batch * mean_context * kv) / bandwidth
        seconds += steps * (fixed + max(memory, 2.0 * active * batch / rate))
        done = running[0]
        while running and running[0] <= done:
            heapq.heappop(running)
    return seconds


def step_time(
    architecture: Architecture,
    parallel: ParallelOptions,
    gpu: Gpu,
    work: Workload,
    *,
    world_size: int,
    gpus_per_node: int,
    servers: int,
    server_gpus: int,
    kv_cache_tokens: float,
    weight_sync_s: float | None = None,
    overlaps: bool = False,
    assumptions: Assumptions = ASSUMPTIONS,
) -> StepTime:
    """Seconds of one rollout step.

    Args:
        world_size: trainer ranks.
        servers: vLLM servers of `server_gpus` GPUs each, which share the responses evenly.
        kv_cache_tokens: tokens that one server's cache holds.
        weight_sync_s: seconds of the weight update; None for a run of today, see `Assumptions`.
        overlaps: `--rollout-async-steps` is not 0; else the stages come one after the other.
    """
    length = work.prompt_length + work.response_length
    forward = training_pass_seconds(
        architecture,
        parallel,
        gpu,
        tokens=work.tokens,
        length=length,
        world_size=world_size,
        gpus_per_node=gpus_per_node,
        micro_batches=work.micro_batches * work.optimizer_steps,
        passes=work.logprob_passes,
        assumptions=assumptions,
    )
    train = training_pass_seconds(
        architecture,
        parallel,
        gpu,
        tokens=work.tokens,
        length=length,
        world_size=world_size,
        gpus_per_node=gpus_per_node,
        micro_batches=work.micro_batches,
        passes=4 if parallel.recompute_granularity == "full" else 3,
        assumptions=assumptions,
    )
    step = optimizer_seconds(
        architecture,
        parallel,
        gpu,
        world_size=world_size,
        gpus_per_node=gpus_per_node,
        assumptions=assumptions,
    )
    share = -(-work.responses // servers)
    lengths = response_lengths(
        share, work.response_length, work.max_response_length, assumptions.length_spread
    )
    rollout = decode_seconds(
        architecture,
        gpu,
        lengths,
        prompt_length=work.prompt_length,
        server_gpus=server_gpus,
        kv_cache_tokens=kv_cache_tokens,
        assumptions=assumptions,
    )
    if weight_sync_s is None:
        weight_sync_s = 2 * total_parameters(architecture) / (assumptions.weight_sync_gbps * 1e9)
    return StepTime(
        rollout=rollout,
        logprob=forward,
        train=train + work.optimizer_steps * step,
        weight_sync=weight_sync_s,
        other=assumptions.step_overhead_s,
        overlaps=overlaps,
    )
