"""`--profile`: of chosen steps, a torch profiler trace of every rank and the timeline of its stages.

`<save>/profile/step-3-rank-0.json.gz` opens in Perfetto or chrome://tracing; `timeline-rank-0.jsonl` is what
the report draws. Profiled steps are slower: their times are no measurement of a run's speed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection
from pathlib import Path

import torch

from siren_megatron.metrics import StageTimer
from siren_megatron.report.timeline import PROFILE_DIRECTORY, timeline_path


class StepProfiler:
    """One rank's profiler.

    Args:
        save: the run's directory.
        steps: steps to profile, counted from 1.
        rank: of this process.
        timer: whose stages the timeline shows.
    """

    def __init__(self, save: Path, steps: Collection[int], rank: int, timer: StageTimer):
        self._directory, self._steps, self._rank, self._timer = save / PROFILE_DIRECTORY, steps, rank, timer
        self._profiler: torch.profiler.profile | None = None
        self._step = 0
        self._started = 0.0

    def begin(self, step: int) -> None:
        """Start, if `step` is one of those to profile."""
        if step not in self._steps:
            return
        self._step, self._started = step, time.time()
        self._timer.intervals.clear()
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=activities)
        self._profiler.start()

    def end(self) -> None:
        """Write what was profiled since `begin`, if anything was. Raises OSError."""
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        self._directory.mkdir(exist_ok=True)
        trace = self._directory / f"step-{self._step}-rank-{self._rank}.json.gz"
        profiler.export_chrome_trace(str(trace))
        line = {
            "step": self._step,
            "rank": self._rank,
            "started": self._started,
            "stages": list(self._timer.intervals),
        }
        with timeline_path(self._directory, self._rank).open("a") as file:
            file.write(json.dumps(line) + "\n")
