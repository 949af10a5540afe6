"""From the records of an experiment's runs to its results: CSV, tables with intervals, figures.

  python examples/experiments/countdown/analyse.py RESULTS [RESULTS ...]     # anew, from RESULTS/records

Legend: S = seeds, P = prompts.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[2]), str(HERE)]

from bootstrap import Interval, bootstrap  # noqa: E402
from figures import curves, pass_at_k, sensitivity  # noqa: E402
from matrix import BASELINE, GRID, METHODS, SENSITIVITY, SIREN  # noqa: E402
from record import MAJORITY_K, path_of, per_prompt  # noqa: E402

from siren_megatron.evaluation.results import write_text  # noqa: E402

LAST_STEPS = 10
"""The steps whose mean entropy the tables have."""


class Results:
    """The finished runs of an experiment.

    Args:
        directory: with `records/`.
        methods: names in the order of the tables; those without a record are left out.

    Attributes:
        seeds: method -> its seeds.
        records: method -> its runs' records, in the order of the seeds.
        values: method -> metric -> [S, P].
    """

    def __init__(self, directory: Path, methods: Sequence[str]):
        self.seeds: dict[str, list[int]] = {}
        for method in methods:
            paths = [
                path for path in directory.glob("records/*.json") if path.stem.startswith(f"{method}-seed")
            ]
            seeds = sorted(int(path.stem.removeprefix(f"{method}-seed")) for path in paths)
            if seeds:
                self.seeds[method] = seeds
        self.records: dict[str, list[dict[str, Any]]] = {
            method: [json.loads(path_of(directory, method, seed).read_text()) for seed in seeds]
            for method, seeds in self.seeds.items()
        }
        self.values: dict[str, dict[str, np.ndarray]] = {}
        for method, records in self.records.items():
            runs = [per_prompt(record) for record in records]
            self.values[method] = {name: np.stack([run[name] for run in runs]) for name in runs[0]}

    def difference(self, method: str, other: str, metric: str) -> np.ndarray | None:
        """method - other [S, P] on the seeds that both have; None without any."""
        common = [seed for seed in self.seeds[method] if seed in self.seeds.get(other, ())]
        if not common:
            return None
        first, second = (
            self.values[m][metric][[self.seeds[m].index(seed) for seed in common]] for m in (method, other)
        )
        return first - second

    def last(self, method: str, curve: str) -> float:
        """Mean of a curve over the last LAST_STEPS steps of all seeds."""
        runs = [
            [value for _, value in record["curves"][curve][-LAST_STEPS:]] for record in self.records[method]
        ]
        return float(np.mean(runs))


def analyse(directory: Path, methods: Sequence[str] = (*METHODS, *GRID)) -> list[Path]:
    """Write tables and figures into `directory` from its `records/`; nothing where there are none."""
    results = Results(directory, methods)
    if not results.seeds:
        return []
    return [
        write_text(directory / "results.csv", _csv(results)),
        write_text(directory / "results.md", _tables(results)),
        write_text(directory / "curves.svg", curves(results.records)),
        write_text(directory / "pass_at_k.svg", pass_at_k(results.values)),
        *(
            [write_text(directory / "sensitivity.svg", drawn)]
            if (drawn := sensitivity(results.values))
            else []
        ),
    ]


def _csv(results: Results) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "seed", "metric", "value"])
    for method, metrics in results.values.items():
        for name, array in metrics.items():
            for seed, row in zip(results.seeds[method], array, strict=True):
                writer.writerow([method, seed, name, f"{row.mean():.6g}"])
    return text.getvalue()


def _metrics(results: Results) -> list[str]:
    names = list(next(iter(results.values.values())))
    passes = [name for name in names if name.startswith("pass@")]
    shown = [passes[len(passes) // 2], passes[-1]] if len(passes) > 2 else passes
    return ["avg", f"maj@{MAJORITY_K}", "distinct correct", *shown]


def _tables(results: Results) -> str:
    names = _metrics(results)
    methods = [method for method in results.seeds if method not in GRID]
    head = ["method", "seeds", *names, "entropy", "masked entropy"]
    lines = ["## Estimates", "", row(head), rule(head)]
    for method in methods:
        entropies = [f"{results.last(method, name):.3f}" for name in ("entropy", "siren/entropy_masked")]
        cells = [show(bootstrap(results.values[method][name])) for name in names]
        lines.append(row([method, str(len(results.seeds[method])), *cells, *entropies]))
    lines += [
        "",
        "[low, high]: 95% bootstrap over prompts and seeds. Entropies in nats, mean of the last "
        f"{LAST_STEPS} steps.",
    ]
    for reference in (BASELINE, SIREN):
        if reference not in methods or len(methods) < 2:
            continue
        head = ["method", *names]
        lines += ["", f"## Difference to {reference}, paired by prompt and seed", "", row(head), rule(head)]
        for method in methods:
            differences = [results.difference(method, reference, name) for name in names]
            if method != reference and differences[0] is not None:
                lines.append(row([method, *(show_difference(d) for d in differences)]))
        lines += ["", "Bold: the interval does not hold 0."]
    return "\n".join([*lines, *_grid(results)]) + "\n"


def _grid(results: Results) -> list[str]:
    """SIREN over the two masks' options, as differences to the baseline."""
    lines = []
    names = _metrics(results)
    for (top_p, quantile), method in SENSITIVITY.items():
        if method not in results.seeds or results.difference(method, BASELINE, "avg") is None:
            continue
        cells = [show_difference(results.difference(method, BASELINE, name)) for name in names]
        entropy = f"{results.last(method, 'entropy'):.3f}"
        lines.append(row([f"{top_p:g}", f"{quantile:g}", str(len(results.seeds[method])), *cells, entropy]))
    if not any(method in results.seeds for method in GRID):
        return []
    head = ["top-p", "quantile", "seeds", *names, "entropy"]
    title = f"## Sensitivity of SIREN (coefficient 0.1): difference to {BASELINE}"
    return ["", title, "", row(head), rule(head), *lines]


def row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def rule(head: Sequence[str]) -> str:
    return "|---" * len(head) + "|"


def show(interval: Interval, signed: bool = False) -> str:
    sign = "+" if signed else ""
    return f"{interval.estimate:{sign}.3f} [{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]"


def show_difference(values: np.ndarray) -> str:
    interval = bootstrap(values)
    shown = show(interval, signed=True)
    return f"**{shown}**" if interval.low > 0 or interval.high < 0 else shown


def main(arguments: Sequence[str]) -> int:
    if not arguments or any(argument.startswith("-") for argument in arguments):
        print(__doc__, file=sys.stderr)
        return 0 if arguments and arguments[0] in ("-h", "--help") else 2
    for directory in map(Path, arguments):
        written = analyse(directory)
        if not written:
            print(f"analyse.py: error: {directory}/records holds no record of a run", file=sys.stderr)
            return 2
        print(*written, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
