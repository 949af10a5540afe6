"""What the processes of `test_transformer_engine` do, with tests/standins in Transformer Engine's place."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

STANDINS = Path(__file__).resolve().parents[1] / "standins"
TE = {"transformer_impl": "transformer_engine"}


def install_standin() -> None:
    """Before megatron-core is imported in this process."""
    assert not any(name.startswith("megatron") for name in sys.modules), "too late"
    sys.path.insert(0, str(STANDINS))


def update(rank: int, world_size: int, jobs: list):
    """For `run_ranks`: as `gradients.update`."""
    install_standin()
    from tests.distributed import gradients

    return gradients.update(rank, world_size, jobs)


def cross_checkpoints(rank: int, world_size: int, checkpoint: Path, directory: Path):
    """For `run_ranks`: save with one kind of layers, go on with the other; both ways.

    Returns:
        For both kinds: what the run that saved went on to, and the run that loaded.
    """
    install_standin()
    from tests.distributed.test_checkpoint import load_and_go_on, save_and_go_on

    results = []
    for name, own, other in (("local", {}, TE), ("te", TE, {})):
        went_on = save_and_go_on(rank, world_size, checkpoint, directory / name, own)
        (resumed,) = load_and_go_on(rank, world_size, checkpoint, directory / name, [other], {})
        results.append((went_on, resumed))
    return results


class Cut(NamedTuple):
    """What a rank holds of a model, by a parameter's name, layer and expert.

    Args:
        weights: the parameters.
        marks: what megatron-core sums gradients and norms by: sequence parallel, cut, summed over all ranks.
        entries: name and place in a checkpoint -> shapes of the whole and of the part, number of the copy.
    """

    weights: dict[tuple, torch.Tensor]
    marks: dict[tuple, tuple[bool, bool, bool]]
    entries: dict[tuple, tuple]


def cuts(jobs: list[tuple[Path, dict[str, Any]]], world_size: int) -> list[list[Cut]]:
    """[ranks][jobs] what each rank would hold, in one process that talks to nobody (torch's fake group).

    Args:
        jobs: Hugging Face checkpoint and options of the layout, and `transformer_impl`.
    """
    install_standin()
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from siren_megatron import platform

    device = platform.install()
    found = []
    for rank in range(world_size):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        found.append([_cut(device, *job) for job in jobs])
        dist.destroy_process_group()
    return found


def _cut(device: Any, checkpoint: Path, options: dict[str, Any]) -> Cut:
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import apply_factories

    from siren_megatron.architecture import Architecture
    from siren_megatron.config import read_hf_config
    from siren_megatron.conversion.live import load_hf_weights, local_parameters, sharded_weights
    from siren_megatron.model import build_model, transformer_config
    from siren_megatron.run_options import ParallelOptions

    options = dict(options)
    implementation = options.pop("transformer_impl", "local")
    parallel, hf_config = ParallelOptions(**options), read_hf_config(checkpoint)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_size,
        create_gloo_process_groups=False,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    config = transformer_config(hf_config, parallel, device, transformer_impl=implementation)
    (model,) = build_model(hf_config, config)
    load_hf_weights(model, checkpoint, hf_config)
    parameters = {place[:3]: p for place, p in local_parameters(model, Architecture.of(hf_config))}
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    state = sharded_weights(model, {"dp_cp_group": group})
    apply_factories(state)
    parallel_state.destroy_model_parallel()
    return Cut(
        {name: p.detach().clone() for name, p in parameters.items()},
        {name: _marks(p) for name, p in parameters.items()},
        {
            (entry.key, entry.global_offset): (entry.global_shape, entry.local_shape, entry.replica_id)
            for entry in nested_values(state)
        },
    )


def _marks(parameter: torch.nn.Parameter) -> tuple[bool, bool, bool]:
    return (
        getattr(parameter, "sequence_parallel", False),
        getattr(parameter, "tensor_model_parallel", False),
        getattr(parameter, "allreduce", True),
    )
