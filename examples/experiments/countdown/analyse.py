"""From the runs of the experiment to `results/`: CSV, tables with intervals, figures. Reads files only.

Legend: S = seeds, P = prompts, n = responses to a prompt.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from bootstrap import Interval, bootstrap
from matrix import BASELINE, QUANTILE_GRID, TOP_P_GRID

from siren_megatron.charts import Chart, Series, figure
from siren_megatron.evaluation.passk import ks_to_show, majority_at_k, pass_at_k
from siren_megatron.evaluation.results import write_text
from siren_megatron.metrics import read_metrics

MAJORITY_K = 32
CURVES = {
    "entropy": "Entropy (nats)",
    "siren/entropy_masked": "Masked entropy (nats)",
    "reward": "Mean reward",
}
MAIN = ("grpo", "naive-0.05", "clip-cov", "entropy-constraint", "siren-0.1")
"""The methods of the figures; the tables have all."""


def per_prompt(graded: Path) -> dict[str, np.ndarray]:
    """Metric -> one number a prompt [P], from an evaluation's graded responses.

    avg is the share of right responses, maj the expected vote of MAJORITY_K of them (of all, where there are
    fewer), pass@k Chen et al.'s estimator.
    """
    columns: dict[str, list[float]] = {}
    for line in graded.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        correct, n = row["correct"], len(row["correct"])
        sizes: dict[int, list[bool]] = {}
        for group, right in zip(row["groups"], correct, strict=True):
            sizes.setdefault(group, []).append(right)
        clusters = [(len(verdicts), verdicts[0]) for verdicts in sizes.values()]
        values = {"avg": sum(correct) / n, f"maj@{MAJORITY_K}": majority_at_k(clusters, min(n, MAJORITY_K))}
        values |= {f"pass@{k}": pass_at_k(n, sum(correct), k) for k in ks_to_show(n)[1:]}
        values["distinct correct"] = len(
            {g for g, right in zip(row["groups"], correct, strict=True) if right}
        )
        for name, value in values.items():
            columns.setdefault(name, []).append(value)
    return {name: np.array(values) for name, values in columns.items()}


def collect(output: Path, finished: Mapping[str, Sequence[int]]) -> dict[str, dict[str, np.ndarray]]:
    """method -> metric -> [S, P], the methods and seeds in `finished`."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for method, seeds in finished.items():
        runs = []
        for seed in seeds:
            directory = output / "runs" / method / f"seed{seed}" / "eval"
            runs.append(per_prompt(next(directory.glob("*_graded.jsonl"))))
        found[method] = {name: np.stack([run[name] for run in runs]) for name in runs[0]}
    return found


def analyse(output: Path, finished: Mapping[str, Sequence[int]]) -> list[Path]:
    """Write `<output>/results/`.

    Args:
        output: of the experiment.
        finished: method -> the seeds whose runs are done.

    Returns:
        The files; none where nothing is finished.
    """
    finished = {method: sorted(seeds) for method, seeds in finished.items() if seeds}
    if not finished:
        return []
    values = collect(output, finished)
    results = output / "results"
    results.mkdir(parents=True, exist_ok=True)
    written = [
        write_text(results / "results.csv", _csv(values, finished)),
        write_text(results / "results.md", _tables(values, finished, output)),
        write_text(results / "curves.svg", _curves(output, finished)),
        write_text(results / "pass_at_k.svg", figure([_pass_chart(values)], columns=1)),
    ]
    if sensitivity := _sensitivity(values):
        written.append(write_text(results / "sensitivity.md", "\n".join(sensitivity) + "\n"))
    return written


def _csv(values: Mapping[str, Mapping[str, np.ndarray]], finished: Mapping[str, Sequence[int]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "seed", "metric", "value"])
    for method, metrics in values.items():
        for name, array in metrics.items():
            for seed, row in zip(finished[method], array, strict=True):
                writer.writerow([method, seed, name, f"{row.mean():.6g}"])
    return text.getvalue()


def _last_entropies(output: Path, method: str, seeds: Sequence[int]) -> tuple[float, float]:
    """Mean entropy and masked entropy of the runs' last 10 steps, in nats."""
    rows = [read_metrics(_metrics(output, method, seed))[-10:] for seed in seeds]
    flat = [row for run in rows for row in run]
    return tuple(float(np.mean([row[name] for row in flat])) for name in ("entropy", "siren/entropy_masked"))


def _tables(
    values: Mapping[str, Mapping[str, np.ndarray]], finished: Mapping[str, Sequence[int]], output: Path
) -> str:
    names = [n for n in next(iter(values.values())) if n in ("avg", f"maj@{MAJORITY_K}", "distinct correct")]
    passes = [n for n in next(iter(values.values())) if n.startswith("pass@")]
    names += [passes[len(passes) // 2], passes[-1]] if len(passes) > 2 else passes
    head = ["method", "seeds", *names, "entropy", "masked entropy"]
    lines = ["## Estimates", "", _row(head), "|---" * len(head) + "|"]
    for method, metrics in values.items():
        entropies = [f"{value:.3f}" for value in _last_entropies(output, method, finished[method])]
        cells = [_show(bootstrap(metrics[name])) for name in names]
        lines.append(_row([method, str(len(finished[method])), *cells, *entropies]))
    lines += [
        "",
        "[low, high]: 95% bootstrap over prompts and seeds. Entropies: mean of the last 10 steps, nats.",
    ]
    if BASELINE in values:
        lines += ["", f"## Difference to {BASELINE}, paired by prompt and seed", "", _row(["method", *names])]
        lines.append("|---" * (1 + len(names)) + "|")
        for method, metrics in values.items():
            common = [s for s in finished[method] if s in finished[BASELINE]]
            if method == BASELINE or not common:
                continue
            cells = []
            for name in names:
                ours = metrics[name][[finished[method].index(s) for s in common]]
                base = values[BASELINE][name][[finished[BASELINE].index(s) for s in common]]
                difference = bootstrap(ours - base)
                clear = difference.low > 0 or difference.high < 0
                cells.append(
                    f"**{_show(difference, signed=True)}**" if clear else _show(difference, signed=True)
                )
            lines.append(_row([method, *cells]))
        lines += ["", "Bold: the interval does not hold 0."]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _show(interval: Interval, signed: bool = False) -> str:
    sign = "+" if signed else ""
    return f"{interval.estimate:{sign}.3f} [{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]"


def _metrics(output: Path, method: str, seed: int) -> Path:
    return output / "runs" / method / f"seed{seed}" / "train" / "metrics.jsonl"


def _curves(output: Path, finished: Mapping[str, Sequence[int]]) -> str:
    """Means over seeds: entropies and reward at every step, the evaluations where they were made."""
    runs = {
        method: [read_metrics(_metrics(output, method, seed)) for seed in seeds]
        for method, seeds in finished.items()
        if method in MAIN
    }
    evaluated = sorted({n for rows in runs.values() for row in rows[0] for n in row if n.startswith("eval/")})
    wanted = {n: n.split("/")[-1] for n in evaluated if n.split("/")[-1].split("@")[0] in ("avg", "maj")}
    passes = [n for n in evaluated if "/pass@" in n]
    if passes:
        largest = max(passes, key=lambda n: int(n.rsplit("@", 1)[1]))
        wanted[largest] = largest.split("/")[-1]
    charts = []
    for name, title in {**CURVES, **wanted}.items():
        series = []
        for method, rows in runs.items():
            points: dict[int, list[float]] = {}
            for row in (row for run in rows for row in run):
                if isinstance(row.get(name), int | float):
                    points.setdefault(row["step"], []).append(row[name])
            steps = sorted(points)
            if steps:
                series.append(Series(method, steps, [float(np.mean(points[s])) for s in steps]))
        if series:
            charts.append(Chart(title, tuple(series)))
    return figure(charts, columns=2)


def _pass_chart(values: Mapping[str, Mapping[str, np.ndarray]]) -> Chart:
    """pass@k over log2 k."""
    series = []
    for method in MAIN:
        if method in values:
            metrics = values[method]
            ks = [1, *(int(n.split("@")[1]) for n in metrics if n.startswith("pass@"))]
            means = [metrics["avg" if k == 1 else f"pass@{k}"].mean() for k in ks]
            series.append(Series(method, [float(np.log2(k)) for k in ks], [float(m) for m in means]))
    return Chart("pass@k over log2 k", tuple(series))


def _sensitivity(values: Mapping[str, Mapping[str, np.ndarray]]) -> list[str]:
    """SIREN's avg and largest pass@k over the mass of the top-p mask and the quantile of the peak mask."""
    lines = []
    for top_p in TOP_P_GRID:
        for quantile in QUANTILE_GRID:
            centre = (top_p, quantile) == (0.8, 0.8)
            method = "siren-0.1" if centre else f"grid-p{top_p:g}-q{quantile:g}"
            if method in values:
                metrics = values[method]
                last = [n for n in metrics if n.startswith("pass@")][-1]
                shown = [_show(bootstrap(metrics[n])) for n in ("avg", f"maj@{MAJORITY_K}", last)]
                lines.append(_row([f"{top_p:g}", f"{quantile:g}", *shown]))
    if len(lines) < 2:
        return []  # the grid was not run
    head = ["top-p", "quantile", "avg", f"maj@{MAJORITY_K}", last]
    return ["## Sensitivity of SIREN (coefficient 0.1)", "", _row(head), "|---" * len(head) + "|", *lines]
