"""How far a conversion is: a bar with GB/s on a terminal, plain lines elsewhere. 1 GB is 10^9 bytes."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

LINE_SECONDS = 5.0


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(_rate(task.completed, task.elapsed or 0.0))


def _rate(nbytes: float, seconds: float) -> str:
    return f"{nbytes / 1e9:.2f} GB, {nbytes / 1e9 / seconds if seconds > 0 else 0:.2f} GB/s"


class ByteProgress:
    """Counts bytes and shows them on standard error. A context manager.

    Args:
        label: what is being done.
        total: bytes in all.
    """

    def __init__(self, label: str, total: int):
        self.label, self.total, self.done = label, total, 0
        self._start = self._shown = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn(label),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                _Speed(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task("", total=total)

    def __call__(self, nbytes: int) -> None:
        self.done += nbytes
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done)
        elif time.monotonic() - self._shown >= LINE_SECONDS:
            self._shown = time.monotonic()
            share = 100 * self.done / max(1, self.total)
            print(f"{self.label}: {share:.0f}%, {self.summary()}", file=sys.stderr, flush=True)

    def summary(self) -> str:
        """Bytes and speed so far."""
        return _rate(self.done, time.monotonic() - self._start)

    def __enter__(self) -> ByteProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exc) -> None:
        if self._bar is not None:
            self._bar.stop()
