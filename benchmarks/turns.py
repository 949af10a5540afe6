"""Processes that take turns: the driver lets one of them do a step at a time, the others wait.

Driver and side talk through two named pipes in a directory, because torchrun and vLLM use the standard ones:
"go" carries a line for each step, "done" a JSON object for each step done.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from process_memory import PeakMemory

START_LIMIT_S = 300.0
STEP_LIMIT_S = 300.0


class SideFailed(RuntimeError):
    """A side ended or did not answer in time."""


@dataclass(frozen=True)
class Turn:
    """One step of a side.

    Args:
        seconds: wall time between "go" and "done".
        peak_bytes: of the side's process tree; 0 where nobody looked.
        report: what the side says of the step: seconds by stage.
    """

    seconds: float
    peak_bytes: int
    report: dict[str, Any]


class Side:
    """The driver's end.

    Args:
        name: for messages.
        command: how to start the side; it gets the directory of the pipes as its last argument.
        directory: for pipes and log.
        environment: of the side.
    """

    def __init__(self, name: str, command: Sequence[str], directory: Path, environment: Mapping[str, str]):
        # SIGTERM ends the driver as Ctrl-C does, by way of what closes the sides.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        directory.mkdir(parents=True)
        for pipe in ("go", "done"):
            os.mkfifo(directory / pipe)
        # Both ends are held here, so that neither opening nor reading depends on the side's timing.
        self._go = os.open(directory / "go", os.O_RDWR)
        self._done = os.open(directory / "done", os.O_RDWR)
        self._rest = b""
        self.name, self._log = name, directory / "log.txt"
        started = time.perf_counter()
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [*command, str(directory)],
                env=dict(environment),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._read(START_LIMIT_S)
        except BaseException:
            self.close()
            raise
        self.start_seconds = time.perf_counter() - started

    def turn(self, *, memory: bool = False) -> Turn:
        """Let the side do one step.

        Args:
            memory: sample its memory meanwhile. That takes time from the step: seconds are of other turns.

        Raises:
            SideFailed: it ended, or took too long.
        """
        with PeakMemory(self._process.pid) if memory else contextlib.nullcontext() as watch:
            started = time.perf_counter()
            os.write(self._go, b"step\n")
            report = self._read(STEP_LIMIT_S)
            seconds = time.perf_counter() - started
        return Turn(seconds, watch.peak if watch else 0, report)

    def close(self) -> None:
        """End the side: it has a session of its own, and vLLM's server ends with its parent."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._go)
        os.close(self._done)

    def _end(self) -> str:
        """The last lines of the side's output."""
        return ":\n" + "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])

    def _read(self, limit_s: float) -> dict[str, Any]:
        deadline = time.monotonic() + limit_s
        while b"\n" not in self._rest:
            if select.select([self._done], [], [], 0.2)[0]:
                self._rest += os.read(self._done, 65536)
            elif self._process.poll() is not None:
                raise SideFailed(f"{self.name} ended with exit code {self._process.returncode}{self._end()}")
            elif time.monotonic() > deadline:
                raise SideFailed(f"{self.name} did not answer within {limit_s:.0f} s{self._end()}")
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)


class Turns:
    """The side's end.

    Args:
        directory: of the pipes.
    """

    def __init__(self, directory: Path):
        self._go = (directory / "go").open()
        self._done = (directory / "done").open("w")

    def wait(self, report: Mapping[str, Any]) -> None:
        """Say that the last step is done, and wait for the next. Ends the process with its driver."""
        self._done.write(json.dumps(dict(report)) + "\n")
        self._done.flush()
        if not self._go.readline():
            raise SystemExit(0)
