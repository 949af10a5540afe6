"""The pickles of a Megatron distributed checkpoint, read without running what they name.

pickle calls whatever a file tells it to. A checkpoint may come from anywhere, so these readers know the few
classes its table of contents is made of, and how a tensor lies in its archive, and refuse the rest.
"""

from __future__ import annotations

import collections
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype))},
    "collections": {"OrderedDict"},
    # A run's checkpoint records where it was written.
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath"},
}


# How a checkpoint was planned, which some versions of megatron-core keep in its table of contents.
_NOT_NEEDED = {
    "BytesIOWriteData",
    "MCoreMetadata",
    "MCoreSavePlan",
    "SavePlan",
    "TensorWriteData",
    "WriteItem",
    "WriteItemType",
    "_StoragePrefix",
}


class TableUnpickler(pickle.Unpickler):
    """Knows a checkpoint's table of contents and nothing else: a file from elsewhere can run no code."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        if name in _NOT_NEEDED and module.startswith(("megatron.core.", "torch.distributed.checkpoint.")):
            return type(name, (_Ignored,), {})
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint")


class _Ignored:
    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


class _Tensor(NamedTuple):
    """What the pickle inside a chunk's archive says of its tensor."""

    numel: int
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _ChunkUnpickler(pickle.Unpickler):
    """Reads how a tensor lies in its archive's record, and calls nothing."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: _Tensor(storage, offset, size, stride)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module in ("torch", "torch.storage") and name.endswith("Storage"):
            return name
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's tensor")

    def persistent_load(self, pid: Any) -> Any:
        return pid[-1]


class _Window(io.RawIOBase):
    """A part of a file as a file, for zipfile."""

    def __init__(self, path: Path, offset: int, length: int):
        self._file, self._offset, self._length, self._position = open(path, "rb"), offset, length, 0  # noqa: SIM115

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = offset + (0, self._position, self._length)[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._offset + self._position)
        count = self._file.readinto(memoryview(buffer)[: max(0, self._length - self._position)])
        self._position += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def record_offset(path: Path, start: int, length: int, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Where in a file the data of one tensor begin, row by row.

    Args:
        path, start, length: the file, and the bytes of it that are an archive of `torch.save`.
        shape, dtype: what the tensor should be.

    Raises:
        OSError, KeyError, EOFError, BadZipFile, UnpicklingError: the archive is damaged.
        ValueError: it is compressed, not contiguous, or of another size than the table of contents says.
    """
    with _Window(path, start, length) as window, zipfile.ZipFile(window) as archive:
        names = archive.namelist()
        pickled = next(name for name in [*names, ""] if name.endswith("data.pkl") or not name)
        if not pickled:
            raise ValueError("the archive holds no tensor")
        tensor = _ChunkUnpickler(io.BytesIO(archive.read(pickled))).load()
        info = archive.getinfo(pickled.removesuffix("data.pkl") + "data/0")
        numel = torch.Size(shape).numel()
        expected = torch.empty(shape, device="meta").stride()
        dense = isinstance(tensor, _Tensor) and all(
            a == b or size == 1 for a, b, size in zip(tensor.stride, expected, shape, strict=True)
        )
        if not dense or tuple(tensor.size) != shape or tensor.offset != 0:
            raise ValueError("the tensor is not stored row by row")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != numel * dtype.itemsize:
            raise ValueError("the tensor has another size than the table of contents says")
        window.seek(info.header_offset)
        header = window.read(30)
        skip = 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        return start + info.header_offset + skip
