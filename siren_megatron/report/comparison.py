"""Several runs in one page: curves over each other, last metrics, the options that differ."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from siren_megatron.charts import SERIES_COLORS, Chart, Series, format_value
from siren_megatron.options import flag
from siren_megatron.report.curves import HIDDEN, SECTIONS, SMOOTHED, SPEED
from siren_megatron.report.page import curves_data, document, navigation, sections_html, table
from siren_megatron.report.run import option_text, smoothing_note
from siren_megatron.report.tokens import selection

MAX_RUNS = 2 * SERIES_COLORS  # the second half is dashed
LAST_STEPS = 10  # of a run, whose mean is its last value
NOT_COMPARED = ("save", "load", "overwrite", "tensorboard_dir")  # differ in every run, and say nothing
TITLES = {  # of metrics that share a chart in the report of one run
    "siren/entropy_masked": "Masked entropy",
    "siren/entropy_anchor": "Anchor of the masked entropy",
    "entropy": "Entropy of all response tokens",
    "entropy_top_p": "Top-p entropy of all response tokens",
}
EVALUATION = "eval/"  # measured now and then: the last value counts, not a mean


@dataclass(frozen=True)
class Run:
    """One of the runs.

    Args:
        name: how it is called in the page; the runs of a page have different ones.
        rows: as `metrics.read_metrics` returns them.
        config: option -> value; empty where the run has no run.json.
        status: as in run.json; None where there is none.
        records: as `read_records` returns them.
    """

    name: str
    rows: Sequence[Mapping[str, Any]]
    config: Mapping[str, Any] = field(default_factory=dict)
    status: str | None = None
    records: Sequence[Mapping[str, Any]] = ()


def comparison_sections(runs: Sequence[Run]) -> list[tuple[str, list[Chart]]]:
    """A chart for each metric, in it a curve for each run that has the metric."""
    present = list(dict.fromkeys(key for run in runs for row in run.rows for key in row if key not in HIDDEN))
    titles: dict[str, list[tuple[str, str]]] = {}
    placed = set()
    for section, charts in SECTIONS:
        for title, names in charts:
            for name in names:
                if name in present:
                    titles.setdefault(section, []).append(
                        (title if len(names) == 1 else TITLES.get(name, name), name)
                    )
                    placed.add(name)
        if section == SPEED and "time/step" in present:
            titles.setdefault(section, []).append(("Seconds a step", "time/step"))
            placed.add("time/step")
    for name in present:
        if name not in placed and not name.startswith("time/"):
            section = "Evaluation" if name.startswith(EVALUATION) else "Further metrics"
            titles.setdefault(section, []).append((name, name))
    order = sorted(titles, key=lambda section: {"Reward": 0, "Evaluation": 1}.get(section, 2))
    return [(section, [_overlay(runs, *chart) for chart in titles[section]]) for section in order]


def _overlay(runs: Sequence[Run], title: str, name: str) -> Chart:
    series = []
    for index, run in enumerate(runs):
        points = [(row["step"], row[name]) for row in run.rows if name in row]
        # A run without the metric keeps its place, so that a run has one colour in all charts.
        steps, values = [p[0] for p in points], [p[1] for p in points]
        series.append(Series(run.name, steps, values, index >= SERIES_COLORS, name in SMOOTHED))
    return Chart(title, tuple(series), legend=False)


def last_values(runs: Sequence[Run]) -> list[list[str]]:
    """Rows of the table of last metrics: name, then a cell a run.

    A cell is the mean of the finite values in the run's last LAST_STEPS steps; of an evaluation the last
    value.
    """
    names = [chart_name for _, charts in SECTIONS for _, group in charts for chart_name in group]
    present = dict.fromkeys(key for run in runs for row in run.rows for key in row if key not in HIDDEN)
    evaluated = sorted(name for name in present if name.startswith(EVALUATION))
    order = ["reward", *evaluated, *(name for name in names if name != "reward"), "time/step"]
    table_rows = []
    for name in dict.fromkeys([*order, *sorted(present)]):
        if name in present and (name == "time/step" or not name.startswith("time/")):
            cells = [_last(run.rows, name) for run in runs]
            table_rows.append([name, *("–" if cell is None else format_value(cell) for cell in cells)])
    return table_rows


def _last(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    window = rows if name.startswith(EVALUATION) else rows[-LAST_STEPS:]
    values = [row[name] for row in window if name in row]
    if not values:
        return None
    if name.startswith(EVALUATION):
        return values[-1]
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def differences(runs: Sequence[Run]) -> list[list[str]]:
    """Rows of the options that the runs differ in: name, then a cell a run that has a run.json."""
    known = [run for run in runs if run.config]
    names = dict.fromkeys(key for run in known for key in run.config if key not in NOT_COMPARED)
    cells = {
        name: [option_text(run.config[name]) if name in run.config else "–" for run in known]
        for name in names
    }
    return [[flag(name), *row] for name, row in cells.items() if len(set(row)) > 1]


def render_comparison(runs: Sequence[Run]) -> str:
    """The page of several runs. Raises ValueError for more than MAX_RUNS, or runs of the same name."""
    if len(runs) > MAX_RUNS:
        raise ValueError(f"{len(runs)} runs in one page: at most {MAX_RUNS} can be told apart")
    if len({run.name for run in runs}) < len(runs):
        raise ValueError("runs of the same name: give each its own with --labels")
    sections = comparison_sections(runs)
    names = [run.name for run in runs]
    known = [run.name for run in runs if run.config]
    different = differences(runs)
    if len(known) < 2:
        options = '<p class="muted">Fewer than two of the runs have a run.json with their options.</p>'
    elif different:
        options = table(("Option", *known), different, caption="Options that the runs differ in")
    else:
        options = '<p class="muted">The runs have the same options.</p>'
    if 2 <= len(known) < len(runs):
        options += (
            f'<p class="muted note">Without a run.json: {escape(_listed(set(names) - set(known)))}.</p>'
        )
    steps = [(f"{run.name}, step {record['step']:,}", record) for run in runs for record in run.records]
    chosen, data = selection(steps, max(len(runs[0].records) - 1, 0))
    targets = {"configuration": "Configuration", "last": "Last metrics", "curves": "Curves"}
    if chosen:
        targets |= {"by-position": "Entropy by position", "responses-title": "Responses"}
    caption = "Metrics at the end of each run"
    last = table(("Metric", *names), last_values(runs), classes="numbers", caption=caption)
    longest = max(len(run.rows) for run in runs)
    body = f"""<header><h1>{len(runs)} runs</h1>
<span class="muted">{time.strftime("%Y-%m-%d %H:%M")}</span></header>
{navigation(targets)}
{_key(runs)}
<section id="configuration"><h2>What their options differ in</h2>{options}</section>
<section id="last"><h2>Last metrics</h2>{last}
<p class="muted note">Means of the last {LAST_STEPS} steps of each run; of an evaluation its last value.</p>
</section>
<section id="curves"><h2>Curves</h2>{_key(runs)}{sections_html(sections)}{smoothing_note(longest)}</section>
{chosen}"""
    scripts = ["page.js", "curves.js", *(["tokens.js"] if chosen else [])]
    title = _listed(names)
    return document(title, body, {"curves": curves_data(sections), **data}, scripts)


def _key(runs: Sequence[Run]) -> str:
    """Which colour is which run, and how far it is."""
    items = []
    for index, run in enumerate(runs):
        dashed = " dashed" if index >= SERIES_COLORS else ""
        line = f'<path class="line c{index % SERIES_COLORS}{dashed}" d="M1 5h24"/>'
        done = f"step {run.rows[-1]['step']:,}" if run.rows else "no step"
        facts = done if run.status is None else f"{done}, {run.status}"
        items.append(
            f'<li><svg class="chart" viewBox="0 0 26 10" aria-hidden="true">{line}</svg>'
            f'<span>{escape(run.name)} <span class="muted">{escape(facts)}</span></span></li>'
        )
    return f'<ul class="runs" aria-label="Runs">{"".join(items)}</ul>'


def _listed(names: Any) -> str:
    return ", ".join(sorted(names) if isinstance(names, set) else names)
