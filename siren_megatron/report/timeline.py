"""The stages of a profiled step over time, one row a rank: reads what `--profile` wrote, and draws it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from siren_megatron.charts import SERIES_COLORS, format_value, nice_ticks

PROFILE_DIRECTORY = "profile"
MAX_RANKS = 64  # rows of a picture
WIDTH, LEFT, RIGHT, TOP, ROW, BOTTOM = 960, 64, 14, 52, 22, 30  # units of the view box


def timeline_path(directory: Path, rank: int) -> Path:
    """The file of one rank in `<save>/profile`."""
    return directory / f"timeline-rank-{rank}.jsonl"


def read_timelines(run: Path) -> list[dict[str, Any]]:
    """Lines of all ranks of a run: "step", "rank", "started" (Unix seconds), "stages" [[name, start, end]].

    A last line without its newline (the writer was killed in mid-write) is left out. No profile gives none.

    Raises:
        ValueError: a line is not such an object; the message names the file.
    """
    lines = []
    for path in sorted((run / PROFILE_DIRECTORY).glob("timeline-rank-*.jsonl")):
        text = path.read_text(encoding="utf-8")
        for line in text[: text.rfind("\n") + 1].splitlines():
            try:
                found = json.loads(line)
                stages = [(str(name), float(start), float(end)) for name, start, end in found["stages"]]
                kept = {name: found[name] for name in ("step", "rank", "started")}
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}: not a timeline: {error!r}") from error
            lines.append({**kept, "stages": stages})
    return lines


def timelines_html(lines: Sequence[Mapping[str, Any]]) -> str:
    """A picture of each profiled step; nothing without lines."""
    steps = sorted({line["step"] for line in lines})
    cards = [
        f'<div class="card">{_draw(step, [line for line in lines if line["step"] == step])}</div>'
        for step in steps
    ]
    return "".join(cards)


def _draw(step: int, lines: Sequence[Mapping[str, Any]]) -> str:
    newest = {line["rank"]: line for line in lines}  # a step that was done again after a resume
    ranks = sorted(newest)[:MAX_RANKS]
    spans = [(row, stage) for row, rank in enumerate(ranks) for stage in newest[rank]["stages"]]
    zero = min((newest[rank]["started"] for rank in ranks), default=0.0)
    last = max((end - zero for _, (_, _, end) in spans), default=1.0)
    ticks = nice_ticks(0.0, last)
    names = list(dict.fromkeys(name for _, (name, _, _) in spans))
    bottom = TOP + ROW * len(ranks)

    def x(seconds: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * max(seconds, 0.0) / ticks[-1]

    parts = [f'<text class="title" x="16" y="20">Step {step}, seconds by stage and rank</text>']
    at = 16
    for index, name in enumerate(names):
        parts.append(
            f'<rect class="f{index % SERIES_COLORS}" x="{at}" y="32" width="10" height="10" rx="2"/>'
        )
        parts.append(f'<text class="legend" x="{at + 15}" y="41">{escape(name.replace("_", " "))}</text>')
        at += 30 + round(6.5 * len(name))
    for tick in ticks:
        parts.append(
            f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{TOP}" y2="{bottom}"/>'
            f'<text x="{x(tick):.1f}" y="{bottom + 17}" text-anchor="middle">{format_value(tick)}</text>'
        )
    for row, rank in enumerate(ranks):
        parts.append(f'<text x="{LEFT - 7}" y="{TOP + ROW * row + 15}" text-anchor="end">rank {rank}</text>')
    for row, (name, start, end) in spans:
        seconds = f"{name.replace('_', ' ')}: {format_value(end - start)} s"
        width = max(x(end - zero) - x(start - zero), 0.5)
        parts.append(
            f'<rect class="f{names.index(name) % SERIES_COLORS}" x="{x(start - zero):.1f}" '
            f'y="{TOP + ROW * row + 3}" width="{width:.1f}" height="{ROW - 6}">'
            f"<title>{escape(seconds)}</title></rect>"
        )
    label = f"Stages of step {step} over time"
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {bottom + BOTTOM}" role="img" aria-label="{label}">'
        + "".join(parts)
        + "</svg>"
    )
