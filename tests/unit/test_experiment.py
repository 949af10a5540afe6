"""The Countdown experiment: records, paired differences, what is a decision, options that are options."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from siren_megatron import toy_model
from siren_megatron.config import parse_args
from siren_megatron.rewards import countdown, rewrite
from tests.checkpoints import write_prompts

REPOSITORY = Path(__file__).resolve().parents[2]
EXPERIMENT = REPOSITORY / "examples" / "experiments" / "countdown"
ARCHITECTURE = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 1024,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
}


@pytest.fixture
def experiment(monkeypatch):
    """The experiment's modules, which import each other by their bare names."""
    monkeypatch.syspath_prepend(str(EXPERIMENT))
    names = [path.stem for path in EXPERIMENT.glob("*.py")]
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    import analyse
    import decisions
    import figures
    import matrix
    import record
    import run
    import temperatures

    yield {
        "analyse": analyse,
        "decisions": decisions,
        "figures": figures,
        "matrix": matrix,
        "record": record,
        "run": run,
        "temperatures": temperatures,
    }
    for name in names:
        sys.modules.pop(name, None)


def write_run(record, results, method, seed, correct):
    """A record with 4 responses to each prompt, `correct` of them right and all of those different."""
    directory = results.parent / f"{method}{seed}"
    directory.mkdir()
    rows = [
        {"correct": [i < c for i in range(4)], "groups": [0, 1, 2, 2] if c < 3 else [0, 1, 2, 3]}
        for c in correct
    ]
    (directory / "graded.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    steps = [
        {"step": step, "entropy": 0.5 / step, "siren/entropy_masked": 1.0, "reward": 0.1 * step, "lr": 1e-4}
        for step in (1, 2)
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
    record.write_record(
        record.path_of(results, method, seed),
        graded=directory / "graded.jsonl",
        metrics=directory / "metrics.jsonl",
        about={"method": method, "seed": seed},
    )


def test_a_record_holds_what_the_estimators_need(experiment, tmp_path):
    record = experiment["record"]
    write_run(record, tmp_path / "results", "grpo", 1, [0, 1, 2, 4])
    kept = json.loads(record.path_of(tmp_path / "results", "grpo", 1).read_text())
    assert kept["correct"] == [0, 1, 2, 4] and kept["distinct_correct"] == [0, 1, 2, 4]
    assert kept["curves"] == {
        "entropy": [[1, 0.5], [2, 0.25]],
        "siren/entropy_masked": [[1, 1.0], [2, 1.0]],
        "reward": [[1, 0.1], [2, 0.2]],
    }
    values = record.per_prompt(kept)
    assert values["avg"].tolist() == [0, 0.25, 0.5, 1]
    # Of 4 responses with c right, all pairs: 1 - (4-c)(3-c)/12.
    np.testing.assert_allclose(values["pass@2"], [0, 0.5, 5 / 6, 1])
    assert values["pass@4"].tolist() == [0, 1, 1, 1]
    # Votes: a wrong pair against single ones; then 2 right ones against a wrong pair; then four right ones.
    assert values["maj@32"].tolist() == [0, 0, 0, 1]


def test_differences_are_paired_by_seed_and_prompt(experiment, tmp_path):
    record, results = experiment["record"], tmp_path / "results"
    write_run(record, results, "grpo", 1, [0, 2])
    write_run(record, results, "grpo", 2, [4, 2])
    write_run(record, results, "siren-0.1", 2, [4, 4])
    write_run(record, results, "siren-0.1", 3, [1, 1])
    found = experiment["analyse"].Results(results, ["siren-0.1", "grpo", "kl-cov"])
    assert found.seeds == {"siren-0.1": [2, 3], "grpo": [1, 2]}
    assert found.difference("siren-0.1", "grpo", "avg").tolist() == [[0.0, 0.5]], "seed 2 is what both have"
    assert found.last("grpo", "entropy") == pytest.approx(0.375)
    written = experiment["analyse"].analyse(results)
    table = (results / "results.md").read_text()
    assert results / "curves.svg" in written and "| siren-0.1 | +0.250 [+0.000, +0.500]" in table
    assert experiment["analyse"].analyse(tmp_path / "nothing") == []


def test_an_exploded_method_is_drawn_once(experiment):
    def run(*entropy):
        return {"curves": {"entropy": [[n, value] for n, value in enumerate(entropy)], "reward": [[0, 1.0]]}}

    records = {"naive-0.05": [run(0.4, 6.9)], "grpo": [run(0.4, 0.2)], "siren-0.1": [run(0.4, 0.3)]}
    drawn = experiment["figures"].curves(records)
    assert drawn.count(">naive-0.05<") == 1 and drawn.count(">siren-0.1<") == 3
    assert "exploded runs too" in drawn
    del records["naive-0.05"]
    assert "exploded" not in experiment["figures"].curves(records)


@pytest.mark.parametrize("task", [countdown, rewrite])
def test_legal_words_are_those_of_the_well_formed_responses(experiment, task):
    legal_words = experiment["decisions"].legal_words
    for instance in task.enumerate_instances()[::300]:
        legal = legal_words(task, instance)
        for response in task.solve(instance):
            words = [*(f" {word}" for word in response.split()), countdown.END_OF_TEXT]
            assert all(word in legal[tuple(words[:n])] for n, word in enumerate(words))
            assert tuple(words) not in legal
    if task is countdown:
        legal = legal_words(task, countdown.parse_instance("Make 36 from 2 5 12:"))
        assert legal[()] == {" 2", " 5", " 12"} and legal[(" 2", " +")] == {" 5", " 12"}
        assert legal[(" 2", " +", " 5", " =")] == {" 7"}
        assert legal[(" 2", " +", " 5", " =", " 7")] == {" 7", " 12"}
    else:
        legal = legal_words(task, rewrite.parse_instance("Turn a c b d into d b c a:"))
        assert legal[()] == {" swap", " cross", " rotate", " mirror"}
        assert legal[(" mirror", " d")] == {" b"}


def test_masks_are_counted_against_decisions(experiment):
    """Two responses of 5 tokens over a vocabulary of 8, whose answers can be worked out by hand."""
    legal = torch.zeros(2, 5, 8, dtype=torch.bool)
    legal[:, :, 0] = True  # token 0 is always legal,
    legal[0, 1, 1] = legal[1, 2, 1] = True  # 1 at one position of each response: a decision,
    legal[1, 3:] = False  # and the second response's third token was illegal.
    probs = torch.full((2, 5, 8), 1e-9, dtype=torch.float64)
    probs[:, :, 0] = 0.9
    probs[:, :, 7] = 0.1  # never legal, and outside the nucleus
    probs[0, 1, :2] = torch.tensor([0.5, 0.4])
    probs[1, 2, :2] = torch.tensor([0.5, 0.4])
    measured = experiment["decisions"].measure(probs.log(), legal)
    assert measured["selected"] == 2 / 8 and measured["chance"] == 2 / 8
    assert measured["precision"] == measured["recall"] == 1
    forced = -(0.9 * np.log(0.9) + 0.1 * np.log(0.1))
    decision = -(0.5 * np.log(0.5) + 0.4 * np.log(0.4) + 0.1 * np.log(0.1))
    assert measured["entropy_forced"] == pytest.approx(forced, abs=1e-6)
    assert measured["entropy_decision"] == pytest.approx(decision, abs=1e-6)
    assert measured["nucleus"] == 10 / 8 and measured["nucleus_legal"] == 1
    illegal = -0.1 * np.log(0.1) * 8
    assert measured["illegal_entropy"] == pytest.approx(illegal / (6 * forced + 2 * decision), abs=1e-6)
    assert measured["illegal_entropy_nucleus"] == 0


@pytest.fixture
def trained(tmp_path):
    """Untrained policies where run.py leaves trained ones, and three held-out prompts: options for main()."""
    tokenizer = toy_model.task_tokenizer(countdown, 512)
    sizes = {"vocab_size": 512, "hidden_size": 32, "num_layers": 1, "max_position_embeddings": 32}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "tie_word_embeddings": False}
    model = toy_model.new_model(tokenizer, **sizes, **heads, seed=1)
    start = tmp_path / "start"
    for directory in (start, *(tmp_path / f"runs/{m}/seed1/train/hf" for m in ("grpo", "siren-0.1"))):
        toy_model.save_checkpoint(model, tokenizer, directory)
    (start / "prompts").mkdir()
    problems = ["Make 36 from 2 5 12:", "Make 7 from 1 2 4:", "Make 9 from 2 3 4:"]
    write_prompts(start / "prompts" / "eval-128.jsonl", [{"problem": p, "answer": p} for p in problems])
    return ["--output", str(tmp_path), "--checkpoint", str(start)]


def test_policies_are_sampled_at_temperatures(experiment, trained, tmp_path, monkeypatch):
    """The hotter the fewer right responses: 4, 3, 2, 1, 0 of 4; of them two different ones."""
    temperatures = experiment["temperatures"]

    def sample(model, tokenizer, task, prompts, *, seed, temperature):
        right = 4 - temperatures.TEMPERATURES.index(temperature)
        texts = []
        for n, prompt in enumerate(prompts):
            solutions = task.solve(task.parse_instance(prompt))
            response = f" {solutions[n % 2]}<|endoftext|>" if n % 4 < right else " 12" * 11
            texts.append(tokenizer(response)["input_ids"])
        return torch.tensor(texts)

    monkeypatch.setattr(temperatures, "sample", sample)
    assert temperatures.main([*trained, "--samples", "4"]) == 0
    table = (tmp_path / "results" / "temperatures.md").read_text()
    assert "| grpo | 1 | 0.6 | 1.000 [1.000, 1.000] | 1.000 [1.000, 1.000] | 2.000 " in table
    assert "| grpo | 1 | 1.2 | 0.250 [0.250, 0.250] | 0.000 [0.000, 0.000] | 1.000 " in table
    assert "| siren-0.1 | 1 | 1.00 | +0.000 [+0.000, +0.000] |" in table
    assert (tmp_path / "results" / "temperatures.svg").read_text().startswith("<svg")


def test_the_baseline_is_compared_at_equal_avg(experiment):
    def values(avg, found):
        return {"avg": np.array([[avg, avg + 0.1]]), "pass@2": np.array([[found, found]])}

    at_equal_avg = experiment["temperatures"].at_equal_avg
    baseline = {1.0: values(0.5, 0.6), 1.4: values(0.3, 1.0)}
    temperature, equal = at_equal_avg(values(0.45, 0.9), baseline)
    assert temperature == pytest.approx(1.1)
    np.testing.assert_allclose(equal["pass@2"], [[0.7, 0.7]])
    assert at_equal_avg(values(0.51, 0.9), baseline) is None


def test_the_masks_of_policies_are_measured(experiment, trained, tmp_path, capsys):
    """An untrained policy is nearly uniform: log 512 = 6.24 nats, and hardly any of its mass legal."""
    assert experiment["decisions"].main([*trained, "--samples", "2"]) == 0
    rows = (tmp_path / "results" / "decisions.md").read_text().splitlines()
    assert [row.split(" | ")[:2] for row in rows[2:5]] == [
        ["| before training", ""],
        ["| grpo", "1"],
        ["| siren-0.1", "1"],
    ]
    assert {row.split(" | ", 2)[2] for row in rows[2:5]} == {rows[2].split(" | ", 2)[2]}, "the same policy"
    measured = dict(zip(rows[0].strip("| ").split(" | "), rows[3].strip("| ").split(" | "), strict=True))
    assert 6.1 < float(measured["entropy at decisions"]) <= 6.239
    assert (
        float(measured["of its mass legal"]) < 0.02 and float(measured["entropy from illegal tokens"]) > 0.98
    )
    with pytest.raises(SystemExit):
        experiment["decisions"].main(["--output", str(tmp_path / "nowhere")])
    assert "no policy of run.py under" in capsys.readouterr().err


def test_every_run_of_every_setting_is_accepted(experiment, tmp_path, monkeypatch):
    """Unknown options and contradictions, as the program would refuse them."""
    matrix, run = experiment["matrix"], experiment["run"]
    monkeypatch.setenv("WORLD_SIZE", "1")
    model = tmp_path / "model"
    (model / "prompts").mkdir(parents=True)
    (model / "config.json").write_text(json.dumps(ARCHITECTURE))
    (model / "model.safetensors").write_bytes(b"")
    prompts = write_prompts(model / "prompts" / "train.jsonl", [{"problem": "1+1", "answer": "2"}] * 32)
    for setting in matrix.SETTINGS.values():
        for name in (f"curve-{setting.curve_prompts}", f"eval-{setting.eval_prompts}"):
            (model / "prompts" / f"{name}.jsonl").write_bytes(prompts.read_bytes())
        cells = run.cells(setting, None)
        assert len({(cell.name, cell.seed) for cell in cells}) == len(cells)
        places = {"checkpoint": model, "output": tmp_path, "results": tmp_path / "results"}
        runner = run.Runner(run.Experiment("countdown", setting, **places))
        for cell in cells:
            command = runner._training(cell, tmp_path / cell.name)
            script = command.index(str(REPOSITORY / "pretrain_siren.py"))
            config = parse_args([*command[script + 1 :], "--check"])
            assert config.train.seed == cell.seed and config.train.num_steps == setting.steps
    for method in matrix.METHODS | matrix.GRID:
        if method in matrix.SENSITIVITY.values():
            command = runner._training(run.Cell(method, (matrix.METHODS | matrix.GRID)[method], 1), tmp_path)
            entropy = parse_args([*command[script + 1 :], "--check"]).entropy
            assert entropy.entropy_coeff == 0.1 and entropy.entropy_method == "siren"
            assert matrix.SENSITIVITY[entropy.entropy_top_p, entropy.siren_peak_quantile] == method
    assert len(run.cells(matrix.SETTINGS["full"], None)) == 16 * 5 + 7 * 2
