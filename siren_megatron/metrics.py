"""What a run reports while it runs: metrics.jsonl, the progress bar, TensorBoard, wandb, the summary.

One process of a job owns a `MetricsLogger`; the others log nothing. A row is one training step: `step` counts
from 1, `wall_time` is Unix seconds, everything else is a float under its metric name; `time/*` are seconds.

JSON has no NaN and no infinity: they are written as the strings "NaN", "Infinity" and "-Infinity" (as
protobuf's JSON mapping does), which Python's float() and `read_metrics` turn back into the number.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from siren_megatron.report import (
    RECORD_NAME,
    RUN_NAME,
    read_records,
    read_timelines,
    write_report,
    write_text,
)
from siren_megatron.terminal import StepDisplay, print_summary
from siren_megatron.versions import versions

REPORT_INTERVAL = 60.0  # seconds between two refreshes of report.html while the run goes on


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl, oldest first, with "NaN" and "Infinity" turned back into floats.

    A last line without its newline (the writer was killed in mid-write) is left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not a JSON object with an integer `step`; the message names file and line.
    """
    rows = []
    text = Path(path).read_text(encoding="utf-8")
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), start=1):
        try:
            row = json.loads(line)
            rows.append({"step": int(row.pop("step")), **{key: float(value) for key, value in row.items()}})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}:{number}: not a row of metrics: {error!r}") from error
    return rows


def _json_line(row: Mapping[str, float]) -> str:
    def safe(value: float) -> float | str:
        if math.isnan(value):
            return "NaN"
        return value if math.isfinite(value) else ("Infinity" if value > 0 else "-Infinity")

    return json.dumps({key: safe(value) for key, value in row.items()}, allow_nan=False) + "\n"


class StageTimer:
    """Wall-clock seconds of the named stages of a step.

        timer = StageTimer()
        with timer.stage("rollout"):
            ...
        metrics.update(timer.pop())  # {"time/rollout": 1.9, "time/step": 2.0}

    Args:
        synchronize: called before every reading of the clock (on CUDA `torch.cuda.synchronize`: kernels run
            behind the host, so without it a stage is charged for its predecessor's work).

    Attributes:
        intervals: (stage, start, end) of every stage since `pop`, in Unix seconds.
    """

    def __init__(self, synchronize: Callable[[], None] | None = None) -> None:
        self._synchronize = synchronize
        self._seconds: dict[str, float] = {}
        self.intervals: list[tuple[str, float, float]] = []
        self._step_start = self._now()

    def _now(self) -> float:
        if self._synchronize is not None:
            self._synchronize()
        return time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the seconds spent inside to `time/<name>`; a stage entered twice in a step is summed."""
        start, wall = self._now(), time.time()
        try:
            yield
        finally:
            self.add(name, self._now() - start, wall)

    def add(self, name: str, seconds: float, start: float | None = None) -> None:
        """Add what was measured elsewhere to `time/<name>`.

        Args:
            start: in Unix seconds; None keeps it out of `intervals`.
        """
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
        if start is not None:
            self.intervals.append((name, start, start + seconds))

    def pop(self) -> dict[str, float]:
        """`time/<stage>` of every stage and `time/step` since the last pop, in seconds; starts a new step."""
        now = self._now()
        times = {f"time/{name}": seconds for name, seconds in self._seconds.items()}
        times["time/step"] = now - self._step_start
        self._seconds, self._step_start = {}, now
        self.intervals.clear()
        return times


class MetricsLogger:
    """Writes every step's metrics to where people look for them.

    `<save_dir>/metrics.jsonl` (one JSON object a step, flushed), `run.json` (options, versions,
    implementations, status) and `report.html` always; a progress bar on a terminal, one plain line a step
    elsewhere; TensorBoard and wandb when asked for. As a context manager it closes itself, with the status
    "finished", "interrupted" or "failed: ...".

    Rows of an earlier run that are found in the file stay: a resumed run calls `truncate_after` first.

    Args:
        save_dir: the run's directory; made when missing.
        num_steps: steps of the whole run, those done before a resume included.
        tensorboard_dir: where event files go; None: no TensorBoard.
        wandb_project: wandb's project; None: no wandb.
        wandb_name: the run's display name; None: wandb invents one.
        wandb_mode: "online", "offline" or "disabled"; None: the WANDB_MODE variable, else wandb's default.
        config: the run's options, for the report and wandb.
        implementations: part -> what computes it, for run.json; printed at once, a line a part.
        log_interval: steps between two plain lines (the file and the bar get every step).
        console: where to print; None: standard output.

    Raises:
        ValueError: a library that was asked for is missing, wandb refuses to start,
            or metrics.jsonl is broken.
    """

    def __init__(
        self,
        save_dir: str | os.PathLike[str],
        num_steps: int,
        *,
        tensorboard_dir: str | os.PathLike[str] | None = None,
        wandb_project: str | None = None,
        wandb_name: str | None = None,
        wandb_mode: str | None = None,
        config: Mapping[str, Any] | None = None,
        implementations: Mapping[str, str] | None = None,
        log_interval: int = 1,
        console: Console | None = None,
    ) -> None:
        self.save_dir = Path(save_dir).absolute()
        self.save_dir.mkdir(parents=True, exist_ok=True)
        self.path = self.save_dir / "metrics.jsonl"
        self.report_path = self.save_dir / "report.html"
        self.num_steps = num_steps
        self.config = dict(config or {})
        self.rows: list[dict[str, Any]] = read_metrics(self.path) if self.path.exists() else []
        self._rewrite(self.rows)  # drops a torn last line, which the next append would otherwise join
        self._tensorboard_dir = Path(tensorboard_dir).absolute() if tensorboard_dir else None
        self._tensorboard = None
        if self._tensorboard_dir is not None:
            _require("tensorboard", "--tensorboard-dir")
        self._wandb = self._start_wandb(wandb_project, wandb_name, wandb_mode) if wandb_project else None
        self._versions = versions()
        self.implementations = dict(implementations or {})
        self._write_run("running")
        self._display = StepDisplay(num_steps, log_interval, console)
        self._last_report = time.monotonic()
        self._closed = False
        for part, name in self.implementations.items():
            self.print(f"{part:10} {name}")

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        temporary = self.path.with_suffix(".jsonl.tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(_json_line(row) for row in rows)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)

    def truncate_after(self, step: int) -> int:
        """Drop the rows later than `step`, the step of the loaded checkpoint; atomic. Returns how many went.

        TensorBoard forgets them too; wandb keeps them and draws the new ones over them.
        Raises RuntimeError once a step has been logged.
        """
        if self._display.logged:
            raise RuntimeError("truncate_after comes before the first log of a process")
        kept = [row for row in self.rows if row["step"] <= step]
        dropped = len(self.rows) - len(kept)
        if dropped:
            self._file.close()
            self._rewrite(kept)
            self.rows = kept
        return dropped

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Record one step.

        Args:
            step: steps done, this one included: 1 is the first; greater than that of every row before.
            metrics: name -> number (Python, NumPy, or a tensor with one element; NaN and infinities pass);
                None is left out: not measured in this step.

        Raises:
            ValueError: `step` does not grow (on resume: `truncate_after` was forgotten).
            TypeError: a value is not a number, or a name is one of the logger's own (step, wall_time).
        """
        if self.rows and step <= self.rows[-1]["step"]:
            raise ValueError(f"{self.path} already has step {self.rows[-1]['step']}: cannot log step {step}")
        values = {name: float(value) for name, value in metrics.items() if value is not None}
        if reserved := values.keys() & {"step", "wall_time"}:
            raise TypeError(f"metrics named {sorted(reserved)}: the logger writes these itself")
        row = {"step": int(step), **values, "wall_time": time.time()}
        self._file.write(_json_line(row))
        self._file.flush()
        if self._tensorboard_dir is not None:
            self._log_tensorboard(step, values)
        if self._wandb is not None:
            self._wandb.log({"step": step, **values})
        self.rows.append(row)
        self._display.show(row)
        if time.monotonic() - self._last_report > REPORT_INTERVAL:
            self.write_report("running")

    def print(self, message: str) -> None:
        """Print a line of text (no markup) above the progress bar, if there is one."""
        self._display.console.print(message, markup=False, highlight=False, soft_wrap=True)

    def write_report(self, status: str) -> Path:
        """Write report.html from the rows so far, atomically; returns its path."""
        self._last_report = time.monotonic()
        return write_report(
            self.report_path,
            self.rows,
            config=self.config,
            status=status,
            paths=self.paths,
            num_steps=self.num_steps,
            records=read_records(self.save_dir / RECORD_NAME),
            timelines=read_timelines(self.save_dir),
            found_versions=self._versions,
        )

    def _write_run(self, status: str) -> None:
        """run.json, from which tools/report.py draws the report anew, or several runs in one."""
        run = {
            "status": status,
            "num_steps": self.num_steps,
            "config": self.config,
            "versions": self._versions,
            "implementations": self.implementations,
            "paths": self.paths,
        }
        write_text(self.save_dir / RUN_NAME, json.dumps(run, indent=1, default=str) + "\n")

    @property
    def paths(self) -> dict[str, str]:
        """What the run has written: label -> absolute path."""
        paths = {"run": self.save_dir, "metrics": self.path, "report": self.report_path}
        if self._tensorboard_dir is not None:
            paths["tensorboard"] = self._tensorboard_dir
        if self._wandb is not None:
            paths["wandb"] = Path(self._wandb.dir).parent
        return {label: str(path) for label, path in paths.items()}

    def close(self, status: str = "finished") -> None:
        """End the bar, write report.html, print the summary, close every sink. A second call does nothing.

        Args:
            status: "finished", "interrupted" or "failed: why", as the report and the table show it.
        """
        if self._closed:
            return
        self._closed = True
        self._display.stop()
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        paths = self.paths
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if status == "finished" else 1)
        self._write_run(status)
        self.write_report(status)
        print_summary(self._display.console, self.rows, status, self.num_steps, paths)

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if kind is None:
            self.close("finished")
        elif issubclass(kind, KeyboardInterrupt):
            self.close("interrupted")
        else:
            # A full disk may be why the run failed: that it has no room for the report either adds nothing.
            with suppress(OSError):
                self.close(f"failed: {kind.__name__}: {error}".splitlines()[0])

    def _log_tensorboard(self, step: int, values: Mapping[str, float]) -> None:
        if self._tensorboard is None:  # late, because purge_step must know what truncate_after left
            from torch.utils.tensorboard import SummaryWriter

            purge = self.rows[-1]["step"] + 1 if self.rows else None
            self._tensorboard = SummaryWriter(str(self._tensorboard_dir), purge_step=purge)
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)
        self._tensorboard.flush()

    def _start_wandb(self, project: str, name: str | None, mode: str | None) -> Any:
        wandb = _require("wandb", "--wandb-project")
        id_file = self.save_dir / "wandb_id"  # a resumed run continues the same wandb run
        run_id = id_file.read_text(encoding="utf-8").strip() if id_file.exists() else None
        try:
            run = wandb.init(
                project=project,
                name=name,
                id=run_id,
                resume="allow" if run_id else None,
                mode=mode,
                dir=str(self.save_dir),
                config=json.loads(json.dumps(self.config, default=str)),
                settings=wandb.Settings(console="off", quiet=True),  # its capture of stdout fights the bar
            )
        except wandb.Error as error:
            raise ValueError(f"--wandb-project {project}: wandb did not start: {error}") from error
        id_file.write_text(run.id + "\n", encoding="utf-8")
        # Our own x axis: wandb's counter refuses to go back to the step of a checkpoint.
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run


def _require(module: str, flag: str) -> Any:
    try:
        return __import__(module)
    except ImportError as error:
        raise ValueError(f"{flag} needs the Python package {module}: {error}") from error
