"""Published throughput of other systems, and what the time model says of the same runs.

Every figure was read at the address given, with its conditions. What a source does not say and the
model needs stands in `guessed`. Standard library only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from siren_megatron.architecture import Architecture
from siren_megatron.planning.hardware import GIB, GPUS, Gpu
from siren_megatron.planning.known_models import KNOWN_MODELS
from siren_megatron.planning.memory_model import kv_cache_bytes_per_token, total_parameters
from siren_megatron.planning.time_model import (
    Workload,
    forward_flops_per_token,
    optimizer_seconds,
    step_time,
    training_pass_seconds,
)
from siren_megatron.run_options import ParallelOptions

NEMO_RL = (
    "https://github.com/NVIDIA-NeMo/RL/blob/06beed91bac98a2c39a19435f6bbbbe71aa45720/"
    "docs/about/performance-summary.md"
)
BRIDGE = (
    "https://github.com/NVIDIA-NeMo/Megatron-Bridge/blob/0a25f911b2ed6c6905a539504fdb8e5b40e3438b/"
    "docs/performance-summary-archive.md"
)
LLAMA3 = "https://glennklockwood.com/garden/llama-3.1"
"""Quotes the slide of table 4 of the Llama 3 paper (arXiv 2407.21783), which was not at hand itself."""


@dataclass(frozen=True)
class Published:
    """One published figure.

    Args:
        value: in `unit`.
        conditions: as the source gives them.
        guessed: what the source leaves open and the estimate needs.
        estimate: this model's value of the same quantity.
    """

    system: str
    model: str
    conditions: str
    guessed: str
    unit: str
    value: float
    source: str
    estimate: Callable[[], float]


def _parallel(tp: int = 1, pp: int = 1, **options: Any) -> ParallelOptions:
    return ParallelOptions(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        sequence_parallel=tp > 1,
        **options,
    )


def _rl_step(
    model: str,
    gpus: int,
    parallel: ParallelOptions,
    *,
    responses: int,
    batch: int,
    length: int,
    limit: int,
    server_gpus: int,
) -> float:
    """Seconds of an on-policy GRPO step on H100s that trainer and servers share in turn."""
    architecture, gpu, prompt = Architecture.of(KNOWN_MODELS[model]), GPUS["h100-80gb"], 130
    parts = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    work = Workload(
        responses=responses,
        prompt_length=prompt,
        response_length=length - prompt,
        max_response_length=limit - prompt,
        optimizer_steps=responses // batch,
        micro_batches=batch // (gpus // (parts * parallel.context_parallel_size)),
        logprob_passes=2,
    )
    cache = 0.6 * gpu.memory_gib * GIB * server_gpus - 2 * total_parameters(architecture)
    return step_time(
        architecture,
        parallel,
        gpu,
        work,
        world_size=gpus,
        gpus_per_node=8,
        servers=gpus // server_gpus,
        server_gpus=server_gpus,
        kv_cache_tokens=cache / kv_cache_bytes_per_token(architecture, bf16=True),
        weight_sync_s=2.0,
    ).total


def _pretraining(
    model: str, gpus: int, parallel: ParallelOptions, sequences: int, length: int, gpu: Gpu
) -> tuple[float, float]:
    """(tokens, model TFLOP) a second and GPU of a pre-training step."""
    architecture = Architecture.of(KNOWN_MODELS[model])
    parts = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    seconds = training_pass_seconds(
        architecture,
        parallel,
        gpu,
        tokens=sequences * length,
        length=length,
        world_size=gpus,
        gpus_per_node=8,
        micro_batches=sequences // (gpus // (parts * parallel.context_parallel_size)),
        passes=3,
    )
    seconds += optimizer_seconds(architecture, parallel, gpu, world_size=gpus, gpus_per_node=8)
    rate = sequences * length / seconds / gpus
    return rate, 3 * forward_flops_per_token(architecture, length) * rate / 1e12


H100 = GPUS["h100-80gb"]
H100_FP8 = dataclasses.replace(H100, bf16_tflops=1979)
_RL_GUESSED = "prompts of 130 tokens; two log-prob passes (policy and reference); 60% of memory for vLLM"
_VIRTUAL = "num_virtual_stages_per_pipeline_rank"

FIGURES = (
    Published(
        "NeMo-RL v0.4",
        "llama-3.1-8b",
        "GRPO on policy, 16 H100, 2,048 responses, batch 512, length 1,060 of 4,096, vLLM TP=1, PP=2, bf16",
        _RL_GUESSED,
        "seconds a step",
        97.7,
        NEMO_RL,
        lambda: _rl_step(
            "llama-3.1-8b",
            16,
            _parallel(pp=2),
            responses=2048,
            batch=512,
            length=1060,
            limit=4096,
            server_gpus=1,
        ),
    ),
    Published(
        "NeMo-RL v0.4",
        "qwen3-32b",
        "GRPO on policy, 32 H100, 2,048 responses, batch 512, length 3,206 of 4,096, "
        "vLLM TP=4, TP=4 PP=4, bf16",
        _RL_GUESSED,
        "seconds a step",
        393,
        NEMO_RL,
        lambda: _rl_step(
            "qwen3-32b",
            32,
            _parallel(4, 4),
            responses=2048,
            batch=512,
            length=3206,
            limit=4096,
            server_gpus=4,
        ),
    ),
    Published(
        "NeMo-RL v0.4",
        "qwen3-30b-a3b",
        "GRPO on policy, 32 H100, 2,048 responses, batch 512, length 3,154 of 4,096, "
        "vLLM TP=4, TP=2 EP=8, bf16",
        _RL_GUESSED,
        "seconds a step",
        225,
        NEMO_RL,
        lambda: _rl_step(
            "qwen3-30b-a3b",
            32,
            _parallel(2, expert_model_parallel_size=8, expert_tensor_parallel_size=1),
            responses=2048,
            batch=512,
            length=3154,
            limit=4096,
            server_gpus=4,
        ),
    ),
    Published(
        "NeMo-RL v0.4",
        "qwen3-235b-a22b",
        "GRPO on policy, 128 H100, 512 responses, batch 512, length 5,671 of 8,192, vLLM TP=16, "
        "TP=2 CP=2 EP=16 PP=8, bf16",
        _RL_GUESSED,
        "seconds a step",
        506,
        NEMO_RL,
        lambda: _rl_step(
            "qwen3-235b-a22b",
            128,
            _parallel(
                2,
                8,
                context_parallel_size=2,
                expert_model_parallel_size=16,
                expert_tensor_parallel_size=1,
            ),
            responses=512,
            batch=512,
            length=5671,
            limit=8192,
            server_gpus=16,
        ),
    ),
    Published(
        "Megatron Bridge 25.09",
        "llama-3.1-70b",
        "pre-training, 64 H100, 128 sequences of 8,192, TP=4 PP=8 VP=5, FP8",
        "FP8 peak rate for all matrices",
        "tokens a second and GPU",
        1619,
        BRIDGE,
        lambda: _pretraining("llama-3.1-70b", 64, _parallel(4, 8, **{_VIRTUAL: 5}), 128, 8192, H100_FP8)[0],
    ),
    Published(
        "Megatron Bridge 25.09",
        "llama-3.1-405b",
        "pre-training, 1,024 H100, 512 sequences of 8,192, TP=8 PP=8 CP=2 VP=8, FP8",
        "FP8 peak rate for all matrices",
        "tokens a second and GPU",
        302,
        BRIDGE,
        lambda: _pretraining(
            "llama-3.1-405b",
            1024,
            _parallel(8, 8, context_parallel_size=2, **{_VIRTUAL: 8}),
            512,
            8192,
            H100_FP8,
        )[0],
    ),
    Published(
        "Llama 3 (Meta)",
        "llama-3.1-405b",
        "pre-training, 8,192 H100, 16M tokens a batch, sequences of 8,192, TP=8 PP=16, bf16",
        "8 virtual pipeline stages",
        "model TFLOP a second and GPU",
        430,
        LLAMA3,
        lambda: _pretraining("llama-3.1-405b", 8192, _parallel(8, 16, **{_VIRTUAL: 8}), 2048, 8192, H100)[1],
    ),
    Published(
        "Llama 3 (Meta)",
        "llama-3.1-405b",
        "pre-training, 16,384 H100, 16M tokens a batch, sequences of 8,192, TP=8 PP=16, bf16",
        "8 virtual pipeline stages",
        "model TFLOP a second and GPU",
        400,
        LLAMA3,
        lambda: _pretraining("llama-3.1-405b", 16384, _parallel(8, 16, **{_VIRTUAL: 8}), 2048, 8192, H100)[1],
    ),
)


def speed_ratio(figure: Published) -> float:
    """Estimated speed over published speed: above 1 the estimate is too fast."""
    estimate = figure.estimate()
    return figure.value / estimate if figure.unit.startswith("seconds") else estimate / figure.value


def comparison_text() -> str:
    """All figures beside their estimates."""
    lines = []
    for figure in FIGURES:
        lines.append(
            f"{figure.system}, {figure.model}: published {figure.value:,g}, "
            f"estimated {figure.estimate():,.0f} {figure.unit}; "
            f"estimated speed / published {speed_ratio(figure):.2f}"
        )
        lines.append(f"    {figure.conditions}; guessed: {figure.guessed}")
        lines.append(f"    {figure.source}")
    return "\n".join(lines)
