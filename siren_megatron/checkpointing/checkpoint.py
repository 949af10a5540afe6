"""Megatron distributed checkpoints of a run: weights, optimizer, scheduler, random states, the run's state.

A checkpoint is `step_<n>`; it is written under a temporary name and renamed, then `latest` names it. Loading
takes the newest one that is whole, in any layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from siren_megatron.checkpointing import files, random_states
from siren_megatron.checkpointing.writer import CheckpointWriter, SaveError
from siren_megatron.conversion.live import fill_weights, sharded_weights
from siren_megatron.conversion.pickle_check import check_pickles
from siren_megatron.trainer import Trainer
from siren_megatron.versions import versions

__all__ = ["CheckpointSaver", "LoadedRun", "SaveError", "choose_checkpoint", "load_checkpoint"]


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
    model = {f"model{i}": sharded_weights(chunk, metadata) for i, chunk in enumerate(trainer.chunks)}
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


def layout(trainer: Trainer) -> dict[str, Any]:
    """What says which rank holds what: a rank's random state means something only in the same layout."""
    parallel = trainer.config.parallel
    names = (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "num_virtual_stages_per_pipeline_rank",
        "context_parallel_size",
        "expert_model_parallel_size",
    )
    return {
        "ranks": dist.get_world_size(),
        **{name: getattr(parallel, name) for name in names},
        "expert_tensor_parallel_size": parallel.expert_tensor_size,
        "device": trainer.device.type,
    }


class CheckpointSaver:
    """Saves a run's checkpoints to `<directory>/step_<n>`. Every method is a collective.

    Args:
        directory: parent of the run's checkpoints.
        trainer: what is saved.
        asynchronous: `--async-save`.
        total_limit: `--save-total-limit`; 0 keeps all.
    """

    def __init__(
        self, directory: Path, trainer: Trainer, *, asynchronous: bool = False, total_limit: int = 0
    ):
        self._trainer = trainer
        self._writer = CheckpointWriter(directory, asynchronous=asynchronous, total_limit=total_limit)

    def save(self, state: dict[str, Any]) -> None:
        """Write a checkpoint, whole or not at all; with `asynchronous` only begin it.

        Args:
            state: the run's own state; "step" names the checkpoint. Rank 0's counts.

        Raises:
            SaveError: this checkpoint, or the one that was being written, could not be finished.
        """
        trainer = self._trainer
        shared: list[Any] = [(state, versions())]
        dist.broadcast_object_list(shared, src=0)
        state, found = shared[0]
        content = _sharded_state(trainer, is_loading=False)
        content["rng"] = random_states.sharded(random_states.random_states(trainer.device))
        content.update(scheduler=trainer.scheduler.state_dict(), run=state)
        manifest = {"step": state["step"], "versions": found, "layout": layout(trainer)}
        self._writer.write(content, manifest)

    def poll(self) -> None:
        """Give an asynchronous checkpoint its name once every rank's writer is done. Raises as `save`."""
        self._writer.poll()

    def wait(self) -> None:
        """As `poll`, and wait for the writers."""
        self._writer.wait()


@dataclass(frozen=True)
class LoadedRun:
    """What `load_checkpoint` gives back.

    Args:
        path: the checkpoint.
        state: as given to `CheckpointSaver.save`.
        random_states: of this rank, for `random_states.restore`; None where the layout has changed.
    """

    path: Path
    state: dict[str, Any]
    random_states: dict[str, torch.Tensor] | None


def load_checkpoint(directory: Path, trainer: Trainer) -> LoadedRun:
    """A collective: fill model, optimizer and scheduler from the newest checkpoint that is whole.

    Rank 0 prints a line for each one that is not, and where versions or layout have changed.

    Raises:
        ValueError: there is no checkpoint, none is whole, or it is of another model.
    """
    path, manifest = choose_checkpoint(directory)
    _prepare_torch_adam(trainer.optimizer)
    content = _sharded_state(trainer, is_loading=True)
    same_layout = manifest["layout"] == layout(trainer)
    if same_layout:
        content["rng"] = random_states.sharded(random_states.random_states(trainer.device))
    try:
        loaded = dist_checkpointing.load(content, str(path))
    except (CheckpointException, CheckpointingException) as error:
        # torch wraps the traceback of every rank; the reason is its last line.
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"--load: {path} does not fit the model: {reason}") from None
    for i, chunk in enumerate(trainer.chunks):
        fill_weights(chunk, loaded[f"model{i}"])
    trainer.optimizer.load_state_dict(loaded["optimizer"])
    _unshare_steps(trainer.optimizer)
    trainer.scheduler.load_state_dict(loaded["scheduler"])
    changed = files.version_differences(manifest["versions"], versions())
    if changed:
        _say(f"{path} was written with {', '.join(changed)}")
    states = None
    if same_layout:
        states = {name: row.flatten() for name, row in loaded["rng"].items()}
    else:
        _say(f"{path} was written in another layout: random states could not be carried over")
    return LoadedRun(path, loaded["run"], states)


def choose_checkpoint(directory: Path) -> tuple[Path, dict[str, Any]]:
    """A collective: the newest checkpoint that is whole, and its manifest. All ranks share the reading.

    Rank 0 prints a line for each one that is not.

    Raises:
        ValueError: there is none.
    """
    shared = [files.candidates(directory)]
    dist.broadcast_object_list(shared, src=0)
    paths, problems = shared[0], []
    for path in paths:
        manifest, problem = _examine(path)
        if problem is None:
            return path, manifest
        problems.append(problem)
        _say(f"{path.name} cannot be used: {problem}")
    if not paths:
        raise ValueError(f"--load: {directory} holds no finished checkpoint")
    raise ValueError(
        f"--load: none of the {len(paths)} checkpoint(s) in {directory} can be used: {problems[0]}"
    )


def _examine(path: Path) -> tuple[dict[str, Any], str | None]:
    """(manifest, None), or what is wrong with the checkpoint."""
    shared: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            shared = [(files.read_manifest(path), None)]
        except ValueError as error:
            shared = [({}, str(error))]
    dist.broadcast_object_list(shared, src=0)
    manifest, problem = shared[0]
    if problem is not None:
        return manifest, problem
    # Each rank reads its share of the files.
    entries = sorted(manifest["files"].items(), key=lambda entry: (-entry[1]["bytes"], entry[0]))
    try:
        for name, entry in entries[dist.get_rank() :: dist.get_world_size()]:
            files.check_file(path / name, entry)
        if dist.get_rank() == 0:
            check_pickles(path)
    except ValueError as error:
        problem = str(error)
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, problem)
    return manifest, next((text for text in found if text is not None), None)


def _say(line: str) -> None:
    if dist.get_rank() == 0:
        print(f"checkpoint: {line}", flush=True)
