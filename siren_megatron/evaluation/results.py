"""What an evaluation says: metrics with intervals, their table on the terminal, and the files of them."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from siren_megatron.evaluation.diversity import NGRAM, distinct_ngrams
from siren_megatron.evaluation.graded import GradedProblem, mean
from siren_megatron.evaluation.passk import (
    MAX_MAJORITY_K,
    bootstrap_interval,
    ks_to_show,
    majority_at_k,
    pass_curve,
)

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over problems and its bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclass(frozen=True)
class Summary:
    """The metrics of one benchmark.

    Args:
        name: of the benchmark.
        num_problems: problems with at least one response.
        num_samples: responses of a problem; of the one with fewest where they differ.
        metrics: name -> estimate; pass@k for every k, maj@k for powers of two and all samples.
    """

    name: str
    num_problems: int
    num_samples: int
    metrics: dict[str, Estimate]


def summarise(name: str, graded: Sequence[GradedProblem], *, seed: int = 0) -> Summary:
    """The metrics of a benchmark; problems without responses are left out.

    Args:
        name: of the benchmark.
        graded: its problems.
        seed: of the bootstrap.
    """
    graded = [problem for problem in graded if problem.correct]
    if not graded:
        return Summary(name, 0, 0, {})
    n = min(len(problem.correct) for problem in graded)
    shown = ks_to_show(n)
    columns: dict[str, list[float]] = {f"avg@{n}": [mean(problem.correct) for problem in graded]}
    for k in shown:
        if k == n or k <= MAX_MAJORITY_K:
            columns[f"maj@{k}"] = [_majority(problem, k, n) for problem in graded]
    curves = [pass_curve(len(problem.correct), sum(problem.correct)) for problem in graded]
    for k in range(1, n + 1):
        columns[f"pass@{k}"] = [curve[k - 1] for curve in curves]
    columns["distinct answers"] = [problem.num_distinct for problem in graded]
    columns["distinct correct answers"] = [problem.num_distinct_correct for problem in graded]
    ngrams = [distinct_ngrams(problem.sample.responses) for problem in graded]
    columns[f"distinct {NGRAM}-grams"] = [value for value in ngrams if value is not None]
    if all(problem.sample.lengths is not None for problem in graded):
        columns["length (tokens)"] = [mean(problem.sample.lengths) for problem in graded]
    else:
        columns["length (characters)"] = [mean([len(r) for r in p.sample.responses]) for p in graded]
    if all(problem.sample.truncated is not None for problem in graded):
        columns["truncated"] = [mean(problem.sample.truncated) for problem in graded]
    columns["without answer"] = [mean([a is None for a in problem.answers]) for problem in graded]

    def estimate(values: Sequence[float]) -> Estimate:
        return Estimate(mean(values), *bootstrap_interval(values, seed=seed))

    metrics = {metric: estimate(values) for metric, values in columns.items() if values}
    return Summary(name, len(graded), n, metrics)


def _majority(problem: GradedProblem, k: int, n: int) -> float:
    total = len(problem.correct)
    if k == n and total > MAX_MAJORITY_K:
        k = total  # all of this problem's responses vote
    return majority_at_k(problem.clusters, k)


def main_metrics(summary: Summary) -> list[str]:
    """The metrics of the printed table: pass@k and maj@k of some k only."""
    n = summary.num_samples
    shown = {*(f"pass@{k}" for k in ks_to_show(n)), f"maj@{n}", f"avg@{n}"}
    return [m for m in summary.metrics if "@" not in m or m in shown]


def make_table(summaries: Sequence[Summary]) -> Table:
    """A row a metric, a column a benchmark; each value with its interval."""
    table = Table(caption=rf"\[low, high]: {CONFIDENCE:.0%} bootstrap interval over problems")
    table.add_column("metric")
    for summary in summaries:
        table.add_column(
            f"{summary.name}\n{summary.num_problems} problems x {summary.num_samples}", justify="right"
        )
    for metric in dict.fromkeys(m for summary in summaries for m in main_metrics(summary)):
        table.add_row(metric, *(str(s.metrics[metric]) if metric in s.metrics else "" for s in summaries))
    return table


def print_table(console: Console, summaries: Sequence[Summary]) -> None:
    """The table of the main metrics."""
    console.print(make_table(summaries))


def write_files(
    directory: Path, summaries: Sequence[Summary], settings: Mapping[str, Any], counts: Mapping[str, Any]
) -> list[Path]:
    """results.json (every metric), results.csv (the same, a row each) and results.md (the main ones).

    Args:
        directory: where to.
        summaries: of the benchmarks.
        settings: how the samples were made, and the versions of what made them.
        counts: what grading met: time-outs, errors.
    """
    benchmarks = {
        summary.name: {
            "num_problems": summary.num_problems,
            "num_samples": summary.num_samples,
            "metrics": {
                metric: {"value": e.value, "low": e.low, "high": e.high}
                for metric, e in summary.metrics.items()
            },
        }
        for summary in summaries
    }
    content = {"settings": settings, "confidence": CONFIDENCE, "grading": counts, "benchmarks": benchmarks}
    rows = io.StringIO()
    writer = csv.writer(rows, lineterminator="\n")
    writer.writerow(["benchmark", "problems", "samples", "metric", "value", "low", "high"])
    for s in summaries:
        for metric, e in s.metrics.items():
            writer.writerow([s.name, s.num_problems, s.num_samples, metric, e.value, e.low, e.high])
    texts = {
        "results.json": json.dumps(content, indent=2, allow_nan=False, default=str) + "\n",
        "results.csv": rows.getvalue(),
        "results.md": _markdown(summaries),
    }
    return [write_text(directory / name, text) for name, text in texts.items()]


def _markdown(summaries: Sequence[Summary]) -> str:
    names = [f"{s.name} ({s.num_problems} problems x {s.num_samples})" for s in summaries]
    lines = [f"| metric | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for metric in dict.fromkeys(m for summary in summaries for m in main_metrics(summary)):
        cells = [str(s.metrics[metric]) if metric in s.metrics else "" for s in summaries]
        lines.append(f"| {metric} | {' | '.join(cells)} |")
    lines += ["", f"[low, high]: {CONFIDENCE:.0%} bootstrap interval over problems."]
    return "\n".join(lines) + "\n"


def write_text(path: Path, text: str) -> Path:
    """Write a file under a temporary name, then rename it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    return path
