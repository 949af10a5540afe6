"""report.html of a run, and of several side by side: one file each that needs no network."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from siren_megatron.report.curves import build_sections
from siren_megatron.report.records import RECORD_NAME, RUN_NAME, read_records, read_run
from siren_megatron.report.run import render_report
from siren_megatron.report.timeline import read_timelines

__all__ = [
    "RECORD_NAME",
    "RUN_NAME",
    "build_sections",
    "read_records",
    "read_run",
    "read_timelines",
    "render_report",
    "write_report",
    "write_text",
]


def write_report(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]], **details: Any) -> Path:
    """Write `render_report(rows, **details)` to `path`, atomically; returns the path. Raises OSError."""
    return write_text(path, render_report(rows, **details))


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a page or a description to `path`, atomically; returns the path. Raises OSError."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    # A path that is no UTF-8 stands in the configuration as surrogates.
    temporary.write_text(text, encoding="utf-8", errors="replace")
    os.replace(temporary, path)
    return path
