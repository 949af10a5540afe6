"""Log-probs and gradients of an update in any layout: what the two kinds of layers are compared by."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from siren_megatron.config import read_hf_config
from tests.distributed.layouts import ANCHOR, GROUP_SIZE, Layout, config_of, fixed_samples

Gradients = dict[str, torch.Tensor]


class Update(NamedTuple):
    """Log-probs [N, S] before it, its gradients by Hugging Face name (rank 0), and what computed it."""

    logprobs: torch.Tensor
    gradients: Gradients
    implementations: dict[str, str]


def update(rank: int, world_size: int, jobs: list[tuple[Path, Layout]]) -> list[Update]:
    """For `run_ranks`: the first update from each checkpoint in a layout.

    Without an entropy method: its masks are step functions, which rounding may move.
    """
    from megatron.core import parallel_state

    from siren_megatron import platform
    from siren_megatron.advantages import group_advantages
    from siren_megatron.batch import make_batch

    device = platform.install()
    from siren_megatron.implementations import find_implementations
    from siren_megatron.policy import initialize_model_parallel
    from siren_megatron.trainer import Trainer

    results = []
    for checkpoint, layout in jobs:
        # A plain optimizer: the sum over the ranks' gradients is whole on every rank.
        plain = {"use_distributed_optimizer": False, "clip_grad": 0.0, "entropy_method": "none"}
        config = config_of(checkpoint, **plain, **layout.options)
        initialize_model_parallel(config)
        trainer = Trainer(config, read_hf_config(checkpoint), device)
        samples, rewards = fixed_samples()
        advantages = group_advantages(rewards, GROUP_SIZE)
        batch = make_batch(samples, rewards, advantages, multiple=trainer.length_multiple)
        batch = trainer.compute_logprobs(batch.to(device.device))
        trainer.update(batch, ANCHOR)
        with torch.no_grad():
            for parameter in (p for chunk in trainer.chunks for p in chunk.parameters()):
                parameter.copy_(parameter.main_grad)  # to be gathered and named as weights are
        found = {name: tensor.float().cpu() for name, tensor in trainer.hf_weights()}
        used = find_implementations(trainer.chunks, trainer.optimizer)
        results.append(Update(batch.old_logprobs.float().cpu(), found, used))
        parallel_state.destroy_model_parallel()
    return results


def relative_error(got: Gradients, want: Gradients) -> float:
    """|got - want| / |want| over all parameters together."""
    assert got.keys() == want.keys()
    missed = sum(float((got[name] - want[name]).double().square().sum()) for name in want)
    return (missed / sum(float(tensor.double().square().sum()) for tensor in want.values())) ** 0.5
