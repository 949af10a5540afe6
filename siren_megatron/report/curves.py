"""Which curves a report shows, in which order, and their values for the pointer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from siren_megatron.charts import Chart, Series, format_value

SPEED = "Rollout and speed"  # the section that also holds the stages' times
# (section, (chart title, metrics that share it)): a metric that no row names gets a chart of its own.
SECTIONS: list[tuple[str, list[tuple[str, tuple[str, ...]]]]] = [
    ("Reward", [("Reward", ("reward",)), ("Response length (tokens)", ("response_length",))]),
    (
        "Entropy (nats)",
        [
            ("Masked entropy and its anchor", ("siren/entropy_masked", "siren/entropy_anchor")),
            ("Entropy of all response tokens", ("entropy", "entropy_top_p")),
            ("Positions in the peak mask, a response", ("siren/positions_per_response",)),
        ],
    ),
    (
        "Loss and update",
        [
            ("Policy loss", ("loss/policy",)),
            ("SIREN loss", ("siren/loss",)),
            ("Gradient norm", ("grad_norm",)),
            ("KL of old and new policy", ("kl_old_new",)),
            ("Clipped fraction", ("clip_fraction",)),
            ("Learning rate", ("lr",)),
        ],
    ),
    (
        SPEED,
        [
            ("Log-probs: vLLM against trainer (nats)", ("rollout_logprob_diff", "weight_sync_logprob_diff")),
            ("Rewards that failed (responses)", ("reward_timeouts", "reward_errors")),
            ("Tokens per second", ("tokens_per_second",)),
        ],
    ),
]
TIME_STAGES = ("rollout", "reward", "logprob", "train", "weight_sync")
DASHED = {"siren/entropy_anchor"}
SMOOTHED = {"reward", "loss/policy", "siren/loss", "grad_norm"}
MAX_HOVER_STEPS = 1000  # values kept for the pointer; the curves keep every spike (charts.thin)
HIDDEN = {"step", "wall_time"}


def _series(rows: Sequence[Mapping[str, Any]], name: str) -> Series:
    points = [(row["step"], row[name]) for row in rows if name in row]
    return Series(name, [p[0] for p in points], [p[1] for p in points], name in DASHED, name in SMOOTHED)


def build_sections(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Chart]]]:
    """The report's charts by section: the known metrics in their places, every other one after them."""
    present = list(dict.fromkeys(name for row in rows for name in row if name not in HIDDEN))
    placed: set[str] = set()
    sections = []
    for title, wanted in SECTIONS:
        charts = []
        for chart_title, names in wanted:
            found = [name for name in names if name in present]
            if found:
                charts.append(Chart(chart_title, tuple(_series(rows, name) for name in found)))
                placed.update(found)
        if title == SPEED and (stages := [s for s in TIME_STAGES if f"time/{s}" in present]):
            charts.append(_time_chart(rows, stages))
            placed.update({"time/step", *(f"time/{stage}" for stage in stages)})
        if charts:
            sections.append((title, charts))
    by_prefix: dict[str, list[Chart]] = {}
    for name in present:
        if name not in placed:
            group = {"eval": "Evaluation", "time": "Further times (s)"}.get(
                name.split("/")[0], "Further metrics"
            )
            by_prefix.setdefault(group, []).append(Chart(name, (_series(rows, name),)))
    at = 1 if sections and sections[0][0] == "Reward" else 0
    if "Evaluation" in by_prefix:
        sections.insert(at, ("Evaluation", by_prefix.pop("Evaluation")))
    return sections + list(by_prefix.items())


def _time_chart(rows: Sequence[Mapping[str, Any]], stages: Sequence[str]) -> Chart:
    steps = [row["step"] for row in rows]
    series = [
        Series(f"time/{stage}", steps, [row.get(f"time/{stage}", 0.0) for row in rows]) for stage in stages
    ]
    if any("time/step" in row for row in rows):
        named = [sum(one.values[i] for one in series) for i in range(len(rows))]
        rest = [max(row.get("time/step", 0.0) - done, 0.0) for row, done in zip(rows, named, strict=True)]
        series.append(Series("time/other", steps, rest))
    return Chart("Seconds a step, by stage", tuple(series), stacked=True)


def shown(chart: Chart) -> Chart:
    """The chart with legend labels that leave out the group, which the title says."""
    short = tuple(
        Series(s.name.split("/")[-1].replace("_", " "), s.steps, s.values, s.dashed, s.smooth)
        for s in chart.series
    )
    return Chart(chart.title, short, chart.stacked)


def _json_value(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else format_value(value)


def hover_data(charts: Sequence[Chart]) -> list[dict[str, Any]]:
    """What the page says beside the pointer: per chart "steps", series "names", "values" [series][step]."""
    data = []
    for chart in charts:
        steps = sorted({step for series in chart.series for step in series.steps})
        steps = steps[:: math.ceil(len(steps) / MAX_HOVER_STEPS) or 1]
        values = []
        for series in chart.series:
            at = dict(zip(series.steps, series.values, strict=True))
            values.append([_json_value(at.get(step)) for step in steps])
        data.append({"steps": steps, "names": [series.name for series in chart.series], "values": values})
    return data
