"""Whole checkpoints between Hugging Face and Megatron, streamed: what `tools/convert_hf.py` calls.

One process, no process group, one shard in memory at a time. Output appears under its name when it is
complete, or not at all.
"""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

import siren_megatron
from siren_megatron.architecture import Architecture, Layout, Parameter
from siren_megatron.conversion.cuts import Box, read_source_rows
from siren_megatron.conversion.files import HfReader, HfWriter, companions, record_dtype
from siren_megatron.conversion.megatron_reader import MegatronReader, read_common
from siren_megatron.conversion.megatron_writer import write_megatron_checkpoint

COMPANION_DIRECTORY = "hf"
"""Where in a Megatron checkpoint the configuration and the tokenizer are kept."""
STEP_BYTES = 64 * 1024**2
"""Bytes of a tensor that are in memory at a time on the way to Hugging Face."""
SPARE_BYTES = 16 * 1024**2
"""Room on the disk asked for beside the tensors: headers, tokenizer."""

Progress = Callable[[int], None]


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a directory.

    Raises:
        ValueError: it is missing or no JSON object.
    """
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text())
    except OSError:
        raise ValueError(f"{directory} holds no config.json") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not a JSON object")
    return config


def read_architecture(directory: Path) -> Architecture:
    """The architecture of a directory's config.json; ValueError names the file."""
    config = read_config(directory)
    try:
        return Architecture.of(config)
    except ValueError as error:
        raise ValueError(f"{directory / 'config.json'}: {error}") from None


@contextlib.contextmanager
def new_directory(directory: Path, *, overwrite: bool, nbytes: int) -> Iterator[Path]:
    """A directory that appears under its name when the block ends well, and leaves nothing when it fails.

    Args:
        overwrite: replace an existing checkpoint.
        nbytes: bytes that will be written; refused where the disk has less room.

    Raises:
        ValueError: it exists, is not a checkpoint, or the disk is full or cannot be written.
    """
    directory = directory.absolute()
    occupied = directory.exists() and not (directory.is_dir() and not any(directory.iterdir()))
    if occupied and not overwrite:
        raise ValueError(f"{directory} exists already: pass --overwrite to replace it")
    if occupied and not any((directory / name).is_file() for name in ("config.json", "metadata.json")):
        raise ValueError(f"{directory} is not a checkpoint: --overwrite does not replace it")
    partial = directory.with_name(directory.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        free = shutil.disk_usage(partial).free
        if free < nbytes + SPARE_BYTES:
            raise ValueError(
                f"no space: {directory.parent} has {free / 1e9:.2f} GB left, the checkpoint needs "
                f"{(nbytes + SPARE_BYTES) / 1e9:.2f} GB"
            )
        yield partial
        if directory.exists():
            old = directory.with_name(directory.name + ".replaced")
            shutil.rmtree(old, ignore_errors=True)
            directory.rename(old)
            partial.rename(directory)
            shutil.rmtree(old)
        else:
            partial.rename(directory)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        cause: BaseException | None = error
        # torch's archive writer answers a failed write with a RuntimeError of its own on top.
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause is None:
            raise
        if cause.errno == errno.ENOSPC:
            raise ValueError(f"no space left while writing {directory}") from None
        raise ValueError(f"{directory} cannot be written: {cause.strerror or cause}") from None
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


class Plan(NamedTuple):
    """A conversion that has been checked and can be run.

    Args:
        nbytes: bytes of all tensors.
        run: does it; takes the progress.
    """

    nbytes: int
    run: Callable[[Progress], None]


def plan_import(hf: Path, megatron: Path, layout: Layout, *, overwrite: bool = False) -> Plan:
    """Hugging Face -> Megatron distributed checkpoint.

    Args:
        hf: the Hugging Face checkpoint.
        megatron: the directory to write.
        layout: recorded in the checkpoint, one file a rank; it loads in any other.

    Raises:
        ValueError: here or from `run`; one line.
    """
    architecture = read_architecture(hf)
    layout.check(architecture)
    reader = HfReader(hf)
    reader.check(architecture)
    dtypes: dict[str, torch.dtype] = {}
    for parameter in architecture.parameters():
        for name in parameter.sources():
            dtype = reader.arrays[name].dtype
            if dtypes.setdefault(parameter.key, dtype) != dtype:
                raise ValueError(
                    f"{hf}: {name} is {dtype}, another tensor of {parameter.key} is {dtypes[parameter.key]}"
                )
    nbytes = sum(reader.arrays[name].nbytes for name in architecture.hf_shapes())
    common = {
        "checkpoint_version": 3.0,
        "iteration": 0,
        # How megatron-core's sharded_state_dict lays tensors out: Megatron-LM reads it before it loads.
        "content_metadata": {"singleton_local_shards": False, "non_homogeneous_layers": False},
        "convert_hf": {
            "version": siren_megatron.__version__,
            "architecture": architecture.name,
            "tensor_model_parallel_size": layout.tp,
            "pipeline_model_parallel_size": layout.pp,
            "expert_model_parallel_size": layout.ep,
        },
    }

    def run(progress: Progress) -> None:
        with new_directory(megatron, overwrite=overwrite, nbytes=nbytes) as partial:
            write_megatron_checkpoint(partial, architecture, layout, reader.arrays, common, progress)
            (partial / COMPANION_DIRECTORY).mkdir()
            for path in companions(hf):
                shutil.copyfile(path, partial / COMPANION_DIRECTORY / path.name)

    return Plan(nbytes, run)


def companion_directory(megatron: Path, config_from: Path | None) -> Path:
    """Where the configuration of a Megatron checkpoint is found.

    Raises:
        ValueError: nowhere.
    """
    directory = config_from or megatron / COMPANION_DIRECTORY
    if not (directory / "config.json").is_file():
        raise ValueError(
            f"{directory} holds no config.json: name the Hugging Face checkpoint the run started from "
            "with --config-from"
        )
    return directory


def plan_export(
    megatron: Path,
    hf: Path,
    *,
    config_from: Path | None = None,
    max_shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
) -> Plan:
    """Megatron distributed checkpoint -> Hugging Face.

    Args:
        megatron: the checkpoint, from `import`, a run or Megatron-LM.
        hf: the directory to write.
        config_from: a Hugging Face checkpoint with configuration and tokenizer; the Megatron checkpoint's own
            when None.
        max_shard_bytes: size from which a new safetensors file is begun, in bytes.

    Raises:
        ValueError: here or from `run`; one line.
    """
    source = companion_directory(megatron, config_from)
    architecture = read_architecture(source)
    reader = MegatronReader(megatron)
    reader.check(architecture)
    shapes = architecture.hf_shapes()
    dtypes = {
        name: reader.whole(parameter, architecture).dtype
        for parameter in architecture.parameters()
        for name in parameter.sources()
    }
    nbytes = sum(torch.Size(shape).numel() * dtypes[name].itemsize for name, shape in shapes.items())

    def run(progress: Progress) -> None:
        with new_directory(hf, overwrite=overwrite, nbytes=nbytes) as partial:
            tensors = [(name, dtypes[name], shape) for name, shape in shapes.items()]
            with HfWriter(partial, tensors, max_shard_bytes) as writer:
                for parameter in architecture.parameters():
                    for index, name in enumerate(parameter.sources()):
                        for row, part in hf_parts(reader, parameter, architecture, index):
                            writer.write(name, part, row)
                            progress(part.nbytes)
                writer.finish()
            for path in companions(source):
                shutil.copyfile(path, partial / path.name)
            if config_from is not None:
                record_dtype(partial / "config.json", dtypes["model.embed_tokens.weight"])

    return Plan(nbytes, run)


def hf_parts(
    reader: MegatronReader, parameter: Parameter, architecture: Architecture, source: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, rows) of one Hugging Face tensor of a Megatron checkpoint, about STEP_BYTES at a time.

    Each part lies in the same memory: use it before the next.
    """
    whole = reader.whole(parameter, architecture)
    rows, *width = architecture.source_shapes(parameter.rule)[source]
    step = max(1, STEP_BYTES // (whole.dtype.itemsize * (width[0] if width else 1)))
    buffer = torch.empty((min(step, rows), *width), dtype=whole.dtype)
    for row in range(0, rows, step):
        part = buffer[: min(step, rows - row)]
        read_source_rows(parameter.rule, architecture, whole, source, row, part)
        yield row, part


class Difference(NamedTuple):
    """How one Hugging Face tensor of two checkpoints differs: the largest absolute difference."""

    name: str
    largest: float
    identical: bool


def tensor_bytes(hf: Path) -> int:
    """Bytes of all tensors of a Hugging Face checkpoint."""
    return sum(array.nbytes for array in HfReader(hf).arrays.values())


def parameter_differences(
    hf: Path, megatron: Path, progress: Progress, config_from: Path | None = None
) -> list[Difference]:
    """Compare every tensor of a Hugging Face and a Megatron checkpoint, largest difference first.

    Raises:
        ValueError: a checkpoint is damaged or they are of different architectures.
    """
    architecture = read_architecture(hf)
    if (config_from or (megatron / COMPANION_DIRECTORY)).is_dir():
        other = read_architecture(companion_directory(megatron, config_from))
        if other != architecture:
            raise ValueError(
                f"{hf} and {megatron} are of different architectures: {architecture} and {other}"
            )
    theirs, ours = HfReader(hf), MegatronReader(megatron)
    theirs.check(architecture)
    ours.check(architecture)
    differences = []
    for parameter in architecture.parameters():
        for index, name in enumerate(parameter.sources()):
            array, largest, identical = theirs.arrays[name], 0.0, True
            width = array.shape[1] if len(array.shape) == 2 else 0
            for row, part in hf_parts(ours, parameter, architecture, index):
                expected = torch.empty(part.shape, dtype=array.dtype)
                array.read_into(expected, Box(row, row + part.size(0), 0, width))
                if not _same_bits(part, expected):
                    identical = False
                    distance = (part.double() - expected.double()).abs().max()
                    largest = float("inf") if distance.isnan() else max(largest, float(distance))
                progress(part.nbytes)
            differences.append(Difference(name, largest, identical))
    return sorted(differences, key=lambda d: (-d.largest, d.identical))


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@dataclass(frozen=True)
class Description:
    """What `inspect` says of a checkpoint: rows of (label, text)."""

    rows: list[tuple[str, str]]


def describe(directory: Path, config_from: Path | None = None) -> Description:
    """Architecture, parameters, layout and dtype of either kind of checkpoint; no weights are read.

    Raises:
        ValueError: it is neither, or damaged.
    """
    if (directory / "metadata.json").is_file():
        reader = MegatronReader(directory)
        architecture = read_architecture(companion_directory(directory, config_from))
        reader.check(architecture)
        dtypes = {key: reader.dtypes[key] for key in reader.shapes}
        files, kind = reader.files, "Megatron distributed checkpoint (torch_dist)"
        stacked = "decoder.layers.self_attention.linear_qkv.weight" in reader.shapes
        recorded = read_common(directory).get("convert_hf")
        layout = f"{reader.num_chunks} chunks, {'layers stacked' if stacked else 'a tensor a layer'}"
        if isinstance(recorded, dict):
            sizes = (f"{k.split('_')[0]} {v}" for k, v in recorded.items() if k.endswith("_parallel_size"))
            layout = f"{', '.join(sizes)} ({layout}); loads in any other"
    else:
        architecture, hf = read_architecture(directory), HfReader(directory)
        hf.check(architecture)
        dtypes = {name: hf.arrays[name].dtype for name in architecture.hf_shapes()}
        files, kind = {a.path for a in hf.arrays.values()}, "Hugging Face checkpoint"
        layout = "whole tensors"
    shapes = architecture.hf_shapes()
    a = architecture
    size = f"{a.layers} layers, hidden {a.hidden}, {a.heads} heads of {a.head} ({a.kv_heads} key-value), "
    size += (
        f"{a.experts} experts of {a.expert_ffn}, {a.experts_per_token} a token"
        if a.experts
        else f"MLP {a.ffn}"
    )
    rope = f"{a.rope.kind}, base {a.rope.base:g}" + (
        f", factor {a.rope.factor:g}" if a.rope.factor != 1 else ""
    )
    names = sorted({str(dtype).removeprefix("torch.") for dtype in dtypes.values()})
    return Description(
        [
            ("checkpoint", str(directory)),
            ("kind", kind),
            ("architecture", a.name + (", tied embeddings" if a.tied else "")),
            ("size", size),
            ("vocabulary", f"{a.vocab} tokens"),
            ("rotary positions", rope),
            ("parameters", f"{sum(torch.Size(s).numel() for s in shapes.values()):,}"),
            ("tensors", f"{len(shapes)} by Hugging Face's names"),
            ("dtype", ", ".join(names)),
            ("layout", layout),
            ("files", f"{len(files)}, {sum(path.stat().st_size for path in files) / 1e9:.3f} GB"),
        ]
    )
