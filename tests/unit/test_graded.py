"""Grading and grouping in the real pool; files of samples; the report's numbers."""

from __future__ import annotations

import json

import pytest

from siren_megatron.evaluation.command import find_checkpoint
from siren_megatron.evaluation.graded import GradedProblem, Grader, Problem
from siren_megatron.evaluation.results import summarise, write_files
from siren_megatron.evaluation.sample_files import SampleWriter, read_samples
from tools import evaluate

BOXED = r"So \boxed{%s}."
PROBLEMS = [
    Problem("p0", r"\frac{1}{2}", tuple(BOXED % a for a in ("0.5", "1/2", "2", "2.0", "3", r"\sqrt{4}"))),
    Problem("p1", "4", ("no answer here", "", BOXED % "x+x", BOXED % "2x", BOXED % "4", BOXED % "5")),
]


@pytest.fixture(scope="module")
def graded():
    with Grader("math", num_workers=1) as grader:
        return grader.grade(PROBLEMS)


def test_equal_answers_are_one_group(graded):
    first, second = graded
    assert first.correct == (True, True, False, False, False, False)
    # 0.5 = 1/2 are right, 2 = 2.0 = sqrt(4), and 3.
    assert first.groups == (0, 0, 1, 1, 2, 1)
    assert (first.num_distinct, first.num_distinct_correct) == (3, 1)
    assert sorted(first.clusters) == [(1, False), (2, True), (3, False)]
    assert second.correct == (False, False, False, False, True, False)
    assert second.answers[:2] == (None, None)
    assert second.groups == (0, 1, 2, 2, 3, 4), "those without an answer are alone, x+x is 2x"
    assert second.num_distinct == 3


def test_the_summary_by_hand(graded):
    metrics = summarise("b", graded).metrics
    assert metrics["avg@6"].value == pytest.approx((2 / 6 + 1 / 6) / 2)
    # p0's majority is the wrong 2; p1's is x+x.
    assert metrics["maj@6"].value == 0
    assert metrics["maj@1"].value == pytest.approx(metrics["avg@6"].value)
    assert metrics["pass@1"].value == pytest.approx(metrics["avg@6"].value)
    assert metrics["pass@2"].value == pytest.approx((1 - (4 * 3) / (6 * 5) + 1 / 3) / 2)
    assert metrics["pass@6"].value == 1
    assert [name for name in metrics if name.startswith("pass@")] == [f"pass@{k}" for k in range(1, 7)]
    assert metrics["without answer"].value == pytest.approx(1 / 6)
    assert metrics["distinct answers"].value == 3
    assert metrics["avg@6"].low <= metrics["avg@6"].value <= metrics["avg@6"].high


def test_a_tie_counts_by_its_share():
    tied = GradedProblem(Problem("", "", ("a", "b")), (True, False), ("a", "b"), (0, 1))
    assert summarise("b", [tied]).metrics["maj@2"].value == 0.5


def test_texts_are_the_answers_of_other_rewards():
    responses = ("12 - 5 = 7 7 × 2 = 14", "2 × 12 = 24 24 - 5 = 19", "12 - 5 = 7 7 × 2 = 14", "2 × 7 = 14")
    with Grader("countdown", num_workers=1) as grader:
        (one,) = grader.grade([Problem("", "Make 14 from 2 5 12:", responses)])
    assert one.correct == (True, False, True, False) and one.groups == (0, 1, 0, 2)


def test_files_of_results_hold_the_same_numbers(graded, tmp_path):
    summary = summarise("b", graded)
    write_files(tmp_path, [summary], {"seed": 0}, {"timeouts": 0})
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["benchmarks"]["b"]["metrics"]["pass@3"]["value"] == summary.metrics["pass@3"].value
    rows = [line.split(",") for line in (tmp_path / "results.csv").read_text().splitlines()]
    assert len(rows) == 1 + len(summary.metrics)
    assert ["b", "2", "6", "maj@6", "0.0", "0.0", "0.0"] in rows
    assert "| pass@6 | 1 [1, 1] |" in (tmp_path / "results.md").read_text()


def test_a_torn_line_is_sampled_again_and_the_rest_is_kept(tmp_path):
    path, prompts = tmp_path / "s.jsonl", [("p0", "1"), ("p1", "2"), ("p2", "3")]
    writer = SampleWriter(path, prompts, 2)
    writer.write(2, ["a", "\ud800"], [1, 2], [False, True])
    writer.write(0, ["c", "d"], [3, 4], [False, False])
    writer.close()
    with path.open("a") as file:
        file.write('{"index": 1, "prob')
    again = SampleWriter(path, prompts, 2)
    assert sorted(again.done) == [0, 2]
    again.write(1, ["e", "f"], [5, 6], [True, True])
    again.close()
    assert [problem.answer for problem in again.problems()] == ["1", "2", "3"]
    assert again.problems()[2] == Problem("p2", "3", ("a", "\ud800"), (1, 2), (False, True))
    assert len(path.read_text().splitlines()) == 3
    for other in ([("p0", "1"), ("p1", "2"), ("p2", "4")], prompts[:2]):
        with pytest.raises(ValueError, match="--output: .*line .* is not a sample of this evaluation"):
            SampleWriter(path, other, 2)
    with pytest.raises(ValueError, match="is not a sample of this evaluation"):
        SampleWriter(path, prompts, 3)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_samples_are_graded_without_a_model(tmp_path, capsys):
    hanging = r"\boxed{\prod_{n=1}^{10^{7}} \left(1+\frac{x}{n}\right)}"
    rows = [
        {"problem": "a", "answer": "7", "responses": [r"\boxed{7}", "The answer is 8.", ""]},
        {"problem": "b", "answer": "x^2-1", "responses": [r"\boxed{(x-1)(x+1)}", hanging]},
        {"problem": "c", "answer": 2.5, "responses": []},
        {"question": "d", "answer": "It is 5. #### 5", "responses": ["#### 5"]},
    ]
    samples = write_jsonl(tmp_path / "samples.jsonl", rows)
    output = tmp_path / "out"
    assert evaluate.main(["--from-samples", str(samples), "--output", str(output)]) == 0
    (found,) = output.rglob("*.jsonl")
    graded = [json.loads(line) for line in found.read_text().splitlines()]
    assert [row["correct"] for row in graded] == [[True, False, False], [True, False], [], [True]]
    assert [row["problem"] for row in graded] == ["a", "b", "c", "d"]
    assert "avg@1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no records in it"),
        ("{", "line 1: not JSON"),
        ("[]", "line 1: not a JSON object but list"),
        ('{"answer": "1"}', "line 1: field 'responses' is not a list of texts"),
        ('{"answer": "1", "responses": [1]}', "line 1: field 'responses' is not a list of texts"),
        ('{"responses": ["1"]}', "line 1: no field 'answer'"),
        ('\n{"answer": {}, "responses": ["1"]}', "line 2: field 'answer' is not text but dict"),
        ('{"answer": "1", "responses": ["1"], "lengths": []}', "line 1: field 'lengths'"),
    ],
)
def test_wrong_files_of_samples_are_refused(tmp_path, capsys, text, message):
    path = tmp_path / "s.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match="--from-samples"):
        read_samples(path)
    assert evaluate.main(["--from-samples", str(path), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of the arguments --checkpoint --server --from-samples is required"),
        (["--checkpoint", "x", "--server", "y"], "not allowed with"),
        (["--checkpoint", "x"], "--data: which benchmarks?"),
        (["--checkpoint", "x", "--data", "none.jsonl"], "--data none.jsonl: No such file"),
        (["--checkpoint", "x", "--data", "DATA"], "--checkpoint x: no such directory"),
        (["--checkpoint", "DIR", "--data", "DATA"], "neither a Hugging Face nor a Megatron checkpoint"),
        (["--checkpoint", "x", "--data", "DATA", "DATA"], "have the same name"),
        (["--checkpoint", "x", "--data", "DATA", "--temperature", "0"], "--temperature 0 is greedy"),
        (["--checkpoint", "x", "--data", "DATA", "--top-p", "0"], "--top-p must be"),
        (["--checkpoint", "x", "--data", "DATA", "--num-samples", "0"], "--num-samples must be at least 1"),
        (["--checkpoint", "x", "--data", "DATA", "--nonsense"], "unrecognized arguments: --nonsense"),
        (["--server", "ftp://x", "--data", "DATA"], "--server ftp://x: not of the form"),
        (["--checkpoint", "x", "--data", "DATA", "--prompt-template", "x"], "--prompt-template"),
        (["--checkpoint", "x", "--data", "DATA", "--reward-function", "x"], "--reward-function x"),
    ],
)
def test_wrong_options_end_with_one_line(tmp_path, capsys, arguments, message):
    data = write_jsonl(tmp_path / "d.jsonl", [{"problem": "1+1", "answer": "2"}])
    arguments = [{"DATA": str(data), "DIR": str(tmp_path)}.get(a, a) for a in arguments]
    assert evaluate.main([*arguments, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("evaluate.py: error:") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_checkpoint_that_a_path_stands_for(tmp_path):
    run = tmp_path / "run"
    for step in (2, 10):
        checkpoint = run / "checkpoints" / f"step_{step:06d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "metadata.json").write_text("{}")
    (run / "checkpoints" / "step_000012.partial").mkdir()
    newest = run / "checkpoints" / "step_000010"
    with pytest.raises(ValueError, match="--checkpoint .*step_000010 holds no config.json.*--config-from"):
        find_checkpoint(run, None)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    assert find_checkpoint(run, model) == (newest, model)
    (run / "hf").mkdir()
    (run / "hf" / "config.json").write_text("{}")
    assert find_checkpoint(run, None) == (newest, run / "hf")
    assert find_checkpoint(newest, model) == (newest, model)
    (model / "model.safetensors").touch()
    assert find_checkpoint(model, None) == (model, None)
    (run / "checkpoints" / "step_000010" / "metadata.json").unlink()
    with pytest.raises(ValueError, match="neither a Hugging Face nor a Megatron checkpoint nor a run"):
        find_checkpoint(run, None)
