"""tools/plot_run.py: one chart a metric, one curve a run, errors in one line."""

import json
import xml.etree.ElementTree as ElementTree

import pytest

from tools.plot_run import main

SVG = "{http://www.w3.org/2000/svg}"


def write_run(path, offset):
    path.parent.mkdir(parents=True)
    rows = [
        {"step": s, "reward": s / 10 + offset, "siren/entropy_masked": 0.9, "siren/entropy_anchor": 1.0}
        for s in (1, 2)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def drawn(path):
    charts = ElementTree.parse(path).getroot().findall(f"{SVG}svg")
    texts = [[text.text for text in chart.iter(f"{SVG}text")] for chart in charts]
    return [(chart.get("aria-label"), text) for chart, text in zip(charts, texts, strict=True)]


def test_one_run_with_its_anchor(tmp_path, capsys):
    run, output = write_run(tmp_path / "a/metrics.jsonl", 0), tmp_path / "deep/er/run.svg"
    assert main([run, "--output", str(output)]) == 0
    assert capsys.readouterr().out == f"{output}\n"
    (reward, _), (masked, legend) = drawn(output)
    assert (reward, masked) == ("Mean reward", "Masked entropy (nats)")
    assert {"masked", "anchor"} <= set(legend)


def test_two_runs_named_by_label_or_directory(tmp_path):
    runs = [write_run(tmp_path / name / "metrics.jsonl", offset) for name, offset in (("a", 0), ("b", 1))]
    output = tmp_path / "run.svg"
    assert main([*runs, "--output", str(output), "--metrics", "reward"]) == 0
    ((_, legend),) = drawn(output)
    assert {"a", "b"} <= set(legend)
    assert main([*runs, "--labels", "GRPO", "SIREN", "--output", str(output)]) == 0
    assert {"GRPO", "SIREN"} <= set(drawn(output)[1][1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "run.png"], "must end in .svg"),
        (["--output", "run.svg", "--labels", "a", "b"], "--labels has 2 names for 1 runs"),
        (["--output", "run.svg", "--metrics", "none"], "none of none is in the given runs"),
        (["--output", "run.svg", "--columns", "0"], "--columns must be at least 1"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main([write_run(tmp_path / "a/metrics.jsonl", 0), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.glob("run.*"))


def test_missing_file(tmp_path, capsys):
    assert main([str(tmp_path / "none.jsonl"), "--output", str(tmp_path / "run.svg")]) == 2
    assert "none.jsonl" in capsys.readouterr().err
