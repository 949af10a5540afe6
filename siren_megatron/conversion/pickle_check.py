"""A Megatron distributed checkpoint's pickles, seen to be plain data before megatron-core unpickles them.

megatron-core and torch unpickle the table of contents and the objects in the files without a filter, and
pickle calls whatever a file tells it to.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from siren_megatron.conversion.plain_pickle import TableUnpickler


def check_pickles(directory: Path, *, objects: bool = True) -> None:
    """See that nothing in a checkpoint that gets unpickled calls anything.

    Args:
        directory: the checkpoint.
        objects: look at the objects in the files too (layers' extra states); not needed where the caller
            loads tensors alone, which torch reads with `weights_only`.

    Raises:
        ValueError: something else than plain data is in it, or it can't be read; the line names the file.
    """
    path = directory / ".metadata"
    try:
        with open(path, "rb") as file:
            table = TableUnpickler(file).load()
        places = [
            (index.fqn, info.relative_path, info.offset, info.length, info.transform_descriptors)
            for index, info in table.storage_data.items()
        ]
        kinds = dict(table.state_dict_metadata)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is refused: {_one_line(error)}") from None
    except Exception as error:
        # Unpickling a damaged file raises anything.
        raise ValueError(f"{path} is damaged: {_one_line(error)}") from None
    for key, name, offset, length, transforms in places:
        if not isinstance(name, str) or Path(name).name != name or transforms:
            raise ValueError(f"{path} is refused: {key} lies outside of the checkpoint or is encoded")
        if objects and not isinstance(kinds.get(key), TensorStorageMetadata):
            _check_object(directory / name, key, offset, length)
    common = directory / "common.pt"
    _check_plain(common, None, str(common))


def _check_object(path: Path, key: str, offset: Any, length: Any) -> None:
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            content = file.read(length)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {key}: {_one_line(error)}") from None
    _check_plain(path, content, f"{path}: {key}")


def _check_plain(path: Path, content: bytes | None, what: str) -> None:
    """`content`, or the whole file where it is None, as `torch.save` writes plain values and tensors."""
    try:
        torch.load(path if content is None else io.BytesIO(content), map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except pickle.UnpicklingError as error:
        raise ValueError(f"{what} is refused: {_reason(error)}") from None
    except Exception as error:
        raise ValueError(f"{what} is damaged: {_one_line(error)}") from None


def _reason(error: pickle.UnpicklingError) -> str:
    """torch's message is a page that tells how to load the file all the same: the line that matters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if "Unsupported" in line or "GLOBAL" in line]
    return " ".join((named or lines or ["not plain data"])[0].split())


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
