"""Megatron distributed checkpoints ("torch_dist"), written shard by shard by one process.

megatron-core's own save wants every shard of the model in memory, in as many processes as the layout has
ranks. Here each rank's file is written in turn through torch.distributed.checkpoint's storage writer, every
tensor made when its turn comes; `dist_checkpointing.load` reads the result in any layout.

The format: `metadata.json` names it, `.metadata` is a pickled table of contents, `__<rank>_<n>.distcp` hold
one zip archive of `torch.save` a chunk, `common.pt` what is not sharded. The layers' tensors are stacked
along a first dimension, the experts' along a second.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter, SavePlan, SavePlanner
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import (
    BytesIOWriteData,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from siren_megatron.architecture import Architecture, Layout, Parameter
from siren_megatron.conversion.cuts import Box, boxes, read_box, whole_shape
from siren_megatron.conversion.files import FileArray

FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def _pickled_none() -> bytes:
    buffer = io.BytesIO()
    torch.save([None], buffer)
    return buffer.getvalue()


_NO_EXTRA_STATE = _pickled_none()


class _Chunk(NamedTuple):
    parameter: Parameter
    box: Box


def _rank_chunks(architecture: Architecture, layout: Layout) -> list[list[_Chunk]]:
    """What each rank of the layout writes: its shards of what no other rank has written."""
    ranks: list[list[_Chunk]] = []
    layers = architecture.layers // layout.pp
    experts = architecture.experts // layout.ep
    parameters = list(architecture.parameters())
    for stage, expert_rank, tensor_rank in itertools.product(*map(range, (layout.pp, layout.ep, layout.tp))):
        chunks = []
        for parameter in parameters:
            rule, last = parameter.rule, not parameter.key.startswith("embedding.")
            owner = (layout.pp - 1 if last else 0) if parameter.layer is None else parameter.layer // layers
            expert_owner = 0 if parameter.expert is None else parameter.expert // experts
            if (owner, expert_owner) != (stage, expert_rank) or (rule.cut == "replicated" and tensor_rank):
                continue
            chunks += [_Chunk(parameter, box) for box in boxes(rule, architecture, layout.tp, tensor_rank)]
        ranks.append(chunks)
    return ranks


class _LazyPlanner(SavePlanner):
    """Makes each tensor when the writer asks for it."""

    def __init__(self, make: Callable[[MetadataIndex], Tensor | io.BytesIO]):
        self.make = make

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        return self.make(write_item.index)

    def set_up_planner(self, state_dict, storage_meta=None, is_coordinator=False) -> None:
        raise AssertionError("plans are made by write_megatron_checkpoint")

    create_local_plan = create_global_plan = finish_plan = set_up_planner


def write_megatron_checkpoint(
    directory: Path,
    architecture: Architecture,
    layout: Layout,
    sources: dict[str, FileArray],
    common: dict[str, Any],
    progress: Callable[[int], None],
) -> None:
    """Write a checkpoint from Hugging Face tensors, holding one shard at a time.

    Args:
        directory: an empty directory.
        layout: how the ranks that wrote it would have cut the model; one file a rank.
        sources: the Hugging Face tensors by name, checked.
        common: what `dist_checkpointing.load` returns beside the tensors; plain values.
        progress: called with the bytes of each chunk written.

    Raises:
        OSError, RuntimeError: the disk is full or cannot be written.
        ValueError: a source cannot be read.
    """
    contents: dict[tuple[str, tuple[int, ...]], _Chunk] = {}
    plans = []
    for chunks in _rank_chunks(architecture, layout):
        items = []
        for chunk in chunks:
            item = _write_item(chunk, architecture, layout.tp, sources)
            contents[item.index.fqn, tuple(item.index.offset)] = chunk
            items.append(item)
            if item.index.offset == _first_offset(chunk.parameter):
                items += _extra_state_items(chunk.parameter, architecture)
        plans.append(SavePlan(items))

    def make(index: MetadataIndex) -> Tensor | io.BytesIO:
        if index.offset is None:
            return io.BytesIO(_NO_EXTRA_STATE)
        parameter, box = contents[index.fqn, tuple(index.offset)]
        tensor = read_box(parameter.rule, architecture, [sources[name] for name in parameter.sources()], box)
        progress(tensor.nbytes)
        return tensor.view((1,) * (len(index.offset) - tensor.dim()) + tensor.shape)

    writer, planner = FileSystemWriter(directory, thread_count=1, overwrite=False), _LazyPlanner(make)
    writer.set_up_storage_writer(True)
    plans = [writer.prepare_local_plan(plan) for plan in plans]
    plans, metadata = create_default_global_save_plan(plans)
    plans = writer.prepare_global_plan(plans)
    results = [writer.write_data(plan, planner).wait() for plan in plans if plan.items]
    writer.finish(metadata, results)
    torch.save(common, directory / "common.pt")
    (directory / "metadata.json").write_text(json.dumps(FORMAT))


def _lead(parameter: Parameter, architecture: Architecture) -> list[tuple[int, int]]:
    """(index, size) of the leading dimensions: layers, then experts."""
    pairs = ((parameter.layer, architecture.layers), (parameter.expert, architecture.experts))
    return [(index, size) for index, size in pairs if index is not None]


def _first_offset(parameter: Parameter) -> torch.Size:
    lead = [index for index in (parameter.layer, parameter.expert) if index is not None]
    return torch.Size([*lead, *(0 for _ in parameter.rule.sources[0].dims)])


def _extra_state_items(parameter: Parameter, architecture: Architecture) -> list[WriteItem]:
    """The `_extra_state` objects that megatron-core's linear layers and attention ask for; they hold None."""
    if parameter.rule.cut not in ("qkv", "columns", "gated") or not parameter.key.endswith(".weight"):
        return []
    lead = _lead(parameter, architecture)
    place = ".".join(str(i) for i, _ in lead) + "_" + ".".join(str(n) for _, n in lead)
    modules = [parameter.key.removesuffix(".weight")]
    if parameter.rule.cut == "qkv":
        modules.append(modules[0].replace("linear_qkv", "core_attention"))
    return [
        WriteItem(
            MetadataIndex(f"{module}._extra_state/shard_{place}"),
            WriteItemType.BYTE_IO,
            bytes_io_data=BytesIOWriteData(len(_NO_EXTRA_STATE)),
        )
        for module in modules
    ]


def _write_item(
    chunk: _Chunk, architecture: Architecture, tp: int, sources: dict[str, FileArray]
) -> WriteItem:
    (key, _, _, rule), box = chunk
    lead = _lead(chunk.parameter, architecture)
    shape = whole_shape(rule, architecture, tp)
    start = (box.row, box.column)[: len(shape)]
    offsets = torch.Size([*(i for i, _ in lead), *start])
    properties = TensorProperties(dtype=sources[chunk.parameter.sources()[0]].dtype)
    return WriteItem(
        index=MetadataIndex(key, offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets, torch.Size([*(1 for _ in lead), *box.shape])),
            properties=properties,
            size=torch.Size([*(n for _, n in lead), *shape]),
        ),
    )
