"""The files of a run's checkpoints: which there are, in which order to try them, whether one is whole.

    checkpoints/
      latest                  name of the newest checkpoint
      step_000020/            manifest.json, common.pt, metadata.json, .metadata, __<rank>_<n>.distcp
      step_000030.partial/    being written; or left by a run that was killed while it saved

Standard library only.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

MANIFEST, POINTER, PARTIAL = "manifest.json", "latest", ".partial"
_NAME = re.compile(r"step_(\d{6,12})")
_BLOCK = 4 * 2**20


def step_name(step: int) -> str:
    """The name of the checkpoint after so many steps."""
    return f"step_{step:06d}"


def step_of(path: Path) -> int | None:
    """The step of a finished checkpoint's directory, None for anything else."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match and path.is_dir() else None


def finished(directory: Path) -> list[Path]:
    """The finished checkpoints, newest step first; an empty list where there is no such directory."""
    if not directory.is_dir():
        return []
    steps = {path: step_of(path) for path in directory.iterdir()}
    return sorted((path for path, step in steps.items() if step is not None), key=step_of, reverse=True)


def candidates(directory: Path) -> list[Path]:
    """The finished checkpoints in the order to try them: what `latest` names, those before it, those after.

    Without `latest`, or where it names nothing, the newest comes first.
    """
    paths = finished(directory)
    try:
        name = (directory / POINTER).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        name = ""
    start = next((i for i, path in enumerate(paths) if path.name == name), 0)
    return paths[start:] + paths[:start]


# ---------------------------------------------------------------- contents


def describe_file(path: Path, *, sync: bool = False) -> dict[str, Any]:
    """{"bytes", "crc32"} of a file, read in blocks; with `sync` it is on the disk afterwards."""
    size = crc = 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            size, crc = size + len(block), zlib.crc32(block, crc)
        if sync:
            os.fsync(file.fileno())
    return {"bytes": size, "crc32": f"{crc:08x}"}


def check_file(path: Path, entry: Mapping[str, Any]) -> None:
    """See that a file is as its manifest's entry says.

    Raises:
        ValueError: it is missing, unreadable, of another size, or its bytes have changed.
    """
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise ValueError(f"{path} has {size} bytes and should have {entry['bytes']}")
        if describe_file(path)["crc32"] != entry["crc32"]:
            raise ValueError(f"{path} is damaged: its bytes are not those that were written")
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def write_manifest(checkpoint: Path, content: Mapping[str, Any]) -> None:
    """Write `manifest.json`: "step", "versions", "layout" and "files" (name -> `describe_file`)."""
    with open(checkpoint / MANIFEST, "w", encoding="utf-8") as file:
        json.dump({"format": 1, **content}, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """What `write_manifest` wrote, checked.

    Raises:
        ValueError: the file is missing, damaged, or of a later format; the line names it.
    """
    path = checkpoint / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is damaged: it is not valid JSON") from None
    if not isinstance(content, dict) or not _is_manifest(content):
        raise ValueError(f"{path} is damaged: it is no manifest of a checkpoint")
    if content["format"] != 1:
        raise ValueError(f"{path} has format {content['format']}; this version reads format 1")
    return content


def version_differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What has another version now, as "torch 2.12.0 (now 2.13.0)"; the git commit does not count."""
    return [
        f"{name} {before.get(name, 'absent')} (now {now.get(name, 'absent')})"
        for name in {**before, **now}
        if name != "git commit" and before.get(name) != now.get(name)
    ]


def _is_manifest(content: dict[str, Any]) -> bool:
    files = content.get("files")
    return (
        all(type(content.get(name)) is int for name in ("format", "step"))
        and all(_is_table(content.get(name), (str,)) for name in ("versions",))
        and _is_table(content.get("layout"), (str, int))
        and isinstance(files, dict)
        and all(_is_plain_name(name) and _is_entry(entry) for name, entry in files.items())
    )


def _is_table(value: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, dict) and all(isinstance(v, kinds) for v in value.values())


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and type(entry.get("bytes")) is int and isinstance(entry.get("crc32"), str)


def _is_plain_name(name: str) -> bool:
    """Whether a name stays in its directory."""
    return name not in ("", ".", "..") and "/" not in name and "\0" not in name


# ---------------------------------------------------------------- writing


def begin(directory: Path, step: int) -> Path:
    """Make the directory to write a checkpoint into; what killed runs left half-written goes."""
    directory.mkdir(parents=True, exist_ok=True)
    for path in directory.glob(f"*{PARTIAL}"):
        remove(path)
    unfinished = directory / (step_name(step) + PARTIAL)
    unfinished.mkdir()
    return unfinished


def publish(unfinished: Path) -> Path:
    """Give a complete checkpoint its name and make `latest` name it; each is one rename.

    The checkpoint of the same step that an earlier run left is replaced.
    """
    final = unfinished.with_name(unfinished.name.removesuffix(PARTIAL))
    pointer = final.with_name(POINTER + PARTIAL)
    # First whatever needs room on the disk, then renames.
    with open(pointer, "w", encoding="utf-8") as file:
        file.write(final.name + "\n")
        file.flush()
        os.fsync(file.fileno())
    _sync_directory(unfinished)
    replaced = final.with_name(final.name + ".replaced" + PARTIAL)
    if final.exists():
        final.rename(replaced)
    unfinished.rename(final)
    pointer.rename(final.with_name(POINTER))
    _sync_directory(final.parent)
    remove(replaced)
    return final


def delete_old(saved: Path, limit: int) -> list[Path]:
    """Keep the newest `limit` finished checkpoints beside `saved`, the one just written; 0 keeps all.

    Those of later steps than `saved` go first: the run was taken back to before them. A checkpoint loses its
    name before its files, so that a run killed here leaves no checkpoint with holes.

    Returns:
        What was deleted.
    """
    others = [path for path in finished(saved.parent) if path != saved]
    others.sort(key=lambda path: (step_of(path) < step_of(saved), step_of(path)), reverse=True)
    old = others[limit - 1 :] if limit else []
    for path in old:
        unnamed = path.with_name(path.name + PARTIAL)
        path.rename(unnamed)
        remove(unnamed)
    return old


def remove(path: Path) -> None:
    """Delete a file or a directory with all in it; nothing happens where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def disk_is_full(directory: Path) -> bool:
    """Whether there is next to no room: torch's writer says "iostream error" of a full disk."""
    try:
        return shutil.disk_usage(directory).free < 2**20
    except OSError:
        return False


def one_line(error: BaseException, directory: Path) -> str:
    """What went wrong while writing: the system's own word where there is one behind the error."""
    chain: Iterable[BaseException] = _chain(error)
    for link in chain:
        if isinstance(link, OSError) and link.strerror:
            return link.strerror
    if disk_is_full(directory):
        return "No space left on device"
    text = " ".join(str(error).split())
    return text or type(error).__name__


def _chain(error: BaseException | None) -> list[BaseException]:
    links: list[BaseException] = []
    while error is not None and error not in links:
        links.append(error)
        error = error.__cause__ or error.__context__
    return links
