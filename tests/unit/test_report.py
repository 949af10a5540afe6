"""report.html and the SVG charts: they parse, hold the run's data, and reach for nothing outside."""

import base64
import hashlib
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
    THEME_CSS,
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
from siren_megatron.report.page import asset
from siren_megatron.report.tokens import color_scale

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

    VOID = {"meta", "line", "path", "rect", "br", "input"}

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


def data_of(page):
    """name -> value of the page's JSON."""
    blocks = [a["id"] for tag, a in page.tags if tag == "script" and "id" in a]
    texts = page.text["script"][: len(blocks)]
    return {name.removeprefix("data-"): json.loads(t) for name, t in zip(blocks, texts, strict=True)}


def a_record(tokens, prompt="p", entropy=None):
    """A record with one response, with what Python reads of it."""
    response = {"tokens": tokens, "entropy": entropy or [0.5] * len(tokens)}
    prompts = [{"prompt": prompt, "responses": [response]}]
    return {"step": 7, "prompts": prompts, "positions": {}, "regularised": {}, "often": {}, "texts": []}


def test_report_holds_the_data_of_every_metric():
    page = Page(render_report(ROWS, **DETAILS))
    charts = data_of(page)["curves"]
    curves = {
        name: (chart["steps"], values)
        for chart in charts
        for name, values in zip(chart["names"], chart["values"], strict=True)
    }
    assert curves["reward"] == ([1, 2, 3, 4, 5], [row["reward"] for row in ROWS])
    assert curves["made_up"][1] == [1.0, "NaN", 3.0, 4.0, 5.0]
    assert curves["eval/pass@8"] == ([2], [0.5])
    assert curves["time/other"][1] == [0.5] * 5
    drawn = [attributes for tag, attributes in page.tags if tag == "svg" and "data-chart" in attributes]
    assert [int(attributes["data-chart"]) for attributes in drawn] == list(range(len(charts)))
    named = set(curves)
    assert named == (set().union(*ROWS) - {"step", "wall_time", "time/step"}) | {"time/other"}


def test_report_shows_configuration_and_paths_as_text_not_as_markup():
    page = Page(render_report(ROWS, **DETAILS))
    cells = page.text["td"]
    assert "</table><script>alert(1)</script>" in cells and "0.0001" in cells and "/runs/<b>one" in cells
    assert not any("alert" in text for text in page.text["script"])
    assert "torch" in page.text["th"] and "finished" in page.text["span"]


def test_what_differs_from_the_defaults_comes_first():
    config = {"lr": 1e-4, "seed": 1234, "hf_checkpoint": "/m", "entropy_top_p": 1.0, "wandb_project": None}
    cells = Page(render_report(ROWS, **{**DETAILS, "config": config})).text
    options = [text for text in cells["th"] if text.startswith("--")]
    assert options == ["--lr", "--hf-checkpoint", "--entropy-top-p", "--seed", "--wandb-project"]
    assert cells["td"][:6] == ["0.0001", "1e-06", "/m", "required", "1.0", "0.8"]
    assert "The 2 options at their defaults" in cells["summary"]


def test_the_policy_of_the_page_lets_its_own_script_and_style_run_and_nothing_else():
    html = render_report(ROWS, **DETAILS)
    page = Page(html)
    (policy,) = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    for tag, rule in (("style", "style-src"), ("script", "script-src")):
        text = page.text[tag][-1]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"
    assert not [a for _, a in page.tags if "style" in a or any(name.startswith("on") for name in a)]


def test_text_of_a_model_cannot_leave_its_script_element():
    hostile = "</script><script>alert(1)</script><!--<script>"
    record = a_record(tokens=[hostile, "\ud800", "\u2028"], prompt=hostile)
    page = Page(render_report(ROWS, **DETAILS, records=[record]))
    data = data_of(page)
    assert data["record-0"] == record and data["records"]["list"] == ["7"]
    assert len(page.text["script"]) == len([tag for tag, _ in page.tags if tag == "script"]) == len(data) + 1


def test_color_scale_is_the_99th_percentile_of_all_records():
    low = a_record(tokens=["x"] * 99, entropy=[0.2] * 98 + [None])
    assert color_scale([low]) == 0.2
    assert color_scale([low, a_record(tokens=["x"] * 2, entropy=[1.234, 9.0])]) == 1.2
    assert color_scale([a_record(tokens=["x"], entropy=[0.0])]) == 0.1 == color_scale([])


def contrast(first, second):
    """WCAG's ratio of two colours, (r, g, b) of 0 to 255."""

    def luminance(color):
        linear = [c / 3294.6 if c <= 10.31 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in color]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_in_both_schemes(scheme):
    css = THEME_CSS + asset("page.css")
    found = {}
    blocks = re.findall(r"(@media \(prefers-color-scheme: dark\) \{ )?:root \{(.*?)\}", css, re.DOTALL)
    for dark, block in blocks:
        if scheme == "dark" or not dark:
            found.update(re.findall(r"--([\w-]+): #(\w{6})", block))
    color = {name: tuple(bytes.fromhex(value)) for name, value in found.items()}
    pairs = [("ink", "card"), ("muted", "card"), ("muted", "page"), ("focus", "card"), ("focus", "page")]
    pairs += [("mute-ink", "card"), ("ink", "heat")]
    ratios = {pair: contrast(color[pair[0]], color[pair[1]]) for pair in pairs}
    assert not {pair: ratio for pair, ratio in ratios.items() if ratio < 4.5}
    # Any strength of the tokens' colour, mixed into the card as CSS mixes sRGB.
    for n in range(11):
        mixed = tuple(
            h * n / 10 + c * (1 - n / 10) for h, c in zip(color["heat"], color["card"], strict=True)
        )
        assert contrast(color["ink"], mixed) >= 4.5
    assert contrast(color["peak"], color["card"]) >= 3  # the line below chosen tokens


def test_report_names_no_address_outside():
    html = render_report(ROWS, **DETAILS).replace(
        "http://www.w3.org/2000/svg", ""
    )  # a namespace, not fetched
    assert not re.search(r"https?:|src=|href=[^\"]|href=\"[^#]|url\(|@import", html)


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


def test_a_logarithmic_axis_shows_the_numbers_themselves():
    svg = ElementTree.fromstring(
        render(Chart("c", (Series("a", [-2.3, -1.0, 0.0], [1.0, 2.0, 3.0]),), x_label="beta", x_base=10))
    )
    below = [text for text in svg.iter("text") if text.get("y") == str(CHART_HEIGHT - BOTTOM + 17)]
    assert [text.text for text in below] == ["0.01", "0.1", "1", "beta"]
    assert float(below[1].get("x")) == pytest.approx(
        LEFT + 1.3 / 2.3 * (CHART_WIDTH - LEFT - RIGHT), abs=0.06
    )


def test_a_long_legend_goes_on_in_the_next_line():
    def chart(count):
        series = tuple(Series(f"method-number-{n}", [1, 2], [0.0, 1.0]) for n in range(count))
        return ElementTree.fromstring(render(Chart("c", series)))

    names = [
        (text.get("y"), float(text.get("x")))
        for text in chart(6).iter("text")
        if text.get("class") == "legend"
    ]
    assert [y for y, _ in names] == ["43"] * 3 + ["59"] * 3
    assert names[0][1] == names[3][1] and max(x for _, x in names) + 6 * len("method-number-0") < CHART_WIDTH
    tops = [float(chart(count).get("data-y").split()[3]) for count in (3, 6)]
    assert tops[1] - tops[0] == 16, "the plot begins below the legend"


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
