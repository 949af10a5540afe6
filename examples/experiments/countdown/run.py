#!/usr/bin/env python3
"""Train and evaluate every method of the comparison on a toy task, then write tables and figures.

  python examples/experiments/countdown/run.py --setting quick     # 3 methods x 2 seeds: about 10 minutes
  python examples/experiments/countdown/run.py --setting full      # 16 methods x 5 seeds and a grid: hours
  python examples/experiments/countdown/run.py --setting main --task rewrite      # the second task: hours

One command, to be repeated after an interruption: finished runs are kept (each has a record in the results),
an unfinished one goes on from its newest checkpoint. Each run is `pretrain_siren.py` on one rank with its own
vLLM server; `--jobs` of them go side by side. Runs and logs lie under --output, records and tables under
--results.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[2]), str(HERE)]

from experiment import REPOSITORY, Experiment, new_parser  # noqa: E402
from matrix import GRID, METHODS, TRAINING, Setting  # noqa: E402
from record import path_of, write_record  # noqa: E402

from siren_megatron.evaluation.results import write_text  # noqa: E402
from siren_megatron.metrics import read_metrics  # noqa: E402


@dataclass(frozen=True)
class Cell:
    """One run: a method's name, its options and a seed."""

    name: str
    options: tuple[str, ...]
    seed: int


def cells(setting: Setting, only: Sequence[str] | None) -> list[Cell]:
    """The runs of a setting, seed by seed, so that an unfinished experiment has whole comparisons."""
    seeds = range(1, setting.seeds + 1)
    found = [Cell(name, METHODS[name], seed) for seed in seeds for name in setting.methods]
    found += [Cell(n, options, seed) for seed in seeds[: setting.grid_seeds] for n, options in GRID.items()]
    return [cell for cell in found if only is None or cell.name in only]


class Runner:
    """Runs cells as child processes, and ends those that still run when it is closed."""

    def __init__(self, experiment: Experiment):
        self.experiment = experiment
        self.children: set[subprocess.Popen] = set()
        self.lock, self.closed = threading.Lock(), False

    def run(self, cell: Cell) -> None:
        """Train and evaluate one cell; nothing is done twice.

        Raises:
            RuntimeError: a step failed; the message names its log.
        """
        directory = self.experiment.run(cell.name, cell.seed)
        directory.mkdir(parents=True, exist_ok=True)
        train = directory / "train"
        if not (train / "hf" / "config.json").exists():
            self._call(self._training(cell, train), directory / "train.log")
        if not (train / "hf" / "config.json").exists():
            raise RuntimeError(f"stopped before its end, see {directory / 'train.log'}")
        rows = read_metrics(train / "metrics.jsonl")
        if lost := sum(row["reward_timeouts"] + row["reward_errors"] for row in rows):
            raise RuntimeError(f"{lost} rewards were lost, see {directory / 'train.log'}")
        write_record(
            path_of(self.experiment.results, cell.name, cell.seed),
            graded=next((train / "eval_last").glob("*_graded.jsonl")),
            metrics=train / "metrics.jsonl",
            about={
                "method": cell.name,
                "seed": cell.seed,
                "task": self.experiment.task,
                "options": cell.options,
            },
        )
        shutil.rmtree(train / "checkpoints", ignore_errors=True)  # hf/ holds the policy

    def _training(self, cell: Cell, train: Path) -> list[str]:
        experiment, setting = self.experiment, self.experiment.setting
        start, held_out = experiment.checkpoint, experiment.prompts("eval", setting.eval_prompts)
        curve = experiment.prompts("curve", setting.curve_prompts)
        command = [
            *(sys.executable, str(REPOSITORY / "pretrain_siren.py"), "--hf-checkpoint", str(start)),
            *("--prompt-data", str(start / "prompts" / "train.jsonl"), "--reward", experiment.task),
            *("--seed", str(cell.seed)),
            *("--num-steps", str(setting.steps), "--save", str(train), "--save-interval", "40"),
            *("--save-total-limit", "1", *TRAINING, *cell.options),
            *("--eval-data", str(curve), "--eval-interval", str(setting.curve_interval)),
            *("--eval-num-samples", str(setting.curve_samples), "--eval-temperature", "1"),
            *("--eval-top-p", "1", "--eval-last-data", str(held_out)),
            *("--eval-last-num-samples", str(setting.eval_samples)),
        ]
        if (train / "checkpoints" / "latest").exists():
            return [*command, "--load", str(train)]
        return [*command, "--overwrite"]

    def _call(self, command: list[str], log: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with open(log, "ab") as file:
            with self.lock:
                if self.closed:
                    raise RuntimeError("interrupted")
                child = subprocess.Popen(
                    command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
                )
                self.children.add(child)
            code = child.wait()
            self.children.discard(child)
        if code:
            raise RuntimeError(f"exit code {code}, see {log}")

    def close(self) -> None:
        """End the children: SIGTERM lets a run save, SIGKILL comes a minute later."""
        with self.lock:
            self.closed = True
            running = list(self.children)
        for child in running:
            os.killpg(child.pid, signal.SIGTERM)
        for child in running:
            try:
                child.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)


def prepare(experiment: Experiment) -> None:
    """The toy checkpoint, and its held-out prompts cut to the setting's sizes."""
    tool, setting = REPOSITORY / "tools" / "make_toy_checkpoint.py", experiment.setting
    command = [sys.executable, str(tool), experiment.task, "--output", str(experiment.checkpoint)]
    subprocess.run(command, check=True)
    held_out = experiment.checkpoint / "prompts" / "eval.jsonl"
    lines = held_out.read_text().splitlines(keepends=True)
    for kind, count in (("eval", setting.eval_prompts), ("curve", setting.curve_prompts)):
        write_text(experiment.prompts(kind, count), "".join(lines[:count]))


def main(argv: Sequence[str] | None = None) -> int:
    parser = new_parser(__doc__)
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="only these methods")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side; default: %(default)s")
    args = parser.parse_args(argv)
    experiment = Experiment.of(args)
    setting, results = experiment.setting, experiment.results
    known = {cell.name for cell in cells(setting, None)}
    if unknown := sorted(set(args.only or ()) - known):
        parser.error(
            f"--only: {', '.join(unknown)} not in setting {args.setting}: {', '.join(sorted(known))}"
        )
    if args.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {args.jobs}")
    prepare(experiment)
    todo = cells(setting, args.only)
    left = [cell for cell in todo if not path_of(results, cell.name, cell.seed).exists()]
    print(
        f"{len(todo)} runs, {len(todo) - len(left)} finished before; runs and logs: {experiment.output}, "
        f"results: {results}",
        flush=True,
    )
    # Also where a shell started this in the background and has SIGINT ignored.
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.default_int_handler)
    try:
        failed = run_all(Runner(experiment), left, args.jobs)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    from analyse import analyse

    names = dict.fromkeys(cell.name for cell in cells(setting, None))
    for path in analyse(results, list(names)):
        print(path)
    return 1 if failed else 0


def run_all(runner: Runner, todo: Sequence[Cell], jobs: int) -> int:
    """Run the cells, a line for each that ends. Returns how many failed."""
    start, failed = time.monotonic(), 0
    pool = ThreadPoolExecutor(jobs)
    futures = {pool.submit(runner.run, cell): cell for cell in todo}
    try:
        for done, future in enumerate(as_completed(futures), 1):
            cell, error = futures[future], future.exception()
            failed += error is not None
            elapsed = time.monotonic() - start
            left = elapsed / done * (len(todo) - done)
            state = f"FAILED: {error}" if error else "done"
            print(
                f"[{done}/{len(todo)}] {cell.name} seed {cell.seed}: {state}; "
                f"{elapsed / 60:.1f} min, about {left / 60:.0f} min left",
                flush=True,
            )
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        runner.close()
    return failed


if __name__ == "__main__":
    sys.exit(main())
