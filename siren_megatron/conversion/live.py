"""The weights of a running model: loaded from a Hugging Face checkpoint, gathered for vLLM, exported.

Legend: tp, pp, ep = tensor-, pipeline- and expert-parallel size.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import ShardedObject
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from siren_megatron.architecture import Architecture, Parameter
from siren_megatron.conversion.cuts import join, read_shard
from siren_megatron.conversion.files import HfReader, HfWriter, companions, record_dtype
from siren_megatron.conversion.megatron_reader import MegatronReader
from siren_megatron.families import parameter_name

MAX_FILE_BYTES = 4 * 1024**3

Model = torch.nn.Module | Sequence[torch.nn.Module]


def local_parameters(model: Model, architecture: Architecture) -> Iterator[tuple[Parameter, Tensor]]:
    """This rank's parameters with their place in the whole model, in a fixed order.

    A tied output head appears as "output_layer.weight" with the embedding's rule.

    Args:
        model: the stage, or the stage's chunks.

    Raises:
        ValueError: a parameter has no row in the table.
    """
    table = architecture.table
    ep_rank = parallel_state.get_expert_model_parallel_rank()
    local_experts = architecture.experts // parallel_state.get_expert_model_parallel_world_size()
    for chunk in [model] if isinstance(model, torch.nn.Module) else model:
        numbers = {n: m.layer_number - 1 for n, m in chunk.named_modules() if isinstance(m, TransformerLayer)}
        # Chunks and stages count their layers from 0.
        first_layer = min(numbers.values(), default=0)
        for name, parameter in chunk.named_parameters():
            key, layer, expert = parameter_name(name, table)
            rule = table[key]
            if key == "output_layer.weight" and architecture.tied:
                rule = table["embedding.word_embeddings.weight"]
            place = Parameter(
                key,
                None if layer is None else first_layer + layer,
                None if expert is None else ep_rank * local_experts + expert,
                rule,
            )
            yield place, parameter


@torch.no_grad()
def load_hf_weights(model: Model, directory: Path, hf_config: dict[str, Any]) -> None:
    """Fill this rank's parameters from a Hugging Face checkpoint; only their part of each file is read.

    Args:
        model: from `build_model`.
        directory: the checkpoint.

    Raises:
        ValueError: a tensor is missing, left over, or has another shape, or a file is damaged.
    """
    architecture, reader = Architecture.of(hf_config), HfReader(directory)
    reader.check(architecture)
    for place, parameter in local_parameters(model, architecture):
        group = _tensor_group(place)
        sources = [reader.arrays[name] for name in place.sources()]
        parameter.copy_(read_shard(place.rule, architecture, sources, group.size(), group.rank()))


@torch.no_grad()
def load_megatron_weights(model: torch.nn.Module, directory: Path) -> None:
    """A collective: fill this rank's parameters from a Megatron distributed checkpoint of any layout.

    Args:
        model: from `build_model`.
        directory: from `tools/convert_hf.py import`, or of a run.

    Raises:
        ValueError: there is no such checkpoint, or a tensor is missing.
    """
    # Reading the table of contents first also refuses one that would run code: megatron-core unpickles it.
    singles = "decoder.layers.self_attention.linear_qkv.weight" not in MegatronReader(directory).shapes
    metadata = {
        "singleton_local_shards": singles,
        "non_homogeneous_layers": singles,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    # `_extra_state` objects hold nothing that these layers need, and would be unpickled: leave them out.
    state = model.sharded_state_dict(metadata=metadata)
    wanted = {"model": {name: value for name, value in state.items() if not isinstance(value, ShardedObject)}}
    try:
        loaded = dist_checkpointing.load(wanted, str(directory))
    except CheckpointException as error:
        # torch wraps the traceback of every rank; the reason is its last line.
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"{directory} does not fit the model: {reason}") from None
    missing, unexpected = model.load_state_dict(loaded["model"], strict=False)
    missing = [name for name in missing if not name.endswith("_extra_state")]
    assert not missing and not unexpected, (missing, unexpected)


def _tensor_group(place: Parameter) -> dist.ProcessGroup:
    if place.rule.per_expert:
        return parallel_state.get_expert_tensor_parallel_group()
    return parallel_state.get_tensor_model_parallel_group()


class _Holder(NamedTuple):
    """A rank that has gathered parameters over its tensor ranks and hands them to rank 0.

    Args:
        rank: its global rank.
        places: parameters with their local shape and dtype, in the order they are handed over.
    """

    rank: int
    places: list[tuple[Parameter, tuple[int, ...], torch.dtype]]


def _holders(model: Model, architecture: Architecture) -> list[_Holder]:
    """A collective: one holder for each pipeline stage and expert rank, stage by stage; the same everywhere.

    Parameters that all expert ranks hold are handed over by the first of them only.
    """
    mine = None
    if _is_gathering() and parallel_state.get_tensor_model_parallel_rank() == 0:
        first = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
        mine = _Holder(
            dist.get_rank(),
            [
                (place, tuple(parameter.shape), parameter.dtype)
                for place, parameter in local_parameters(model, architecture)
                if (first or place.rule.per_expert)
                and not (place.key == "output_layer.weight" and architecture.tied)
            ],
        )
    everyone: list[_Holder | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return [holder for holder in everyone if holder is not None and holder.places]


def _is_gathering() -> bool:
    """Whether this rank holds the first copy of its experts, and so (if any does) of everything else."""
    return parallel_state.get_expert_data_parallel_rank() == 0


@torch.no_grad()
def iterate_hf_weights(model: Model, hf_config: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors under their Hugging Face names on rank 0, one parameter at a time.

    A collective: every rank iterates it to its end, and only rank 0 gets items. At most one whole parameter
    is held at a time.
    """
    architecture = Architecture.of(hf_config)
    holders = _holders(model, architecture)
    rank = dist.get_rank()
    if not _is_gathering():
        return
    first = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    local = [
        (place, parameter.detach())
        for place, parameter in local_parameters(model, architecture)
        if (first or place.rule.per_expert) and not (place.key == "output_layer.weight" and architecture.tied)
    ]
    group = parallel_state.get_tensor_model_parallel_group()
    my_holder = dist.get_process_group_ranks(group)[0]
    for holder in holders:
        if my_holder != holder.rank and rank != 0:
            continue
        for index, (place, shape, dtype) in enumerate(holder.places):
            shards: list[Tensor] = []
            if my_holder == holder.rank:
                shards = _gather(*local[index])
            count = (
                1 if place.rule.cut == "replicated" else parallel_state.get_tensor_model_parallel_world_size()
            )
            if holder.rank != 0 and rank == holder.rank:
                for shard in shards:
                    dist.send(shard.contiguous(), dst=0)
            elif holder.rank != 0 and rank == 0:
                shards = [
                    torch.empty(shape, dtype=dtype, device=torch.cuda.current_device()) for _ in range(count)
                ]
                for shard in shards:
                    dist.recv(shard, src=holder.rank)
            if rank == 0:
                yield from zip(place.sources(), join(place.rule, architecture, shards), strict=True)


def _gather(place: Parameter, parameter: Tensor) -> list[Tensor]:
    """The shards of all tensor ranks, in rank order; of a replicated parameter this rank's."""
    group = _tensor_group(place)
    if place.rule.cut == "replicated" or group.size() == 1:
        return [parameter]
    shards = [torch.empty_like(parameter) for _ in range(group.size())]
    dist.all_gather(shards, parameter.contiguous(), group=group)
    return shards


def export_hf_checkpoint(model: Model, source: Path, hf_config: dict[str, Any], target: Path) -> None:
    """Write the model as a Hugging Face checkpoint, with tokenizer and configs of the one it started from.

    A collective. Written under a temporary name beside `target`, then renamed; an old `target` is replaced.

    Args:
        source: the Hugging Face checkpoint the run started from.
        target: the directory to write.
    """
    weights = iterate_hf_weights(model, hf_config)
    if dist.get_rank() != 0:
        for _ in weights:
            pass
    else:
        partial = target.with_name(target.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for path in companions(source):
            shutil.copy(path, partial / path.name)
        dtype = next((model if isinstance(model, torch.nn.Module) else model[0]).parameters()).dtype
        record_dtype(partial / "config.json", dtype)
        shapes = Architecture.of(hf_config).hf_shapes()
        with HfWriter(partial, ((n, dtype, s) for n, s in shapes.items()), MAX_FILE_BYTES) as writer:
            for name, tensor in weights:
                writer.write(name, tensor.cpu())
            writer.finish()
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    dist.barrier()
