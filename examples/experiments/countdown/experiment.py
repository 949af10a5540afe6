"""Which experiment a script is about: the options that they share, and where its files lie."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from matrix import SETTINGS, TASKS, Setting

REPOSITORY = Path(__file__).resolve().parents[3]


def new_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the shared options."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--setting", choices=SETTINGS, default="quick", help="default: %(default)s")
    parser.add_argument("--task", choices=TASKS, default=TASKS[0], help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="runs; default: runs/experiments/TASK-SETTING")
    parser.add_argument("--results", type=Path, help="records, tables; default: OUTPUT/results")
    parser.add_argument("--checkpoint", type=Path, help="to start from; default: runs/toy-TASK")
    return parser


@dataclass(frozen=True)
class Experiment:
    """An experiment's task, size and places.

    Args:
        task: name of the task.
        setting: how large it is.
        checkpoint: the toy checkpoint that every run starts from, with its prompts.
        output: the runs and their logs.
        results: records, tables and figures.
    """

    task: str
    setting: Setting
    checkpoint: Path
    output: Path
    results: Path

    @classmethod
    def of(cls, args: argparse.Namespace) -> Experiment:
        output = args.output or REPOSITORY / "runs" / "experiments" / f"{args.task}-{args.setting}"
        checkpoint = args.checkpoint or REPOSITORY / "runs" / f"toy-{args.task}"
        return cls(args.task, SETTINGS[args.setting], checkpoint, output, args.results or output / "results")

    def prompts(self, kind: str, count: int) -> Path:
        """The first `count` held-out prompts; kind: "eval" for the end, "curve" for the training."""
        return self.checkpoint / "prompts" / f"{kind}-{count}.jsonl"

    def run(self, method: str, seed: int) -> Path:
        """A run's directory; its training lies in `train/`, its policy in `train/hf/`."""
        return self.output / "runs" / method / f"seed{seed}"
