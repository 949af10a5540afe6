"""Megatron distributed checkpoints ("torch_dist"), any rows of any tensor read without a process group.

Of this project's converter and of a run (layers stacked along the first dimension of a tensor, experts along
the second), and of Megatron-LM since core 0.14 (a tensor a layer, `decoder.layers.3...`, gate and up apart as
`linear_fc1.weight_w` and `_v`).
"""

from __future__ import annotations

import itertools
import json
import pickle
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from siren_megatron.architecture import Architecture, Parameter
from siren_megatron.conversion.cuts import Box, Readable, whole_shape
from siren_megatron.conversion.files import BLOCK_BYTES, FileArray
from siren_megatron.conversion.plain_pickle import TableUnpickler, record_offset

# What a checkpoint holds besides a model's weights.
OTHER_KEYS = re.compile(r"^(optimizer|chained|rng_state|rerun|opt_param)|(^|[._/])_extra_state(/|$)")


@dataclass(frozen=True)
class _StoredChunk:
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    path: Path
    start: int
    length: int


class MegatronReader:
    """The weights of a Megatron distributed checkpoint.

    Attributes:
        dtypes: of each tensor by its key; shapes likewise.

    Raises:
        ValueError: no such checkpoint, or it is damaged; the line names the file.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        try:
            if json.loads((directory / "metadata.json").read_text())["sharded_backend"] != "torch_dist":
                raise ValueError(f"{directory}: only checkpoints of format torch_dist are supported")
        except OSError:
            raise ValueError(f"{directory} is no Megatron distributed checkpoint: no metadata.json") from None
        except (json.JSONDecodeError, TypeError, KeyError, UnicodeDecodeError):
            raise ValueError(f"{directory / 'metadata.json'} is damaged") from None
        path = directory / ".metadata"
        try:
            with open(path, "rb") as file:
                metadata = TableUnpickler(file).load()
            tensors = {
                key: entry
                for key, entry in metadata.state_dict_metadata.items()
                if isinstance(entry, TensorStorageMetadata) and not OTHER_KEYS.search(key)
            }
            self.shapes = {key: tuple(entry.size) for key, entry in tensors.items()}
            self.dtypes = {key: entry.properties.dtype for key, entry in tensors.items()}
            storage = {(i.fqn, tuple(i.offset or ())): info for i, info in metadata.storage_data.items()}
            self._chunks = {
                key: [self._stored(storage, key, chunk) for chunk in entry.chunks]
                for key, entry in tensors.items()
            }
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from None
        except ValueError:
            raise
        except Exception as error:
            # Unpickling a damaged file raises anything.
            raise ValueError(f"{path} is damaged: {error!r}") from None
        self._arrays: dict[tuple[Path, int], FileArray] = {}
        self._leads: dict[str, dict[tuple[int, ...], list[_StoredChunk]]] = {}
        self._check_files()

    def _stored(self, storage: dict, key: str, chunk: Any) -> _StoredChunk:
        info = storage[key, tuple(chunk.offsets)]
        # A name with a directory in it could point anywhere.
        path = self.directory / Path(info.relative_path).name
        return _StoredChunk(tuple(chunk.offsets), tuple(chunk.sizes), path, info.offset, info.length)

    def _check_files(self) -> None:
        ends: dict[Path, int] = {}
        for chunk in itertools.chain(*self._chunks.values()):
            ends[chunk.path] = max(ends.get(chunk.path, 0), chunk.start + chunk.length)
        for path, end in ends.items():
            if not path.is_file():
                raise ValueError(f"{path} is missing")
            if path.stat().st_size < end:
                raise ValueError(
                    f"{path} is truncated: {path.stat().st_size} bytes, its contents end at {end}"
                )

    @property
    def num_chunks(self) -> int:
        return sum(map(len, self._chunks.values()))

    @property
    def files(self) -> set[Path]:
        return {chunk.path for chunk in itertools.chain(*self._chunks.values())}

    def check(self, architecture: Architecture) -> None:
        """See that the tensors are those of the architecture, nothing missing and nothing left over.

        Raises:
            ValueError: a tensor is missing, left over, has another shape, or parts of it are not there.
        """
        known = set()
        for parameter in architecture.parameters():
            for view in self._views(parameter, architecture):
                known.add(view.key)
                shape = self.shapes[view.key]
                wanted = view.shape(architecture)
                fits = len(shape) == len(wanted) and all(
                    a == b or (parameter.rule.cut == "vocab" and i == 0 and a >= architecture.vocab)
                    for i, (a, b) in enumerate(zip(shape, wanted, strict=True))
                )
                if not fits:
                    raise ValueError(
                        f"{self.directory}: {view.key} has shape {list(shape)}, "
                        f"config.json makes it {list(wanted)}"
                    )
        extra = sorted(self.shapes.keys() - known)
        if extra:
            raise ValueError(
                f"{self.directory} holds {len(extra)} tensor(s) that a {architecture.name} has not, "
                f"such as {extra[0]}"
            )

    def whole(self, parameter: Parameter, architecture: Architecture) -> Readable:
        """A whole megatron-core tensor, to be read in parts."""
        return _Whole(self, self._views(parameter, architecture), architecture)

    def _views(self, parameter: Parameter, architecture: Architecture) -> list[_View]:
        key, layer, expert, rule = parameter
        lead = tuple(i for i in (layer, expert) if i is not None)
        if key in self.shapes:
            return [_View(key, lead, parameter, None)]
        single = key
        if layer is not None:
            single = single.replace("decoder.layers.", f"decoder.layers.{layer}.", 1)
        if expert is not None:
            single = single.replace("mlp.experts.experts.", f"mlp.experts.experts.{expert}.", 1)
        if single in self.shapes:
            return [_View(single, (), parameter, None)]
        if rule.cut == "gated" and f"{single}_w" in self.shapes and f"{single}_v" in self.shapes:
            return [_View(f"{single}_{half}", (), parameter, i) for i, half in enumerate("wv")]
        raise ValueError(f"{self.directory} lacks the tensor {key}" + (f" of layer {layer}" if lead else ""))

    def read(self, key: str, lead: tuple[int, ...], box: Box, out: Tensor) -> None:
        """Fill `out` with a box of the tensor `key` at the leading indices (layer, expert).

        Raises:
            ValueError: a file is damaged, or no chunk holds a part of the box.
        """
        missing, inner = out.numel(), len(lead)
        for chunk in self._by_lead(key, inner).get(lead, ()):
            (row, *column), sizes = chunk.offsets[inner:], chunk.sizes[inner:]
            part = Box(
                max(box.row, row),
                min(box.row_end, row + sizes[0]),
                max(box.column, column[0]) if column else 0,
                min(box.column_end, column[0] + sizes[1]) if column else 0,
            )
            if part.row >= part.row_end or (column and part.column >= part.column_end):
                continue
            rows = out[part.row - box.row : part.row_end - box.row]
            source = Box(part.row - row, part.row_end - row)
            if column:
                source = source._replace(
                    column=part.column - column[0], column_end=part.column_end - column[0]
                )
                target = rows[:, part.column - box.column : part.column_end - box.column]
            else:
                target = rows
            self._read_chunk(chunk, key, sizes, source, target)
            missing -= target.numel()
        if missing:
            raise ValueError(f"{self.directory}: {key} has parts that no file holds")

    def _by_lead(self, key: str, inner: int) -> dict[tuple[int, ...], list[_StoredChunk]]:
        if key not in self._leads:
            self._leads[key] = {}
            for chunk in self._chunks[key]:
                if chunk.sizes[:inner] != (1,) * inner:
                    raise ValueError(f"{chunk.path}: {key} has several layers or experts in one chunk")
                self._leads[key].setdefault(chunk.offsets[:inner], []).append(chunk)
        return self._leads[key]

    def _read_chunk(
        self, chunk: _StoredChunk, key: str, sizes: tuple[int, ...], box: Box, target: Tensor
    ) -> None:
        array = self._array(chunk, key, sizes)
        if target.is_contiguous():
            array.read_into(target, box)
            return
        step = max(1, BLOCK_BYTES // max(1, target.size(1) * target.element_size()))
        for row in range(0, target.size(0), step):
            end = min(row + step, target.size(0))
            part = torch.empty(end - row, target.size(1), dtype=target.dtype)
            array.read_into(part, box.rows(box.row + row, box.row + end))
            target[row:end] = part

    def _array(self, chunk: _StoredChunk, key: str, sizes: tuple[int, ...]) -> FileArray:
        place = (chunk.path, chunk.start)
        if place not in self._arrays:
            try:
                offset = record_offset(chunk.path, chunk.start, chunk.length, chunk.sizes, self.dtypes[key])
            except (
                OSError,
                ValueError,
                KeyError,
                EOFError,
                zipfile.BadZipFile,
                pickle.UnpicklingError,
            ) as error:
                raise ValueError(f"{chunk.path} is damaged: {key}: {error}") from None
            self._arrays[place] = FileArray(chunk.path, offset, self.dtypes[key], sizes)
        return self._arrays[place]


class _View(NamedTuple):
    """A whole tensor (half None), or its gate (0) or up (1) half, under a key of the checkpoint."""

    key: str
    lead: tuple[int, ...]
    parameter: Parameter
    half: int | None

    def shape(self, architecture: Architecture) -> tuple[int, ...]:
        rows, *rest = whole_shape(self.parameter.rule, architecture, 1)
        stacked = []
        if self.lead:
            stacked = [architecture.layers] + [architecture.experts] * (len(self.lead) - 1)
        return (*stacked, rows // 2 if self.half is not None else rows, *rest)


class _Whole:
    """A whole tensor as a `Readable`: one view, or gate and up one below the other."""

    def __init__(self, reader: MegatronReader, views: list[_View], architecture: Architecture):
        self._reader, self._views = reader, views
        self._rows = [view.shape(architecture)[len(view.lead)] for view in views]
        first = views[0]
        self.shape = (sum(self._rows), *first.shape(architecture)[len(first.lead) + 1 :])
        self.dtype = reader.dtypes[first.key]

    def read_into(self, out: Tensor, box: Box) -> None:
        start = 0
        for view, rows in zip(self._views, self._rows, strict=True):
            row, end = max(box.row, start), min(box.row_end, start + rows)
            if row < end:
                part = out[row - box.row : end - box.row]
                self._reader.read(view.key, view.lead, box.rows(row - start, end - start), part)
            start += rows


def read_common(directory: Path) -> dict[str, Any]:
    """Plain values of `common.pt`; empty where it is missing or holds more than plain values."""
    try:
        common = torch.load(directory / "common.pt", map_location="cpu", weights_only=True)
    except (OSError, pickle.UnpicklingError, RuntimeError, EOFError):
        return {}
    return common if isinstance(common, dict) else {}
