"""report.html in a real headless Chromium: its switches, its texts, what it asks of the network."""

from __future__ import annotations

import json
import re

import pytest

from siren_megatron.report import read_records, write_report, write_text
from siren_megatron.report.comparison import Run, render_comparison
from siren_megatron.token_record import TokenRecorder
from tests.browser import find_chromium, open_browser
from tests.token_records import Policy, config_of, make_step

HOSTILE = (
    "</script><script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\"><!--"
)
ROWS = [
    {"step": step, "reward": step / 10, "siren/entropy_masked": 0.9, "siren/entropy_anchor": 0.95, "lr": 1e-4}
    for step in range(1, 7)
]


class CharacterTokenizer:
    """Token i is the character i; so that a prompt and a response can be any text."""

    def decode(self, ids, skip_special_tokens=False):
        return "".join(map(chr, ids))


@pytest.fixture(scope="module")
def browser():
    executable = find_chromium()
    if executable is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium-headless-shell)")
    with open_browser(executable) as page:
        yield page


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Two steps of a policy that grows surer, the model's texts hostile to a page."""
    save = tmp_path_factory.mktemp("run")
    config = config_of(save, num_steps=6, record_interval=6, rollout_max_response_length=160)
    recorder = TokenRecorder(config)
    recorder.open(0, CharacterTokenizer(), [])
    groups = [
        ([ord(c) for c in prompt], [[ord(c) for c in text] for text in texts])
        for prompt, texts in (
            ("2 + 2 = " + HOSTILE, ["It is 4.\nDone", HOSTILE, "fünf", "4"]),
            ("Name a word", ["alpha beta gamma delta", "x" * 150, "beta", "gamma &amp; delta"]),
        )
    ]
    for step, sharpness in ((1, 2.0), (6, 6.0)):
        policy = Policy(300, sharpness)
        recorder.record(step, make_step(policy, groups, [1.0, 0, 0, 1, 0, 1, 0, 0]), policy)
    return config, read_records(save / "tokens.jsonl")


@pytest.fixture
def page(browser, records, tmp_path):
    """The report, open at a desktop's width in the light scheme; in the end it must not have complained."""
    config, lines = records
    details = {"config": config.flat(), "status": "finished", "paths": {"run": HOSTILE}, "num_steps": 6}
    path = write_report(tmp_path / "report.html", ROWS, records=lines, **details)
    browser.size(1280, 900)
    browser.scheme("light")
    browser.open(path)
    yield browser
    assert browser.requests == [path.resolve().as_uri()]
    assert browser.complaints == []


def style(page, selector, name):
    return page.run(
        f"getComputedStyle(document.querySelector({json.dumps(selector)})).getPropertyValue('{name}')"
    )


def colored(page):
    """Of each response, which of its tokens have a background of their own."""
    return page.run(
        "[...document.querySelectorAll('.response')].map(r => [...r.children].flatMap((t, i) =>"
        " getComputedStyle(t).backgroundColor === 'rgba(0, 0, 0, 0)' ? [] : [i]))"
    )


def text_of(page, selector):
    return page.run(f"document.querySelector({json.dumps(selector)}).textContent")


def all_responses(record):
    return [response for prompt in record["prompts"] for response in prompt["responses"]]


def test_texts_are_text_and_nothing_of_them_runs(page, records):
    last = records[1][-1]
    shown = page.run("[...document.querySelectorAll('.response')].map(r => r.textContent)")
    assert shown == ["".join(response["tokens"]) for response in all_responses(last)]
    assert HOSTILE in shown and "It is 4.\nDone" in shown
    assert page.run("[...document.querySelectorAll('.asked')].map(a => a.textContent)") == [
        prompt["prompt"] for prompt in last["prompts"]
    ]
    assert page.run("document.title") == HOSTILE.rsplit("/", 1)[-1] + " · siren-megatron"
    assert page.run("document.images.length") == 0
    assert page.run("document.querySelector('h1').textContent") in HOSTILE


def test_switches_by_keyboard_change_what_is_colored(page, records):
    last = records[1][-1]
    scale = page.run("records.scale")

    def strong(response, top_p, peak):
        values = response["top_p_entropy" if top_p else "entropy"]
        mask = response["peak" if top_p else "full_peak"]
        return [i for i, h in enumerate(values) if 10 * min(1, h / scale) >= 0.5 and (not peak or i in mask)]

    states = [(top_p, peak) for top_p in (True, False) for peak in (True, False)]
    expected = {state: [strong(r, *state) for r in all_responses(last)] for state in states}
    assert len(set(map(str, expected.values()))) == 4
    assert colored(page) == expected[True, True]
    for presses, name, after in (
        (1, "top-p", (False, True)),
        (2, "peak", (False, False)),
        (1, "top-p", (True, False)),
    ):
        page.run("document.getElementById('record').focus()")
        for _ in range(presses):
            page.press("Tab")
        assert page.run("document.activeElement.id") == name
        page.press(" ")
        assert page.run(f"document.getElementById('{name}').checked") is after[name == "peak"]
        assert colored(page) == expected[after]
    mean = last["regularised"]["top_p_entropy"]
    said = text_of(page, "#summary")
    assert said.startswith("Top-p mask alone: the top-p entropy of all")
    assert abs(float(re.search(r"H̄ = ([\d.]+)", said)[1]) - mean) < 1e-3


def test_the_peak_mask_is_marked_by_more_than_color(page):
    assert style(page, ".t.k", "font-weight") == "600" and "inset" in style(page, ".t.k", "box-shadow")
    assert style(page, ".t:not(.k)", "font-weight") == "400"
    page.run("document.getElementById('peak').click()")
    assert style(page, ".t.k", "box-shadow") == "none" and style(page, ".t.k", "font-weight") == "400"


def test_another_step_is_chosen_by_keyboard(page, records):
    first, last = records[1]
    histogram = "document.querySelectorAll('#positions .cell').length"
    cells = last["positions"]["histograms"]["top_p_entropy_peaks"]
    assert page.run(histogram) == len(cells) // 3
    page.run("document.getElementById('record').focus()")
    page.press("ArrowUp")
    assert page.run("document.getElementById('record').selectedOptions[0].textContent") == "1"
    assert page.run("record.step") == 1 == first["step"]
    assert page.run(histogram) == len(first["positions"]["histograms"]["top_p_entropy_peaks"]) // 3
    assert f"H̄ = {first['regularised']['top_p_entropy_peaks']}" in text_of(page, "#summary")
    often = page.run("[...document.querySelectorAll('.often li')].map(li => li.textContent)")
    assert often == [f"“{t}” {n} of {m}".replace("\n", "⏎") for t, n, m in first["often"]["top_p_entropy"]]
    rows = page.run(
        "[...document.querySelectorAll('#positions-table tbody tr')].map(r => r.cells[1].textContent)"
    )
    assert rows == [str(n) for n in first["positions"]["tokens"]]


def test_tokens_are_described_to_keyboard_and_pointer(page, records):
    response = all_responses(records[1][-1])[0]
    page.run("document.querySelector('.response').focus()")
    page.press("ArrowRight")
    page.press("ArrowRight")
    said = text_of(page, "#tip")
    assert f"“{response['tokens'][1]}” at position 2" in said
    for name in ("entropy", "top_p_entropy"):
        assert f"{float(f'{response[name][1]:.4g}'):g} nats" in said
    assert ("in the peak maskyes" in said) == (1 in response["peak"])
    spoken = text_of(page, "#said[role=status]")
    assert spoken.startswith(f"“{response['tokens'][1]}” at position 2, entropy, ")
    shown = page.run("document.querySelectorAll('#tip .likeliest .row').length")
    assert shown == len(response["likeliest"][1]) // 2
    outside = page.run("document.querySelectorAll('#tip .likeliest .out').length")
    size = response["nucleus"][1]
    assert outside == (0 if size is None else max(0, shown - size))
    page.press("Escape")
    assert page.run("tip.style.display") == "none"
    page.point(".response .t:nth-child(4)")
    assert f"“{response['tokens'][3]}” at position 4" in text_of(page, "#tip")


def test_controls_have_names_and_states_for_assistive_technology(page):
    page.run("document.getElementById('peak').click()")
    tree = [node for node in page.call("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]]
    named = [(node["role"]["value"], node.get("name", {}).get("value")) for node in tree]
    states = {
        node["name"]["value"]: {p["name"]: p["value"].get("value") for p in node["properties"]}["checked"]
        for node in tree
        if node["role"]["value"] == "switch"
    }
    assert states == {"Top-p mask p₀ = 0.8": "true", "Peak mask quantile 0.8": "false"}
    assert ("combobox", "Step") in named and ("table", "Responses to prompt 2") in named
    assert named.count(("columnheader", "Response")) == 2
    response = "Response 1 to prompt 1: reward 1; the arrow keys go through its tokens"
    assert ("group", response) in named
    focusable = [node for node in tree if any(p["name"] == "focusable" for p in node.get("properties", []))]
    assert all(node.get("name", {}).get("value") for node in focusable)


def test_curves_answer_to_keyboard_and_pointer(page):
    page.run("document.querySelector('svg[data-chart]').focus()")
    page.press("End")
    assert text_of(page, "#tip") == "step 6reward0.6"
    page.press("ArrowLeft")
    assert text_of(page, "#tip") == "step 5reward0.5"
    page.point("svg[data-chart='1']")
    said = text_of(page, "#tip")
    assert (
        said.startswith("step ") and "siren/entropy_masked0.9" in said and "siren/entropy_anchor0.95" in said
    )


@pytest.mark.parametrize("width", [1280, 360])
def test_schemes_and_widths(page, width):
    page.size(width, 800)
    light = style(page, "body", "background-color"), style(page, ".t.k", "color")
    page.scheme("dark")
    assert style(page, "body", "background-color") != light[0] and style(page, ".t.k", "color") != light[1]
    assert page.run("document.documentElement.scrollWidth <= innerWidth"), "the page itself scrolls sideways"
    assert page.run("document.querySelector('#positions svg').viewBox.baseVal.width") < width


def test_the_content_policy_refuses_what_gets_past_the_escaping(browser, page, tmp_path):
    """The same page with an image and a handler in its markup: both are refused, and said to be."""
    path = tmp_path / "tampered.html"
    extra = "<img src='http://127.0.0.1:9/x.png'><script>document.title='taken'</script>"
    path.write_text((tmp_path / "report.html").read_text().replace("</main>", extra + "</main>"))
    browser.open(path)
    assert page.run("document.title").endswith("siren-megatron")
    refused = "\n".join(browser.complaints)
    assert "script-src" in refused and ("default-src" in refused or "img-src" in refused)
    browser.open(tmp_path / "report.html")


def test_several_runs_in_one_page(browser, records, tmp_path):
    lines = records[1]
    other = [{**row, "reward": row["reward"] / 2, "eval/pass@8": 0.5} for row in ROWS[:4]]
    runs = [
        Run("<i>GRPO", ROWS, {"entropy_method": "none", "lr": 1e-4}, "finished", lines[:1]),
        Run("SIREN", other, {"entropy_method": "siren", "lr": 1e-4}, "running", lines),
    ]
    path = write_text(tmp_path / "both.html", render_comparison(runs))
    browser.open(path)
    assert browser.requests == [path.resolve().as_uri()] and browser.complaints == []
    cells = browser.run(
        "[...document.querySelectorAll('#configuration th, #configuration td')].map(c => c.textContent)"
    )
    assert cells == ["Option", "<i>GRPO", "SIREN", "--entropy-method", "none", "siren"]
    names = browser.run("[...document.getElementById('record').options].map(o => o.textContent)")
    assert names == ["<i>GRPO, step 1", "SIREN, step 1", "SIREN, step 6"]
    browser.run("document.querySelector('svg[data-chart]').focus()")
    browser.press("Home")
    assert text_of(browser, "#tip") == "step 1<i>GRPO0.1SIREN0.05"
    browser.press("End")
    assert text_of(browser, "#tip") == "step 6<i>GRPO0.6"
