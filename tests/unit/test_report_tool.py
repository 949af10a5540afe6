"""tools/report.py: a run's report from its files alone, several runs in one page, mistakes in one line."""

import io
import json
import math

import pytest
from rich.console import Console

from siren_megatron.metrics import MetricsLogger
from siren_megatron.report import RECORD_NAME, read_run
from siren_megatron.report.comparison import (
    MAX_RUNS,
    Run,
    comparison_sections,
    differences,
    last_values,
    render_comparison,
)
from tests.unit.test_report import Page, a_record, data_of
from tools.report import main

CONFIG = {"lr": 1e-4, "save": "/elsewhere", "entropy_method": "siren", "siren_anchor": True}


def write_run(path, reward=0.0, steps=3, **config):
    """A run as the program leaves it."""
    console = Console(file=io.StringIO())
    with MetricsLogger(
        path, steps, config={**CONFIG, "save": str(path), **config}, console=console
    ) as logger:
        for step in range(1, steps + 1):
            logger.log(step, {"reward": reward + step / 10, "lr": 1e-4})
    return str(path)


def test_a_report_is_drawn_anew_from_the_runs_files(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    written = (tmp_path / "run" / "report.html").read_text()
    (tmp_path / "run" / RECORD_NAME).write_text(json.dumps(a_record(["x"]), separators=(",", ":")) + "\n")
    (tmp_path / "run" / "report.html").unlink()
    assert main([run]) == 0
    path = tmp_path / "run" / "report.html"
    assert capsys.readouterr().out == f"{path}\n"
    page = Page(path.read_text())
    assert data_of(page)["curves"] == data_of(Page(written))["curves"]
    assert data_of(page)["record-0"] == a_record(["x"]) and "records" not in data_of(Page(written))
    assert "finished" in page.text["span"] and "--lr" in page.text["th"]
    assert read_run(tmp_path / "run")["versions"].keys() >= {"python", "torch"}
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_the_runs_description_follows_its_status(tmp_path):
    logger = MetricsLogger(tmp_path, 5, config=CONFIG, console=Console(file=io.StringIO()))
    assert read_run(tmp_path)["status"] == "running"
    logger.close("failed: OSError: x")
    run = read_run(tmp_path)
    assert (run["status"], run["num_steps"], run["config"]) == ("failed: OSError: x", 5, CONFIG)


def test_runs_of_old_versions_have_no_description(tmp_path):
    run = write_run(tmp_path / "run")
    (tmp_path / "run" / "run.json").unlink()
    assert main([run, "--output", str(tmp_path / "new.html")]) == 0
    assert "unknown" in Page((tmp_path / "new.html").read_text()).text["span"]


def test_several_runs(tmp_path):
    runs = [write_run(tmp_path / "a" / "x"), write_run(tmp_path / "b" / "x", 0.5, 4, siren_anchor=False)]
    output = tmp_path / "deep" / "er" / "both.html"
    assert main([*runs, "--labels", "one", "<two>", "--output", str(output)]) == 0
    page = Page(output.read_text())
    (reward,) = [c for c in data_of(page)["curves"] if c["values"][0] == [0.1, 0.2, 0.3, None]]
    assert reward["names"] == ["one", "<two>"] and reward["steps"] == [1, 2, 3, 4]
    assert reward["values"][1] == pytest.approx([0.6, 0.7, 0.8, 0.9])
    cells = page.text["td"]
    assert cells[:2] == ["on", "off"] and "--siren-anchor" in page.text["th"]  # the only difference
    assert cells[2:6] == ["0.2", "0.75", "0.0001", "0.0001"]  # means of reward and lr


def runs_of(*rows, **config):
    return [
        Run(f"r{i}", [{"step": s, **row} for s, row in enumerate(r, 1)], config) for i, r in enumerate(rows)
    ]


def test_last_values_are_means_of_ten_steps_and_evaluations_the_last():
    long = [{"reward": float(s)} for s in range(30)]
    long[29] |= {"eval/pass@8": 0.5, "time/step": 2.0, "time/train": 1.0}
    long[3] |= {"eval/avg@8": 0.25}
    long[28]["reward"] = math.nan
    rows = last_values(runs_of(long, [{"kl_old_new": math.inf}]))
    assert rows == [
        ["reward", "24.11", "–"],  # 20 to 29 without 28
        ["eval/avg@8", "0.25", "–"],
        ["eval/pass@8", "0.5", "–"],
        ["kl_old_new", "–", "NaN"],
        ["time/step", "2", "–"],
    ]


def test_a_run_has_one_color_in_all_charts():
    sections = comparison_sections(runs_of([{"reward": 1.0}], [{"other": 2.0}], [{"reward": 3.0}]))
    assert [title for title, _ in sections] == ["Reward", "Further metrics"]
    for _, (chart,) in sections:
        assert [series.name for series in chart.series] == ["r0", "r1", "r2"]
    values = [list(series.values) for series in sections[0][1][0].series]
    assert values == [[1.0], [], [3.0]]


def test_differences_leave_out_paths_and_runs_without_options():
    runs = [
        Run("a", [], {"lr": 1.0, "save": "x", "prompt_data": ["p", "q"], "seed": 1}),
        Run("b", []),
        Run("c", [], {"lr": 1.0, "save": "y", "prompt_data": "p", "new": None}),
    ]
    assert differences(runs) == [["--prompt-data", "p, q", "p"], ["--seed", "1", "–"], ["--new", "–", "none"]]
    assert "Without a run.json: b." in render_comparison(runs)
    assert "The runs have the same options." in render_comparison(runs_of([], [], lr=1.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a"], "a: not the directory of a run"),
        (["run", "--output", "x.svg"], "must end in .html"),
        (["run", "--labels", "x"], "--labels needs several runs"),
        (["run", "run"], "--output is needed with several runs"),
        (["run", "run", "--output", "x.html"], "runs of the same name"),
        (["run", "run", "--labels", "x", "--output", "x.html"], "--labels has 1 names for 2 runs"),
        (["run"] * (MAX_RUNS + 1) + ["--output", "x.html"], f"at most {MAX_RUNS}"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.glob("x.*"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("run.json", "{", "run.json: not valid JSON"),
        ("run.json", "[]", "run.json: not a JSON object"),
        ("run.json", '{"config": 3}', "run.json: 'config' is missing or no dict"),
        ("tokens.jsonl", "noise\n", "tokens.jsonl:1: not a record"),
        ("tokens.jsonl", '{"step":1,}\n', "tokens.jsonl:1: not a record of tokens: "),
        ("tokens.jsonl", '{"step":1,"prompts":[]}\n', "tokens.jsonl:1: 'positions' is missing or no dict"),
        ("metrics.jsonl", "{}\n", "metrics.jsonl:1: not a row"),
    ],
)
def test_a_broken_file_is_named(tmp_path, capsys, name, text, message):
    run = write_run(tmp_path / "run")
    (tmp_path / "run" / name).write_text(text)
    assert main([run]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
