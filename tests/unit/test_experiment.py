"""The Countdown experiment's records, its paired differences, and that its options are options."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from siren_megatron.config import parse_args
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
    names = ("matrix", "bootstrap", "record", "figures", "analyse", "run")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    import analyse
    import matrix
    import record
    import run

    yield {"analyse": analyse, "matrix": matrix, "record": record, "run": run}
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
        runner = run.Runner("countdown", setting, model, tmp_path, tmp_path / "results")
        for cell in cells:
            command = runner._training(cell, tmp_path / cell.name)
            script = command.index(str(REPOSITORY / "pretrain_siren.py"))
            config = parse_args([*command[script + 1 :], "--check"])
            assert config.train.seed == cell.seed and config.train.num_steps == setting.steps
    assert len(run.cells(matrix.SETTINGS["full"], None)) == 16 * 5 + 8 * 2
