"""A table of models and numbers of GPUs: the fastest layout that fits, and its estimated step.

Unlike a run of today, it takes GPUs that trainer and servers share in turn, one server a group of GPUs: what
the field's systems do at this scale. Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass

from siren_megatron.architecture import Architecture, Layout
from siren_megatron.planning.hardware import GIB, Gpu
from siren_megatron.planning.known_models import KNOWN_MODELS
from siren_megatron.planning.memory_model import (
    activation_bytes,
    kv_cache_bytes_per_token,
    logit_bytes,
    state_bytes,
    total_parameters,
)
from siren_megatron.planning.plan import RESERVE_GIB, VLLM_OVERHEAD_GIB
from siren_megatron.planning.time_model import ASSUMPTIONS, Assumptions, StepTime, Workload, step_time
from siren_megatron.run_options import ParallelOptions

MODELS = ("qwen2.5-7b", "qwen2.5-14b", "qwen2.5-32b", "llama-3.1-70b", "llama-3.1-405b")
GPU_COUNTS = (8, 32, 128, 512, 1024, 4096)
PROMPT, RESPONSE, LIMIT = 256, 1500, 3072
RESPONSES, GLOBAL_BATCH, TOKENS = 1024, 256, 8192
SHARED_UTILIZATION = 0.85
"""vLLM's share of a GPU while the trainer's states are away."""


@dataclass(frozen=True)
class Row:
    """The fastest layout that fits; `responses` grows with the GPUs where there are too many for 1,024."""

    model: str
    gpus: int
    parallel: ParallelOptions
    responses: int
    server_gpus: int
    time: StepTime

    @property
    def tokens_per_second(self) -> float:
        return self.responses * (PROMPT + RESPONSE) / self.time.total


def best_layout(
    model: str, gpus: int, gpu: Gpu, *, gpus_per_node: int = 8, assumptions: Assumptions = ASSUMPTIONS
) -> Row | None:
    """The fastest layout of `model` on `gpus` GPUs, by estimate; None where none fits."""
    architecture = Architecture.of(KNOWN_MODELS[model])
    factor = max(1, gpus // 512)
    rows = [
        row
        for tp in (1, 2, 4, 8)
        for pp in (1, 2, 3, 4, 6, 7, 8, 9, 14, 18)
        for recompute in ("none", "full")
        if (
            row := _row(model, architecture, gpus, gpu, gpus_per_node, tp, pp, recompute, factor, assumptions)
        )
    ]
    return min(rows, key=lambda row: row.time.total, default=None)


def _row(
    model: str,
    architecture: Architecture,
    gpus: int,
    gpu: Gpu,
    gpus_per_node: int,
    tp: int,
    pp: int,
    recompute: str,
    factor: int,
    assumptions: Assumptions,
) -> Row | None:
    try:
        Layout(tp, pp).check(architecture)
    except ValueError:
        return None
    responses, batch = RESPONSES * factor, GLOBAL_BATCH * factor
    # 126 layers are cut into 7, 9 or 18 stages: a few GPUs of a power of two then stay idle.
    data_ranks = gpus // (tp * pp)
    used = data_ranks * tp * pp
    if not data_ranks or batch < data_ranks:
        return None
    parallel = ParallelOptions(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        sequence_parallel=tp > 1,
        recompute_granularity=recompute,
    )
    micro_batches = max(1, int(batch / data_ranks * (PROMPT + RESPONSE) / TOKENS))
    for stage in {0, pp - 1}:
        states = sum(state_bytes(architecture, parallel, stage=stage, world_size=used, bf16=True))
        needed = states + activation_bytes(
            architecture,
            parallel,
            stage=stage,
            tokens=TOKENS,
            micro_batches=micro_batches,
            bf16=True,
            packed=True,
        )
        if stage == pp - 1:
            needed += logit_bytes(architecture, parallel, tokens=TOKENS, bf16=True, states=states)
        if needed > (gpu.memory_gib - RESERVE_GIB) * GIB:
            return None
    server = _server_gpus(architecture, gpu, gpus)
    if server is None:
        return None
    server_gpus, kv_tokens = server
    work = Workload(
        responses=responses,
        prompt_length=PROMPT,
        response_length=RESPONSE,
        max_response_length=LIMIT,
        optimizer_steps=responses // batch,
        micro_batches=micro_batches,
    )
    # Every GPU receives its server's shard over the network, all at a time.
    sync = 2 * total_parameters(architecture) / server_gpus / (gpu.network_gbps * 1e9 * 0.7)
    time = step_time(
        architecture,
        parallel,
        gpu,
        work,
        world_size=used,
        gpus_per_node=gpus_per_node,
        servers=gpus // server_gpus,
        server_gpus=server_gpus,
        kv_cache_tokens=kv_tokens,
        weight_sync_s=sync,
        assumptions=assumptions,
    )
    return Row(model, gpus, parallel, responses, server_gpus, time)


def _server_gpus(architecture: Architecture, gpu: Gpu, gpus: int) -> tuple[int, float] | None:
    """GPUs of one server and the tokens its cache holds: the fewest that leave room for 64 sequences."""
    for count in (1, 2, 4, 8, 16, 32):
        if count > gpus or architecture.heads % count:
            continue
        room = (SHARED_UTILIZATION * gpu.memory_gib - VLLM_OVERHEAD_GIB) * GIB * count
        room -= 2 * total_parameters(architecture)
        tokens = room / kv_cache_bytes_per_token(architecture, bf16=True)
        if tokens >= 64 * (PROMPT + LIMIT):
            return count, tokens
    return None


def scale_text(gpu: Gpu, assumptions: Assumptions = ASSUMPTIONS) -> str:
    """The table for `MODELS` and `GPU_COUNTS`, as text."""
    head = (
        f"{'model':16}{'GPUs':>6}{'TP':>4}{'PP':>4}{'DP':>6}{'recompute':>11}{'vLLM TP':>9}{'responses':>11}"
        f"{'rollout s':>11}{'train s':>9}{'step s':>8}{'tokens/s':>11}{'a GPU':>7}"
    )
    lines = [f"{gpu.name}, 8 a node, {PROMPT} + {RESPONSE} tokens a response (limit {LIMIT})", head]
    for model in MODELS:
        for gpus in GPU_COUNTS:
            row = best_layout(model, gpus, gpu, assumptions=assumptions)
            if row is None:
                lines.append(f"{model:16}{gpus:6}  does not fit")
                continue
            p, t = row.parallel, row.time
            tp, pp = p.tensor_model_parallel_size, p.pipeline_model_parallel_size
            lines.append(
                f"{model:16}{gpus:6}{tp:4}{pp:4}{gpus // (tp * pp):6}{p.recompute_granularity:>11}"
                f"{row.server_gpus:9}{row.responses:11,}{t.rollout:11.0f}{t.logprob + t.train:9.0f}"
                f"{t.total:8.0f}{row.tokens_per_second:11,.0f}{row.tokens_per_second / gpus:7,.0f}"
            )
    return "\n".join(lines)
