"""report.html and the SVG charts: they parse, hold the run's data, and reach for nothing outside."""

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

from siren_megatron.charts import (
    BOTTOM,
    CHART_HEIGHT,
    CHART_WIDTH,
    LEFT,
    RIGHT,
    TOP,
    Chart,
    Series,
    figure,
    nice_ticks,
    render,
    thin,
    trailing_mean,
)
from siren_megatron.report import build_sections, render_report, write_report

ROWS = [
    {
        "step": step,
        "reward": 0.25 + step / 100,
        "siren/entropy_masked": 0.9,
        "siren/entropy_anchor": 0.95,
        "time/rollout": 1.0,
        "time/train": 2.0,
        "time/step": 3.5,
        "made_up": math.nan if step == 2 else float(step),
        **({"eval/pass@8": 0.5} if step == 2 else {}),
        "wall_time": 1e9 + step,
    }
    for step in range(1, 6)
]
DETAILS = {
    "config": {"lr": 1e-4, "note": "</table><script>alert(1)</script>"},
    "status": "finished",
    "paths": {"run": "/runs/<b>one"},
    "num_steps": 5,
}


class Page(HTMLParser):
    """Checks that tags nest, and keeps text by tag."""

    VOID = {"meta", "line", "path", "rect", "br"}

    def __init__(self, html):
        super().__init__()
        self.open, self.text, self.tags = [], {}, []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.text.setdefault(self.open[-1], []).append(data)


def test_report_holds_the_data_of_every_metric():
    page = Page(render_report(ROWS, **DETAILS))
    data = json.loads(next(text for text in page.text["script"] if text.startswith('{"steps"')))
    assert data["steps"] == [1, 2, 3, 4, 5]
    assert data["values"]["reward"] == [row["reward"] for row in ROWS]
    assert data["values"]["made_up"] == [1.0, "NaN", 3.0, 4.0, 5.0]
    assert data["values"]["eval/pass@8"] == [None, 0.5, None, None, None]
    assert data["values"]["time/other"] == [0.5] * 5
    drawn = [attributes for tag, attributes in page.tags if tag == "svg" and "data-chart" in attributes]
    assert [int(attributes["data-chart"]) for attributes in drawn] == list(range(len(data["charts"])))
    named = {name for chart in data["charts"] for name in chart}
    assert named == (set().union(*ROWS) - {"step", "wall_time", "time/step"}) | {"time/other"}


def test_report_shows_configuration_and_paths_as_text_not_as_markup():
    page = Page(render_report(ROWS, **DETAILS))
    cells = page.text["td"]
    assert "</table><script>alert(1)</script>" in cells and "0.0001" in cells and "/runs/<b>one" in cells
    assert not any("alert" in text for text in page.text["script"])
    assert "torch" in cells and "finished" in page.text["span"]


def test_report_names_no_address_outside():
    html = render_report(ROWS, **DETAILS).replace(
        "http://www.w3.org/2000/svg", ""
    )  # a namespace, not fetched
    assert not re.search(r"https?:|src=|href=|url\(|@import", html)


def test_report_of_no_rows_and_of_one_row(tmp_path):
    assert "step 0 of 5" in Page(render_report([], **DETAILS)).text["span"][1]
    path = write_report(tmp_path / "report.html", ROWS[:1], **DETAILS)
    Page(path.read_text())
    assert list(tmp_path.iterdir()) == [path]


def test_long_run_makes_a_bounded_report_and_keeps_spikes():
    rows = [{"step": step, "reward": 9.0 if step == 7777 else step % 7 / 7} for step in range(1, 20001)]
    html = render_report(rows, **DETAILS)
    assert len(html) < 300_000
    chart = build_sections(rows)[0][1][0]
    assert (7777, 9.0) in thin(chart.series[0].steps, chart.series[0].values)


def path_points(data):
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", data)]


def test_curve_is_drawn_where_the_values_are():
    svg = ElementTree.fromstring(render(Chart("c", (Series("a", range(21), [float(x) for x in range(21)]),))))
    (line,) = [path for path in svg.iter("path") if path.get("class") == "line c0"]
    left, right, bottom = LEFT, CHART_WIDTH - RIGHT, CHART_HEIGHT - BOTTOM
    expected = [(left + x / 20 * (right - left), bottom - x / 20 * (bottom - TOP)) for x in range(21)]
    for point, want in zip(path_points(line.get("d")), expected, strict=True):
        assert point == pytest.approx(want, abs=0.06)


def test_values_that_are_not_finite_leave_gaps():
    values = [1.0, math.nan, 2.0, math.inf, 1.0, 2.0] + [1.0] * 10
    svg = render(Chart("c", (Series("a", range(16), values),)))
    data = re.search(r'class="line c0" d="([^"]+)"', svg).group(1)
    assert data.count("M") == 3 and data.count("h0.01") == 2 and "nan" not in svg and "inf" not in svg
    assert "no finite values" in render(Chart("c", (Series("a", [1, 2], [math.nan] * 2),)))


def test_stacked_areas_add_up():
    series = (Series("a", [1, 2], [1.0, 2.0]), Series("b", [1, 2], [3.0, 2.0]))
    svg = ElementTree.fromstring(render(Chart("c", series, stacked=True)))
    low, high = (path_points(path.get("d")) for path in svg.iter("path"))
    assert low[0][1] > high[0][1] and high[0][1] == high[1][1]  # both sums are 4
    assert high[2:] == low[:2][::-1]  # b stands on a
    with pytest.raises(ValueError, match="share their steps"):
        render(Chart("c", (Series("a", [1], [1.0]), Series("b", [2], [1.0])), stacked=True))


def test_trailing_mean_passes_over_nan():
    assert trailing_mean([1.0, 3.0, math.nan, 5.0], 2) == [1.0, 2.0, 3.0, 5.0]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0, 1.0, [0.0, 0.5, 1.0]),
        (0.32, 0.66, [0.3, 0.4, 0.5, 0.6, 0.7]),
        (-3.0, 7.0, [-5.0, 0.0, 5.0, 10.0]),
        (2.0, 2.0, [1.8, 1.9, 2.0, 2.1, 2.2]),
    ],
)
def test_nice_ticks(low, high, ticks):
    assert nice_ticks(low, high) == pytest.approx(ticks)


def test_figure_is_a_document_of_its_own():
    charts = [Chart("one <&>", (Series("a", [1, 2], [1.0, 2.0]),))] * 3
    svg = ElementTree.fromstring(figure(charts, columns=2))
    assert svg.tag == "{http://www.w3.org/2000/svg}svg"
    assert len(svg.findall("{http://www.w3.org/2000/svg}svg")) == 3
    assert "prefers-color-scheme" in svg.find("{http://www.w3.org/2000/svg}style").text
