"""The experiment's figures, as standalone SVG documents.

Legend: S = seeds, P = prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from record import MAJORITY_K

from siren_megatron.charts import Chart, Series, figure

MAIN = ("grpo", "siren-0.1", "naive-0.01", "clip-cov", "entropy-constraint", "naive-0.05")
"""The methods that are drawn; the tables have all. What explodes comes last: the rest keep their colours."""
EXPLODED = 3.0
"""Nats of mean entropy at the end from which a method is in the first chart alone: it would hide the rest."""
TRAINING_CURVES = {
    "entropy": "Entropy (nats)",
    "siren/entropy_masked": "Masked entropy (nats)",
    "reward": "Mean reward",
    "response_length": "Response length (tokens)",
}
COEFFICIENTS = {
    "naive": {"naive-0.001": 0.001, "naive-0.01": 0.01, "naive-0.05": 0.05},
    "siren": {"siren-0.005": 0.005, "siren-0.1": 0.1, "siren-0.5": 0.5},
}


def curves(records: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Means over the seeds: entropies and reward at every step, the evaluations where they were made.

    Args:
        records: method -> its runs' records.
    """
    drawn = {method: records[method] for method in MAIN if method in records}
    stable = {
        method: runs
        for method, runs in drawn.items()
        if np.mean([run["curves"]["entropy"][-1][1] for run in runs]) < EXPLODED
    }
    titles = dict(TRAINING_CURVES)
    evaluated = {name for runs in drawn.values() for name in runs[0]["curves"] if name.startswith("eval/")}
    for kind in ("avg", "maj", "pass"):
        of_kind = [name for name in evaluated if name.rsplit("/", 1)[1].startswith(f"{kind}@")]
        if of_kind:
            name = max(of_kind, key=lambda n: int(n.rsplit("@", 1)[1]))
            titles[name] = f"Held-out {name.rsplit('/', 1)[1]}"
    shown = [("entropy", "Entropy (nats), exploded runs too", drawn)] if len(stable) < len(drawn) else []
    shown += [(name, title, stable) for name, title in titles.items()]
    charts = []
    for name, title, methods in shown:
        series = []
        for method, runs in methods.items():
            points: dict[float, list[float]] = {}
            for step, value in (point for run in runs for point in run["curves"].get(name, ())):
                points.setdefault(step, []).append(value)
            steps = sorted(points)
            if steps:
                means = [float(np.mean(points[step])) for step in steps]
                series.append(Series(method, steps, means, smooth=name in TRAINING_CURVES))
        if series:
            charts.append(Chart(title, tuple(series)))
    return figure(charts, columns=2)


def pass_at_k(values: Mapping[str, Mapping[str, np.ndarray]]) -> str:
    """pass@k over k, and the same as a difference to GRPO; without methods that get nothing right.

    Args:
        values: method -> metric -> [S, P].
    """
    ks = [1, *(int(n.split("@")[1]) for n in next(iter(values.values())) if n.startswith("pass@"))]
    steps = [float(np.log2(k)) for k in ks]
    lines = {
        method: [float(values[method]["avg" if k == 1 else f"pass@{k}"].mean()) for k in ks]
        for method in MAIN
        if method in values and values[method]["avg"].any()
    }
    charts = [Chart("pass@k", tuple(Series(m, steps, y) for m, y in lines.items()), x_label="k", x_base=2)]
    if "grpo" in lines:
        gaps = {m: [a - b for a, b in zip(y, lines["grpo"], strict=True)] for m, y in lines.items()}
        series = tuple(Series(m, steps, y) for m, y in gaps.items())
        charts.append(Chart("pass@k minus GRPO's", series, x_label="k", x_base=2))
    return figure(charts, columns=2)


def sensitivity(values: Mapping[str, Mapping[str, np.ndarray]]) -> str | None:
    """avg, maj and the largest pass@k over the coefficient; None where too few were run.

    A coefficient without a single right response is left out: its curve ends before it.
    """
    charts = []
    last = [name for name in next(iter(values.values())) if name.startswith("pass@")][-1]
    for metric in ("avg", f"maj@{MAJORITY_K}", last):
        series = []
        for name, coefficients in COEFFICIENTS.items():
            found = {m: c for m, c in coefficients.items() if m in values and values[m]["avg"].any()}
            if len(found) > 1:
                means = [float(values[m][metric].mean()) for m in found]
                series.append(Series(name, [float(np.log10(c)) for c in found.values()], means))
        if series and "grpo" in values:
            span = (min(s.steps[0] for s in series), max(s.steps[-1] for s in series))
            level = float(values["grpo"][metric].mean())
            series.append(Series("grpo", span, (level, level), dashed=True))
            charts.append(Chart(f"{metric} over the coefficient", tuple(series), x_label="", x_base=10))
    return figure(charts, columns=3) if charts else None
