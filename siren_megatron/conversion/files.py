"""Tensors in files, read and written in parts: safetensors without mapping or holding a whole file.

safetensors' own reader maps files, so that pages once read count as this process's memory; its writer wants
all tensors of a file at a time. Here a part is read into place, and written where it belongs.

The format (huggingface/safetensors, README): 8 bytes little-endian n, n bytes of JSON header, then the data.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from siren_megatron.architecture import Architecture
from siren_megatron.conversion.cuts import Box
from siren_megatron.families import IGNORED_SOURCES

BLOCK_BYTES = 32 * 1024**2
"""Bytes read at a time where columns are picked out of rows."""
MAX_HEADER_BYTES = 100_000_000
"""As safetensors' own limit."""
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX_FILE = "model.safetensors.index.json"
# What travels with the weights: configuration, tokenizer, generation settings, chat template.
COMPANION_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken")


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return memoryview(tensor.view(torch.uint8).numpy()).cast("B")


@dataclass(frozen=True)
class FileArray:
    """A vector or matrix in a file, row by row.

    Args:
        path: the file.
        offset: of its first byte in the file.
        dtype, shape: of the tensor.
    """

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def read_into(self, out: Tensor, box: Box) -> None:
        """Fill `out`, contiguous and of the box's shape.

        Raises:
            ValueError: the file ends too early, or cannot be read.
        """
        width = self.shape[1] if len(self.shape) == 2 else 1
        start = self.offset + box.row * width * self.dtype.itemsize
        if not box.column_end or box.column_end - box.column == width:
            self._read(as_bytes(out), start)
            return
        row_bytes = width * self.dtype.itemsize
        step = max(1, BLOCK_BYTES // row_bytes)
        for row in range(0, out.size(0), step):
            rows = min(step, out.size(0) - row)
            block = torch.empty(rows, width, dtype=self.dtype)
            self._read(as_bytes(block), start + row * row_bytes)
            out[row : row + rows] = block[:, box.column : box.column_end]

    def _read(self, target: memoryview, offset: int) -> None:
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(offset)
                done = 0
                while done < len(target):
                    count = file.readinto(target[done:])
                    if not count:
                        raise ValueError(f"{self.path} is truncated")
                    done += count
        except OSError as error:
            raise ValueError(f"{self.path} cannot be read: {error.strerror}") from None


def read_safetensors_header(path: Path) -> dict[str, FileArray]:
    """The tensors of one safetensors file by name; no data is read.

    Raises:
        ValueError: the file cannot be read, is truncated or malformed, or has a tensor of another dtype.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 0 < length <= min(size - 8, MAX_HEADER_BYTES):
                raise ValueError(f"{path} is truncated or no safetensors file")
            header = json.loads(file.read(length))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        raise ValueError(f"{path} has a damaged header") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path} has a damaged header")
    arrays, spans = {}, []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
            numbers = [*shape, start, stop]
        except (TypeError, KeyError, ValueError):
            raise ValueError(f"{path} has a damaged header: {name!r}") from None
        if not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError(f"{path} has a damaged header: {name!r}")
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ValueError(
                f"{path}: {name!r} has dtype {dtype!r}, not supported (known: {', '.join(DTYPES)})"
            )
        array = FileArray(path, 8 + length + start, DTYPES[dtype], tuple(shape))
        if stop - start != array.nbytes:
            raise ValueError(f"{path} has a damaged header: {name!r} has another size than its shape {shape}")
        arrays[name] = array
        spans.append((start, stop))
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise ValueError(f"{path} has a damaged header: tensors overlap or leave a hole at byte {end}")
        end = stop
    if 8 + length + end != size:
        raise ValueError(f"{path} is truncated: {size} bytes, its header describes {8 + length + end}")
    return arrays


class HfReader:
    """The tensors of a Hugging Face checkpoint by name: one file, or those its index names.

    Raises:
        ValueError: a file is missing or damaged, or a tensor appears twice; the line names the file.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.arrays: dict[str, FileArray] = {}
        for path in self._paths():
            for name, array in read_safetensors_header(path).items():
                if name in self.arrays:
                    raise ValueError(f"{path} repeats the tensor {name} of {self.arrays[name].path.name}")
                self.arrays[name] = array

    def _paths(self) -> list[Path]:
        index = self.directory / INDEX_FILE
        if index.is_file():
            try:
                names = set(json.loads(index.read_text())["weight_map"].values())
                # A name with a directory in it could point anywhere.
                paths = [self.directory / Path(name).name for name in sorted(names)]
            except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
                raise ValueError(f"{index} is damaged: no weight_map of file names") from None
            for path in paths:
                if not path.is_file():
                    raise ValueError(f"{path} is missing: {INDEX_FILE} names it")
            return paths
        single = self.directory / "model.safetensors"
        paths = [single] if single.is_file() else sorted(self.directory.glob("*.safetensors"))
        if not paths:
            raise ValueError(f"{self.directory} holds no *.safetensors file")
        return paths

    def check(self, architecture: Architecture) -> None:
        """See that the tensors are those of the architecture, nothing missing and nothing left over.

        Raises:
            ValueError: a tensor is missing, left over, or has another shape; the line names it.
        """
        expected = architecture.hf_shapes()
        missing = [name for name in expected if name not in self.arrays]
        if missing:
            raise ValueError(f"{self.directory} lacks {len(missing)} tensor(s), such as {missing[0]}")
        for name, shape in expected.items():
            if self.arrays[name].shape != shape:
                raise ValueError(
                    f"{self.directory}: {name} has shape {list(self.arrays[name].shape)}, "
                    f"config.json makes it {list(shape)}"
                )
        extra = [
            name
            for name in self.arrays
            if name not in expected
            and not IGNORED_SOURCES.search(name)
            and not (name == "lm_head.weight" and architecture.tied)
        ]
        if extra:
            raise ValueError(
                f"{self.directory} holds {len(extra)} tensor(s) that a {architecture.name} has not, "
                f"such as {extra[0]}"
            )


class HfWriter:
    """Writes a Hugging Face checkpoint part by part, in any order, into one or several safetensors files.

    A context manager. Files have their final size from the start.

    Args:
        directory: exists and holds no safetensors files.
        tensors: name, dtype and shape of every tensor.
        max_file_bytes: size from which a new file is begun, in bytes; a larger tensor has a file of its own.

    Raises:
        OSError: from any call, where the disk is full or cannot be written.
    """

    def __init__(
        self,
        directory: Path,
        tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]],
        max_file_bytes: int,
    ):
        self.directory = directory
        files: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
        self.total_bytes = in_file = 0
        for name, dtype, shape in tensors:
            nbytes = torch.Size(shape).numel() * dtype.itemsize
            if files[-1] and in_file + nbytes > max_file_bytes:
                files.append({})
                in_file = 0
            files[-1][name] = (dtype, shape)
            in_file += nbytes
            self.total_bytes += nbytes
        names = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
        self._names = names if len(files) > 1 else ["model.safetensors"]
        self._files: list = []
        self.arrays: dict[str, FileArray] = {}
        self._where: dict[str, int] = {}
        try:
            for index, content in enumerate(files):
                self._create(index, content)
        except BaseException:
            self.close()
            raise

    def _create(self, index: int, content: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        start = 0
        for name, (dtype, shape) in content.items():
            stop = start + torch.Size(shape).numel() * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
            start = stop
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        path = self.directory / self._names[index]
        self._files.append(open(path, "xb", buffering=0))  # noqa: SIM115 (closed in close)
        self._files[index].write(len(text).to_bytes(8, "little") + text)
        self._files[index].truncate(8 + len(text) + start)
        for name, entry in header.items():
            if name != "__metadata__":
                dtype, shape = content[name]
                self.arrays[name] = FileArray(path, 8 + len(text) + entry["data_offsets"][0], dtype, shape)
                self._where[name] = index

    def write(self, name: str, tensor: Tensor, row: int = 0) -> None:
        """Write rows of a tensor, from `row` on.

        Args:
            tensor: on the CPU, whole rows of the tensor `name`, in its dtype.
        """
        array = self.arrays[name]
        assert tensor.dtype == array.dtype and tuple(tensor.shape[1:]) == array.shape[1:], name
        assert row + tensor.size(0) <= array.shape[0], name
        data = as_bytes(tensor.contiguous())
        file = self._files[self._where[name]]
        file.seek(array.offset + row * (array.nbytes // array.shape[0]))
        done = 0
        while done < len(data):
            done += file.write(data[done:])

    def finish(self) -> None:
        """Bring the files to the disk and write the index where there are several."""
        for file in self._files:
            os.fsync(file.fileno())
        if len(self._names) > 1:
            index = {
                "metadata": {"total_size": self.total_bytes},
                "weight_map": {name: self._names[i] for name, i in sorted(self._where.items())},
            }
            (self.directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")

    def close(self) -> None:
        for file in self._files:
            file.close()

    def __enter__(self) -> HfWriter:
        return self

    def __exit__(self, *exc) -> None:
        self.close()


def companions(directory: Path) -> list[Path]:
    """The small files beside a checkpoint's weights: configuration, tokenizer, generation settings."""
    return sorted(
        path
        for path in directory.iterdir()
        if path.is_file() and path.suffix in COMPANION_SUFFIXES and not path.name.endswith(".index.json")
    )


def record_dtype(config: Path, dtype: torch.dtype) -> None:
    """Correct the dtype that a config.json names, which loaders take for the tensors'."""
    content = json.loads(config.read_text())
    name = str(dtype).removeprefix("torch.")
    for key in ("dtype", "torch_dtype"):
        if content.get(key, name) != name:
            content[key] = name
            config.write_text(json.dumps(content, indent=2) + "\n")
