"""The report of one run."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from siren_megatron.charts import format_seconds, format_value, smoothing_window
from siren_megatron.config import option_defaults
from siren_megatron.options import flag
from siren_megatron.report.curves import build_sections, shown
from siren_megatron.report.page import (
    curves_data,
    document,
    navigation,
    pairs_table,
    sections_html,
    table,
)
from siren_megatron.report.timeline import timelines_html
from siren_megatron.report.tokens import selection
from siren_megatron.versions import versions


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


def configuration(config: Mapping[str, Any]) -> str:
    """The options that differ from their defaults, then, folded up, all the others."""
    defaults = option_defaults()
    changed = [
        (flag(key), option_text(value), option_text(defaults[key]) if key in defaults else "required")
        for key, value in config.items()
        if key not in defaults or value != defaults[key]
    ]
    same = {
        flag(key): option_text(value)
        for key, value in config.items()
        if key in defaults and value == defaults[key]
    }
    parts = []
    if changed:
        parts.append(
            table(
                ("Option", "Value", "Default"),
                changed,
                classes="pairs",
                caption="Options that differ from their defaults",
            )
        )
    if same:
        tables = "".join(map(pairs_table, _halves(same)))
        number = f"The {len(same)} options at their defaults"
        parts.append(f'<details><summary>{number}</summary><div class="tables">{tables}</div></details>')
    return "".join(parts)


def option_text(value: Any) -> str:
    """An option's value as one reads it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list | tuple):
        return ", ".join(map(option_text, value))
    return "none" if value is None else str(value)


def _halves(pairs: Mapping[str, Any]) -> list[dict[str, Any]]:
    items = list(pairs.items())
    middle = (len(items) + 1) // 2
    return [dict(half) for half in (items[:middle], items[middle:]) if half]


def smoothing_note(rows: int) -> str:
    """What faint and bold curves mean, where a run of so many rows has both."""
    window = smoothing_window(rows)
    if window == 1:
        return ""
    return f'<p class="muted note">Faint: each step. Bold: mean of the last {window} steps.</p>'


def render_report(
    rows: Sequence[Mapping[str, Any]],
    *,
    config: Mapping[str, Any],
    status: str,
    paths: Mapping[str, str],
    num_steps: int,
    records: Sequence[Mapping[str, Any]] = (),
    timelines: Sequence[Mapping[str, Any]] = (),
    found_versions: Mapping[str, str] | None = None,
) -> str:
    """The report as one HTML document.

    Args:
        rows: the run's rows, as `metrics.read_metrics` returns them.
        config: option -> value.
        status: "running", "finished", "interrupted" or "failed: why".
        paths: label -> path of what the run has written; "run" names the run in the title.
        num_steps: steps that the run was asked for.
        records: responses token by token, as `read_records` returns them.
        timelines: stages of profiled steps, as `read_timelines` returns them.
        found_versions: name -> version that the run had; None = those found now.
    """
    name = Path(paths["run"]).name if "run" in paths else "run"
    done = rows[-1]["step"] if rows else 0
    tone = status if status in ("finished", "running") else "stopped"
    facts = [f"step {done:,} of {num_steps:,}", time.strftime("%Y-%m-%d %H:%M")]
    if rows and "time/step" in rows[0]:
        facts.insert(1, format_seconds(sum(row.get("time/step", 0.0) for row in rows)))
    sections = build_sections(rows)
    drawn = [(title, [shown(chart) for chart in charts]) for title, charts in sections]
    steps = [(f"{record['step']:,}", record) for record in records]
    chosen, data = selection(steps, max(len(steps) - 1, 0))
    targets = {"configuration": "Configuration", "curves": "Curves"}
    profile = ""
    if timelines:
        targets["profile"] = "Profiled steps"
        profile = f'<section id="profile"><h2>Profiled steps</h2>{timelines_html(timelines)}</section>'
    if chosen:
        targets |= {"by-position": "Entropy by position", "responses-title": "Responses"}
    body = f"""<header><h1>{escape(name)}</h1><span class="status {tone}">{escape(status)}</span>
<span class="muted">{escape(" · ".join(facts))}</span></header>
{navigation({**targets, "made-with": "Paths and versions"})}
{_tiles(rows)}
<section id="configuration"><h2>Configuration</h2>{configuration(config)}</section>
<section id="curves"><h2>Curves</h2>{sections_html(drawn)}{smoothing_note(len(rows))}</section>
{profile}
{chosen}
<div class="tables" id="made-with">
<section><h2>Paths</h2>{pairs_table(paths)}</section>
<section><h2>Versions</h2>{pairs_table(versions() if found_versions is None else found_versions)}</section>
</div>"""
    scripts = ["page.js", "curves.js", *(["tokens.js"] if chosen else [])]
    return document(name, body, {"curves": curves_data(sections), **data}, scripts)
