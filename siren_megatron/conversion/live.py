"""The weights of a running model: loaded from a Hugging Face checkpoint, gathered for vLLM, exported.

Legend: tp, pp, ep = tensor-, pipeline- and expert-parallel size.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import ShardedObject
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from siren_megatron.architecture import Architecture, Parameter
from siren_megatron.conversion.cuts import join, read_shard
from siren_megatron.conversion.files import HfReader, HfWriter, companions, record_dtype
from siren_megatron.conversion.megatron_reader import MegatronReader
from siren_megatron.conversion.pickle_check import check_pickles
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
def load_megatron_weights(model: Model, directory: Path) -> None:
    """A collective: fill this rank's parameters from a Megatron distributed checkpoint of any layout.

    Args:
        model: from `build_model`.
        directory: from `tools/convert_hf.py import`, or of a run.

    Raises:
        ValueError: there is no such checkpoint, or a tensor is missing.
    """
    singles = "decoder.layers.self_attention.linear_qkv.weight" not in MegatronReader(directory).shapes
    # megatron-core unpickles what the reader above only looked at.
    check_pickles(directory, objects=False)
    metadata = {
        "singleton_local_shards": singles,
        "non_homogeneous_layers": singles,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    chunks = [model] if isinstance(model, torch.nn.Module) else model
    wanted = {f"model{i}": sharded_weights(chunk, metadata) for i, chunk in enumerate(chunks)}
    try:
        loaded = dist_checkpointing.load(wanted, str(directory))
    except CheckpointException as error:
        # torch wraps the traceback of every rank; the reason is its last line.
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"{directory} does not fit the model: {reason}") from None
    for i, chunk in enumerate(chunks):
        fill_weights(chunk, loaded[f"model{i}"])


def sharded_weights(chunk: torch.nn.Module, metadata: dict[str, Any]) -> dict[str, Any]:
    """A chunk's parameters for megatron-core's checkpoints, under the same names for every kind of layers.

    `_extra_state` objects (scales of FP8) are left out: no layer here needs them, local and Transformer
    Engine's layers have other ones, and loading would unpickle them.

    Args:
        metadata: as megatron-core's `sharded_state_dict` takes it.
    """
    state = chunk.sharded_state_dict(metadata=metadata)
    return {name: value for name, value in state.items() if not isinstance(value, ShardedObject)}


def fill_weights(chunk: torch.nn.Module, loaded: dict[str, Any]) -> None:
    """Put what was loaded for `sharded_weights` into the chunk."""
    module = chunk.module if isinstance(chunk, Float16Module) else chunk
    missing, unexpected = module.load_state_dict(loaded, strict=False)
    missing = [name for name in missing if not name.endswith("_extra_state")]
    assert not missing and not unexpected, (missing, unexpected)


def _tensor_group(place: Parameter) -> dist.ProcessGroup:
    if place.rule.per_expert:
        return parallel_state.get_expert_tensor_parallel_group()
    return parallel_state.get_tensor_model_parallel_group()


class _Held(NamedTuple):
    """Parameters that one rank has gathered over its tensor ranks and hands to rank 0, in this order.

    Args:
        rank: its global rank.
        experts: whether these are the experts' parameters (they have tensor ranks of their own).
        places: the parameters with their local shape and dtype.
    """

    rank: int
    experts: bool
    places: list[tuple[Parameter, tuple[int, ...], torch.dtype]]


def _gathering_group(experts: bool) -> dist.ProcessGroup | None:
    """The tensor ranks that this rank gathers with; None where another rank holds the same copy."""
    if experts:
        first = parallel_state.get_expert_data_parallel_rank() == 0
        return parallel_state.get_expert_tensor_parallel_group() if first else None
    first = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    return parallel_state.get_tensor_model_parallel_group() if first else None


@torch.no_grad()
def iterate_hf_weights(
    model: Model, hf_config: dict[str, Any], *, named_on: Collection[int] = ()
) -> Iterator[tuple[str, Tensor | None]]:
    """Whole tensors under their Hugging Face names on rank 0, one parameter at a time.

    A collective: every rank iterates it to its end, and only rank 0 gets tensors. At most one parameter is
    held at a time, in shards and whole. They come layer by layer, whichever stages and expert ranks hold
    them: vLLM keeps what it has of a layer until the layer is complete.

    Args:
        named_on: ranks that get the names as well, each with None, at the moment when rank 0 has the tensor.
    """
    architecture = Architecture.of(hf_config)
    groups = {experts: _gathering_group(experts) for experts in (False, True)}
    local: dict[bool, list[tuple[Parameter, Tensor]]] = {False: [], True: []}
    for place, parameter in local_parameters(model, architecture):
        tied = place.key == "output_layer.weight" and architecture.tied
        if groups[place.rule.per_expert] is not None and not tied:
            local[place.rule.per_expert].append((place, parameter.detach()))
    mine = [
        _Held(dist.get_rank(), experts, [(place, tuple(p.shape), p.dtype) for place, p in local[experts]])
        for experts, group in groups.items()
        if group is not None and group.rank() == 0
    ]
    everyone: list[list[_Held]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine)
    order = [(held, i) for of_rank in everyone for held in of_rank for i in range(len(held.places))]
    order.sort(key=lambda item: _depth(item[0].places[item[1]][0]))
    for held, index in order:
        group = groups[held.experts]
        in_group = group is not None and dist.get_process_group_ranks(group)[0] == held.rank
        place, shape, dtype = held.places[index]
        shards = _gather(*local[held.experts][index], group) if in_group else []
        if held.rank != 0:
            shards = _hand_over(place, shards, shape, dtype, held)
        if dist.get_rank() == 0:
            yield from zip(place.sources(), join(place.rule, architecture, shards), strict=True)
        elif dist.get_rank() in named_on:
            yield from ((name, None) for name in place.sources())


def _depth(place: Parameter) -> float:
    """The layer a parameter belongs to; the embedding comes before all, the last norm and the head behind."""
    if place.layer is not None:
        return place.layer
    return -1 if place.key.startswith("embedding.") else math.inf


def _gather(place: Parameter, parameter: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """The shards of all tensor ranks, in rank order; of a replicated parameter this rank's."""
    if place.rule.cut == "replicated" or group.size() == 1:
        return [parameter]
    shards = [torch.empty_like(parameter) for _ in range(group.size())]
    dist.all_gather(shards, parameter.contiguous(), group=group)
    return shards


def _hand_over(
    place: Parameter, shards: list[Tensor], shape: tuple[int, ...], dtype: torch.dtype, held: _Held
) -> list[Tensor]:
    """Send the shards from their holder to rank 0; the shards on rank 0."""
    if dist.get_rank() == held.rank:
        for shard in shards:
            dist.send(shard.contiguous(), dst=0)
    if dist.get_rank() != 0:
        return []
    count = 1
    if place.rule.cut != "replicated" and held.experts:
        count = parallel_state.get_expert_tensor_parallel_world_size()
    elif place.rule.cut != "replicated":
        count = parallel_state.get_tensor_model_parallel_world_size()
    received = [torch.empty(shape, dtype=dtype, device=torch.cuda.current_device()) for _ in range(count)]
    for shard in received:
        dist.recv(shard, src=held.rank)
    return received


def export_hf_checkpoint(model: Model, source: Path, hf_config: dict[str, Any], target: Path) -> None:
    """Write the model as a Hugging Face checkpoint, with tokenizer and configs of the one it started from.

    A collective. Written under a temporary name beside `target`, then renamed; an old `target` is
    replaced.

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
