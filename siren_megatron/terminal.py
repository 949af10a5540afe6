"""What a run shows on a terminal: a progress bar or plain lines while it trains, a summary at the end."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from siren_megatron.charts import format_seconds, format_value

# Metrics of the summary table and which end of their range is the good one (None: neither is).
SUMMARY_METRICS: dict[str, Callable[..., float] | None] = {
    "reward": max,
    "entropy": None,
    "entropy_top_p": None,
    "siren/entropy_masked": None,
    "kl_old_new": None,
    "grad_norm": None,
    "response_length": None,
    "rollout_logprob_diff": None,
    "tokens_per_second": max,
    "time/step": min,
}
LINE_METRICS = {
    "reward": "reward",
    "entropy": "entropy",
    "siren/entropy_masked": "masked",
    "grad_norm": "grad",
    "time/step": "step_s",
}
SUMMARY_WINDOW = 5  # steps whose mean is "first" and "last": one step of RL is mostly noise
ETA_WINDOW = 20  # steps; the first step of a run compiles and warms up, so it should leave the estimate


class StepDisplay:
    """The bar on a terminal, else one plain line a step; never both."""

    def __init__(self, num_steps: int, log_interval: int, console: Console | None) -> None:
        if console is None:
            console = Console()
            if not console.file.isatty():  # FORCE_COLOR makes rich call a file a terminal
                console = Console(force_interactive=False)
        self.console = console
        self.num_steps = num_steps
        self.log_interval = log_interval
        self.logged = 0
        self._ticks: deque[float] = deque([time.monotonic()], maxlen=ETA_WINDOW + 1)
        self._progress: Progress | None = None

    def _eta(self, step: int) -> float:
        self._ticks.append(time.monotonic())
        per_step = (self._ticks[-1] - self._ticks[0]) / (len(self._ticks) - 1)
        return per_step * max(self.num_steps - step, 0)

    def show(self, row: Mapping[str, Any]) -> None:
        self.logged += 1
        step, eta = row["step"], format_seconds(self._eta(row["step"]))
        fields = {label: format_value(row[name]) for name, label in LINE_METRICS.items() if name in row}
        if self.console.is_interactive:
            shown = "  ".join(
                f"{label} [bold]{fields[label]}[/]" for label in ("reward", "entropy") if label in fields
            )
            self._bar().update(self._task, completed=step, shown=shown, eta=eta)
            self._bar().refresh()
        elif self.logged == 1 or step % self.log_interval == 0 or step >= self.num_steps:
            fields |= {
                name: format_value(row[name]) for name in row if name.startswith("eval/") and "/avg@" in name
            }
            text = "  ".join(f"{label} {value:<8}" for label, value in fields.items())
            width = len(str(self.num_steps))
            self.console.print(
                f"step {step:>{width}}/{self.num_steps}  {text}  eta {eta}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )

    def _bar(self) -> Progress:
        if self._progress is None:
            self._progress = Progress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[shown]}"),
                TextColumn("[dim]eta {task.fields[eta]}[/]"),
                console=self.console,
                expand=True,
                auto_refresh=False,
            )
            self._task = self._progress.add_task("", total=self.num_steps, shown="", eta="")
            self._progress.start()
        return self._progress

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()


class CountProgress:
    """How far a count is: a bar with rate and time left on a terminal, a line now and then elsewhere.

    Goes to standard error. A context manager; call it with what was done since the last call.

    Args:
        label: what is counted, e.g. "responses".
        total: of the count.
        done: what an earlier run had done: it stays out of the rate.
    """

    LINE_SECONDS = 10.0

    def __init__(self, label: str, total: int, done: int = 0) -> None:
        self.label, self.total, self.done, self._before = label, total, done, done
        self._start = self._shown = time.monotonic()
        console = Console(stderr=True)
        self._bar = None
        if console.file.isatty():
            self._bar = Progress(
                TextColumn(f"{label} {{task.completed:.0f}}/{{task.total:.0f}}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[speed]}"),
                console=console,
                expand=True,
                transient=True,
            )
            self._task = self._bar.add_task("", total=total, completed=done, speed="")

    def __call__(self, count: int) -> None:
        self.done += count
        seconds = time.monotonic() - self._start
        rate = (self.done - self._before) / max(seconds, 1e-9)
        left = format_seconds((self.total - self.done) / rate) if rate > 0 else "?"
        speed = f"{format_value(rate)} {self.label}/s  eta {left}"
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, speed=speed)
        elif time.monotonic() - self._shown > self.LINE_SECONDS or self.done >= self.total:
            self._shown = time.monotonic()
            print(f"{self.label} {self.done}/{self.total}  {speed}", file=sys.stderr, flush=True)

    def __enter__(self) -> CountProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def print_summary(
    console: Console, rows: Sequence[Mapping[str, Any]], status: str, num_steps: int, paths: Mapping[str, str]
) -> None:
    """A table of the key metrics at the start and the end, their best value or range; and the run's paths.

    Args:
        console: where to print.
        rows: the run's rows, oldest first.
        status: as `MetricsLogger.close` takes it.
        num_steps: steps that the run was asked for.
        paths: label -> path.
    """
    last_step = rows[-1]["step"] if rows else 0
    title = f"{status}: step {last_step} of {num_steps}"
    table = Table()
    table.add_column("metric")
    window = SUMMARY_WINDOW if len(rows) >= 4 * SUMMARY_WINDOW else 1
    counted = f" {window}" if window > 1 else ""
    for heading in (f"first{counted}", f"last{counted}", "best, or range"):
        table.add_column(heading, justify="right")
    for name, best_of in SUMMARY_METRICS.items():
        points = [(row[name], row["step"]) for row in rows if name in row and math.isfinite(row[name])]
        if not points:
            continue
        values = [value for value, _ in points]
        if best_of is None:
            extent = f"{format_value(min(values))} to {format_value(max(values))}"
        else:
            best = best_of(values)
            extent = f"{format_value(best)} at step {next(step for value, step in points if value == best)}"
        ends = [sum(part) / len(part) for part in (values[:window], values[-window:])]
        table.add_row(name, *map(format_value, ends), extent)
    console.print(title, style="bold", markup=False, highlight=False, soft_wrap=True)
    if table.row_count:
        console.print(table)
    width = max(map(len, paths), default=0)
    for label, path in paths.items():
        console.print(f"{label:<{width}}  {path}", markup=False, highlight=False, soft_wrap=True)
