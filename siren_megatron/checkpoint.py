"""Megatron distributed checkpoints of a run: weights, optimizer, scheduler and the run's own state.

A checkpoint is `step_<n>`; it is written under a temporary name and renamed, then `latest` names it.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state

from siren_megatron.trainer import Trainer


def _metadata() -> dict[str, Any]:
    # The optimizer's state is gathered into the parameters' own shapes: it loads in any layout.
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "chained_optim_avoid_prefix": True,
    }


def _sharded_state(trainer: Trainer, *, is_loading: bool) -> dict[str, Any]:
    metadata = _metadata()
    model = {
        f"model{i}": chunk.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(trainer.chunks)
    }
    optimizer = trainer.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
    return {**model, "optimizer": optimizer}


def _prepare_torch_adam(optimizer: Any) -> None:
    """Let megatron-core load the state of torch's own Adam (used where TE and Apex are not installed).

    It reads `step` from a state that does not exist before the first update, and its loader for the
    reshardable format copies every tensor of the state, `step` too, from a dict that leaves `step` out.
    """
    for part, inner in _torch_adams(optimizer):
        for parameter in (p for group in inner.param_groups for p in group["params"]):
            if not inner.state[parameter]:
                zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                inner.state[parameter] = {"step": torch.zeros(()), **zeros}
        if hasattr(part, "_set_main_param_and_optimizer_states"):
            part._set_main_param_and_optimizer_states = partial(_set_states_with_step, part)


def _unshare_steps(optimizer: Any) -> None:
    """megatron-core loads ONE step tensor for all parameters, and Adam adds 1 to it for every parameter."""
    for _, inner in _torch_adams(optimizer):
        for state in inner.state.values():
            state["step"] = state["step"].clone()


def _torch_adams(optimizer: Any) -> list[tuple[Any, torch.optim.Adam]]:
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [(part, part.optimizer) for part in parts if isinstance(part.optimizer, torch.optim.Adam)]


def _set_states_with_step(optimizer: Any, parameter: torch.nn.Parameter, tensors: dict[str, Any]) -> None:
    group, index = optimizer.model_param_group_index_map[parameter]
    inner = optimizer.optimizer
    step = inner.state[inner.param_groups[group]["params"][index]]["step"]
    type(optimizer)._set_main_param_and_optimizer_states(optimizer, parameter, {"step": step, **tensors})


def save_checkpoint(directory: Path, trainer: Trainer, state: dict[str, Any]) -> Path:
    """A collective: write `<directory>/step_<n>`, whole or not at all.

    Args:
        directory: parent of the run's checkpoints.
        state: the run's own state; "step" names the checkpoint. Rank 0's counts.

    Returns:
        The checkpoint.
    """
    shared = [state]
    dist.broadcast_object_list(shared, src=0)
    final = directory / f"step_{state['step']:06d}"
    unfinished = final.with_name(final.name + ".partial")
    if dist.get_rank() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    dist.barrier()
    content = _sharded_state(trainer, is_loading=False)
    content.update(scheduler=trainer.scheduler.state_dict(), run=shared[0])
    dist_checkpointing.save(content, str(unfinished))
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(final, ignore_errors=True)
        unfinished.rename(final)
        pointer = directory / "latest.partial"
        pointer.write_text(final.name + "\n")
        pointer.rename(directory / "latest")
    dist.barrier()
    return final


def load_checkpoint(directory: Path, trainer: Trainer) -> dict[str, Any]:
    """A collective: fill model, optimizer and scheduler from the newest checkpoint; returns the run's state.

    Raises:
        ValueError: there is no checkpoint.
    """
    pointer = directory / "latest"
    if not pointer.is_file():
        raise ValueError(f"--load: {directory} holds no finished checkpoint")
    _prepare_torch_adam(trainer.optimizer)
    content = _sharded_state(trainer, is_loading=True)
    loaded = dist_checkpointing.load(content, str(directory / pointer.read_text().strip()))
    for i, chunk in enumerate(trainer.chunks):
        chunk.load_state_dict(loaded[f"model{i}"])
    trainer.optimizer.load_state_dict(loaded["optimizer"])
    _unshare_steps(trainer.optimizer)
    trainer.scheduler.load_state_dict(loaded["scheduler"])
    return loaded["run"]
