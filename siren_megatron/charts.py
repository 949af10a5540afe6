"""Line and stacked charts as SVG text, by the standard library alone: the report's curves, README's figure.

Colours are CSS variables (`THEME_CSS`), so one picture serves a light and a dark page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

CHART_WIDTH, CHART_HEIGHT = 480, 270  # units of the view box: text is 11 to 13 of them high
LEFT, RIGHT, BOTTOM = 54, 14, 30  # margins around the plot area
TOP, TOP_WITH_LEGEND, LEGEND_LINE = 42, 60, 16
DOTS = 12  # points up to which a curve shows each of them
SERIES_COLORS = 8
MAX_POINTS = 800  # a curve; longer ones keep the lowest and highest point of each bucket

THEME_CSS = """
:root { color-scheme: light dark;
  --page: #f6f6f3; --card: #ffffff; --ink: #1c1c1a; --muted: #6a6a64; --grid: #ebebe6; --axis: #c6c6bf;
  --s0: #2a78d6; --s1: #eb6834; --s2: #1baf7a; --s3: #4a3aa7; --s4: #d99300; --s5: #d6578d; --s6: #008300;
  --s7: #e34948; }
@media (prefers-color-scheme: dark) { :root {
  --page: #141413; --card: #1e1e1d; --ink: #f1f1ee; --muted: #a2a29b; --grid: #30302e; --axis: #4b4b47;
  --s0: #4a94ec; --s1: #e2703f; --s2: #23a97a; --s3: #978cf0; --s4: #cf9214; --s5: #dd6c9b; --s6: #3f9c3f;
  --s7: #e66767; } }
"""
CHART_CSS = (
    """
.chart text { font: 11px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: var(--muted); }
.chart .title { font-size: 13px; font-weight: 600; fill: var(--ink); }
.chart .legend { fill: var(--ink); }
.chart .value { font-size: 13px; fill: var(--ink); font-variant-numeric: tabular-nums; }
.chart .grid { stroke: var(--grid); } .chart .axis { stroke: var(--axis); }
.chart .line { fill: none; stroke-width: 1.9; stroke-linejoin: round; stroke-linecap: round; }
.chart .dots { stroke-width: 5.5; }
.chart .raw { stroke-width: 1; opacity: .35; } .chart .dashed { stroke-dasharray: 5 4; }
.chart .area { stroke: var(--card); stroke-width: .6; opacity: .9; }
"""
    + "\n".join(
        f".chart .c{i} {{ stroke: var(--s{i}); }} .chart .f{i} {{ fill: var(--s{i}); }}"
        for i in range(SERIES_COLORS)
    )
    + "\n"
)


@dataclass(frozen=True)
class Series:
    """One curve.

    Args:
        name: its label in the legend.
        steps: x of every point, growing.
        values: y of every point; NaN and infinities leave a gap.
        dashed: drawn dashed (a reference level).
        smooth: drawn faintly, under the mean of its last few steps (see `smoothing_window`).
    """

    name: str
    steps: Sequence[float]
    values: Sequence[float]
    dashed: bool = False
    smooth: bool = False


@dataclass(frozen=True)
class Chart:
    """A titled chart of one or more series.

    Args:
        title: stands above it.
        series: its curves.
        stacked: piles them up as areas (all on the same steps).
        legend: whether several series are named in the chart itself.
        x_label: stands at the start of the x axis.
        x_base: the series' steps are logarithms to this base, and the axis shows the numbers themselves.
    """

    title: str
    series: tuple[Series, ...]
    stacked: bool = False
    legend: bool = True
    x_label: str = "step"
    x_base: float | None = None

    @property
    def has_legend(self) -> bool:
        return self.legend and len(self.series) > 1


def format_value(value: float) -> str:
    """A number for people: 4 significant digits, grouped thousands, no trailing zeros."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("∞" if value > 0 else "-∞")
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e7 or size < 1e-4:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    if size >= 1000:
        return f"{value:,.0f}"
    text = f"{value:.4g}"
    return f"{value:.6f}".rstrip("0") if "e" in text else text


def format_seconds(seconds: float) -> str:
    """A duration for people: 42s, 3m05s, 2h07m, 1d04h."""
    whole = int(round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from at or below `low` to at or above `high` (steps of 1, 2 or 5 × 10ⁿ)."""
    if not high > low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / max(count - 1, 1)
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def smoothing_window(points: int) -> int:
    """Steps whose mean makes the bold curve over a faint one; 1 (none) for short curves."""
    return max(3, points // 15) if points >= 20 else 1


def trailing_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last `window` finite values at each point (fewer at the start); NaN where there is none."""
    means = []
    for end in range(1, len(values) + 1):
        finite = [value for value in values[max(0, end - window) : end] if math.isfinite(value)]
        means.append(sum(finite) / len(finite) if finite else math.nan)
    return means


def thin(
    steps: Sequence[float], values: Sequence[float], limit: int = MAX_POINTS
) -> list[tuple[float, float]]:
    """At most about `limit` points of a curve: the lowest and the highest of each bucket, so spikes stay."""
    points = list(zip(steps, values, strict=True))
    if len(points) <= limit:
        return points
    size = math.ceil(len(points) / (limit // 2))
    kept = []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        finite = [point for point in bucket if math.isfinite(point[1])] or bucket[:1]
        kept += sorted({min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])})
    return kept


class _Plot:
    """Maps data to the view box."""

    def __init__(self, points: Sequence[tuple[float, float]], top: float, whole: bool) -> None:
        """`whole`: ticks of the x axis are whole numbers, as they are where all x are."""
        self.top = top
        steps = [x for x, _ in points]
        low, high = min(y for _, y in points), max(y for _, y in points)
        if 0 < low < 0.4 * high:  # a scale that nearly reaches zero should reach it
            low = 0.0
        self.y_ticks = nice_ticks(low, high if high or low else 1.0)  # a count of nothing is not negative
        self.x_low, self.x_high = min(steps), max(steps)
        whole = whole or all(x == int(x) for x in steps)
        self.x_ticks = [
            x
            for x in nice_ticks(self.x_low, self.x_high, count=7)
            if self.x_low <= x <= self.x_high and (x == int(x) or not whole)
        ]

    def x(self, step: float) -> float:
        span = (self.x_high - self.x_low) or 1.0
        return LEFT + (step - self.x_low) / span * (CHART_WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return CHART_HEIGHT - BOTTOM - (value - low) / (high - low) * (CHART_HEIGHT - self.top - BOTTOM)

    def path(self, points: Sequence[tuple[float, float]]) -> str:
        """Path data; a point that is not finite lifts the pen, and a lone point is drawn as a dot."""
        parts, pen_down = [], False
        for index, (step, value) in enumerate(points):
            if not math.isfinite(value):
                pen_down = False
                continue
            parts.append(f"{'L' if pen_down else 'M'}{self.x(step):.1f} {self.y(value):.1f}")
            last = index + 1 == len(points) or not math.isfinite(points[index + 1][1])
            if not pen_down and last:
                parts.append("h0.01")
            pen_down = True
        return "".join(parts)


def _frame(plot: _Plot, chart: Chart) -> list[str]:
    right, bottom = CHART_WIDTH - RIGHT, CHART_HEIGHT - BOTTOM
    parts = []
    for tick in plot.y_ticks:
        y = plot.y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text x="{LEFT - 7}" y="{y + 3.8:.1f}" text-anchor="end">{_tick(tick, plot.y_ticks)}</text>'
        )
    for tick in plot.x_ticks:
        number = format_value(tick if chart.x_base is None else chart.x_base**tick)
        parts.append(f'<text x="{plot.x(tick):.1f}" y="{bottom + 17}" text-anchor="middle">{number}</text>')
    label = escape(chart.x_label)
    parts.append(f'<text x="{LEFT - 12}" y="{bottom + 17}" text-anchor="end">{label}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    return parts


def _tick(tick: float, ticks: Sequence[float]) -> str:
    step = ticks[1] - ticks[0]
    if abs(tick) < step * 1e-6:
        return "0"
    size = max(map(abs, ticks))
    if step >= 1e-3 and size < 1e4:
        return f"{tick:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"
    if 1e4 <= size < 1e7:
        return f"{tick:,.0f}" if step >= 1 else f"{tick:,}"
    if size < 0.05 or size >= 1e7:  # as many digits for all ticks of an axis
        digits = math.floor(math.log10(abs(tick))) - math.floor(math.log10(step) + 1e-9)
        mantissa, exponent = f"{tick:.{max(digits, 0)}e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return format_value(tick)


def _legend(chart: Chart) -> tuple[list[str], float]:
    """The names of the series, in as many lines as they need, and the height of the lines after the first."""
    parts, x, y = [], LEFT - 38, 0
    for index, series in enumerate(chart.series):
        color, width = index % SERIES_COLORS, 32 + round(6.0 * len(series.name))
        if x > LEFT - 38 and x + width > CHART_WIDTH:
            x, y = LEFT - 38, y + LEGEND_LINE
        if chart.stacked:
            parts.append(f'<rect class="f{color}" x="{x}" y="{y + 34}" width="10" height="10" rx="2"/>')
        else:
            dashed = " dashed" if series.dashed else ""
            parts.append(f'<path class="line c{color}{dashed}" d="M{x} {y + 39}h14"/>')
        parts.append(f'<text class="legend" x="{x + 19}" y="{y + 43}">{escape(series.name)}</text>')
        x += width
    return parts, y


def render(chart: Chart, attributes: str = "") -> str:
    """The chart as an `<svg class="chart">` element without styles; `attributes` go into its tag as they are.

    Raises ValueError when stacked series are not on the same steps.
    """
    window = smoothing_window(max((len(series.steps) for series in chart.series), default=0))
    layers: list[
        tuple[str, list[tuple[float, float]], list[tuple[float, float]]]
    ] = []  # (classes, upper, lower)
    if chart.stacked:
        if any(list(series.steps) != list(chart.series[0].steps) for series in chart.series):
            raise ValueError(f"chart {chart.title!r}: stacked series must share their steps")
        stride = math.ceil(len(chart.series[0].steps) / MAX_POINTS) or 1
        steps = list(chart.series[0].steps)[::stride]
        base = [0.0] * len(steps)
        for index, series in enumerate(chart.series):
            finite = [value if math.isfinite(value) else 0.0 for value in list(series.values)[::stride]]
            top = [low + value for low, value in zip(base, finite, strict=True)]
            pairs = list(zip(steps, top, strict=True)), list(zip(steps, base, strict=True))
            layers.append((f"area f{index % SERIES_COLORS}", *pairs))
            base = top
    else:
        for index, series in enumerate(chart.series):
            color = f"line c{index % SERIES_COLORS}" + (" dashed" if series.dashed else "")
            smooth = series.smooth and window > 1
            layers.append((color + (" raw" if smooth else ""), thin(series.steps, series.values), []))
            if len(series.steps) <= DOTS and not series.dashed:
                gaps = [(step, math.nan) for step in series.steps]  # a gap after each point makes it a dot
                points = zip(series.steps, series.values, strict=True)
                layers.append(
                    (color + " dots", [p for pair in zip(points, gaps, strict=True) for p in pair], [])
                )
            if smooth:
                layers.append((color, thin(series.steps, trailing_mean(series.values, window)), []))
    points = [point for _, upper, lower in layers for point in upper + lower if math.isfinite(point[1])]
    head = [f'<text class="title" x="{LEFT - 38}" y="20">{escape(chart.title)}</text>']
    top = TOP
    if chart.has_legend:
        legend, more = _legend(chart)
        head, top = head + legend, TOP_WITH_LEGEND + more
    if not points:
        body = [
            f'<text x="{CHART_WIDTH / 2}" y="{CHART_HEIGHT / 2}" text-anchor="middle">no finite values</text>'
        ]
        geometry = ""
    else:
        plot = _Plot(points, top, whole=chart.x_base is not None)
        body = _frame(plot, chart)
        for classes, upper, lower in layers:
            data = plot.path(upper)
            if lower:
                data += plot.path(lower[::-1]).replace("M", "L", 1) + "Z"
            body.append(f'<path class="{classes}" d="{data}"/>')
        geometry = (
            f' data-x="{plot.x_low} {plot.x_high} {LEFT} {CHART_WIDTH - RIGHT}"'
            f' data-y="{plot.y_ticks[0]} {plot.y_ticks[-1]} {CHART_HEIGHT - BOTTOM} {plot.top}"'
        )
    if len(chart.series) == 1 and chart.series[0].values:
        last = format_value(chart.series[0].values[-1])
        head.append(f'<text class="value" x="{CHART_WIDTH - RIGHT}" y="20" text-anchor="end">{last}</text>')
    return (
        f'<svg class="chart" viewBox="0 0 {CHART_WIDTH} {CHART_HEIGHT}" role="img"'
        f' aria-label="{escape(chart.title)}"{geometry} {attributes}>' + "".join(head + body) + "</svg>"
    )


def figure(charts: Sequence[Chart], columns: int = 2) -> str:
    """A standalone SVG document with the charts in a grid; it follows the viewer's light or dark scheme."""
    gap = 14
    rows = math.ceil(len(charts) / columns)
    width, height = columns * (CHART_WIDTH + gap) + gap, rows * (CHART_HEIGHT + gap) + gap
    cells = []
    for index, chart in enumerate(charts):
        x, y = gap + index % columns * (CHART_WIDTH + gap), gap + index // columns * (CHART_HEIGHT + gap)
        cells.append(
            f'<rect class="card" x="{x}" y="{y}" width="{CHART_WIDTH}" height="{CHART_HEIGHT}" rx="8"/>'
        )
        cells.append(render(chart, f'x="{x}" y="{y}" width="{CHART_WIDTH}" height="{CHART_HEIGHT}"'))
    css = THEME_CSS + CHART_CSS + ".page { fill: var(--page); } .card { fill: var(--card); }"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
        f' width="{width}" height="{height}">'
        f'<style>{css}</style><rect class="page" width="{width}" height="{height}" rx="10"/>'
        + "".join(cells)
        + "</svg>\n"
    )
