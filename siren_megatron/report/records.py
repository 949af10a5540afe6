"""Reads what a run has recorded for its report: run.json and tokens.jsonl."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RECORD_NAME = "tokens.jsonl"
RUN_NAME = "run.json"
TOP_TOKENS = 32  # of the vocabulary that are looked at; a nucleus of more is recorded without its size
MAX_BYTES = 5_000_000  # of a report's token records: a browser opens that at once
_PARTS = {"prompts": list, "positions": dict, "regularised": dict, "often": dict, "texts": list}
_STEP = re.compile(rb'\{"step":(\d+),')


def read_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, bytes]]:
    """(step, line with its newline) of a tokens.jsonl, oldest first.

    A last line without its newline (the writer was killed in mid-write) is left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line does not begin with its step; the message names file and line.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            found = _STEP.match(line)
            if found is None:
                raise ValueError(f"{path}:{number}: not a record of tokens")
            yield int(found[1]), line


def read_records(path: str | os.PathLike[str], max_bytes: int = MAX_BYTES) -> list[dict[str, Any]]:
    """Records of a tokens.jsonl, at most `max_bytes` of them: evenly chosen steps, first and last too.

    No file gives none. The very first record comes even where it alone is larger.

    Raises:
        ValueError: as `read_lines`, or a line is not JSON.
    """
    try:
        sizes = [len(line) for _, line in read_lines(path)]
    except FileNotFoundError:
        return []
    kept = thin_out(sizes, max_bytes)
    records = []
    for index, (_, line) in enumerate(read_lines(path)):
        if index in kept:
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}:{index + 1}: not a record of tokens: {error}") from error
            _check_parts(f"{path}:{index + 1}", record, _PARTS)
            records.append(record)
    return records


def _check_parts(where: str, found: dict[str, Any], parts: dict[str, type]) -> None:
    for name, kind in parts.items():
        if not isinstance(found.get(name), kind):
            raise ValueError(f"{where}: {name!r} is missing or no {kind.__name__}")


def thin_out(sizes: list[int], budget: int) -> set[int]:
    """Indices of evenly spread items whose sizes add up to at most `budget`: the last, and the first."""
    last = len(sizes) - 1
    for stride in range(1, max(last, 1) + 1):
        kept = {*range(0, last + 1, stride), *([last] if last >= 0 else [])}
        if sum(sizes[index] for index in kept) <= budget:
            return kept
    return {0}


def read_run(directory: Path) -> dict[str, Any]:
    """run.json of a run: "config", "num_steps", "status", "versions", "paths", "implementations".

    Empty without such a file.

    Raises:
        ValueError: it is not a JSON object with these; the message names the file.
    """
    path = directory / RUN_NAME
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(run, dict):
        raise ValueError(f"{path}: not a JSON object")
    _check_parts(str(path), run, {"config": dict, "num_steps": int, "status": str, "versions": dict})
    return run
