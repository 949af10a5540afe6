"""Toy checkpoints: loaded by transformers as they were built, the same for the same arguments."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from siren_megatron import toy_model
from siren_megatron.data.prompts import load_prompts, load_tokenizer
from siren_megatron.rewards import countdown
from tools.make_toy_checkpoint import build_countdown_checkpoint, build_text_checkpoint, main

REPOSITORY = Path(__file__).resolve().parents[2]
GSM8K = REPOSITORY.parent / "shared" / "data" / "gsm8k" / "train.jsonl"
QUICK = {"steps": 3, "num_eval_prompts": 100, "num_eval_samples": 2, "num_threads": 1, "quiet": True}
EXAMPLE = "Make 14 from 2 5 12: 12 - 5 = 7 7 × 2 = 14"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    directory = tmp_path_factory.mktemp("toy") / "countdown"
    return directory, build_countdown_checkpoint(directory, **QUICK)


@pytest.fixture
def text_data(tmp_path):
    path = tmp_path / "text.jsonl"
    questions = [f"Ann has {n} apples and eats {n - 1} of them. How many are left?" for n in range(2, 60)]
    path.write_text("".join(json.dumps({"question": q, "answer": "1"}) + "\n" for q in questions))
    return path


def contents(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def test_the_files_of_a_hugging_face_checkpoint(built):
    directory, _ = built
    assert set(contents(directory)) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "prompts/eval.jsonl",
        "prompts/train.jsonl",
        "tokenizer.json",
        "tokenizer_config.json",
        "toy_checkpoint.json",
    }
    config = json.loads((directory / "config.json").read_text())
    assert config["model_type"] == "qwen2" and config["vocab_size"] == 1024
    assert config["hidden_size"] // config["num_attention_heads"] == 32
    assert config["num_key_value_heads"] % 2 == 0


def test_two_builds_are_equal_to_the_bit(built, tmp_path):
    directory, recipe = built
    assert build_countdown_checkpoint(tmp_path / "again", **QUICK) == recipe
    assert contents(tmp_path / "again") == contents(directory)
    other = build_countdown_checkpoint(tmp_path / "other", seed=1, **QUICK)
    assert other["results"]["loss"] != recipe["results"]["loss"]
    for name in ("model.safetensors", "prompts/train.jsonl", "prompts/eval.jsonl"):
        assert contents(tmp_path / "other")[name] != contents(directory)[name]


def test_evaluation_prompts_are_held_out(built):
    directory, _ = built
    tokenizer = load_tokenizer(directory)
    parts = [
        load_prompts(directory / "prompts" / f"{name}.jsonl", tokenizer, max_prompt_length=7).prompts
        for name in ("train", "eval")
    ]
    training, held_out = ({countdown.parse_instance(prompt.answer) for prompt in part} for part in parts)
    assert len(held_out) == len(parts[1]) == 100
    assert not training & held_out
    assert training | held_out == set(countdown.enumerate_instances())
    assert all(prompt.text == prompt.answer and len(prompt.token_ids) == 7 for p in parts for prompt in p)


def test_the_warm_up_sees_training_instances_only(monkeypatch, tmp_path):
    seen, evaluated = [], []
    warm_up, evaluate = toy_model.warm_up, toy_model.evaluate

    def spy_on_warm_up(model, tokenizer, task, instances, **options):
        seen.extend(instances)
        return warm_up(model, tokenizer, task, instances, **options)

    def spy_on_evaluate(model, tokenizer, task, instances, **options):
        evaluated.extend(instances)
        return evaluate(model, tokenizer, task, instances, **options)

    monkeypatch.setattr(toy_model, "warm_up", spy_on_warm_up)
    monkeypatch.setattr(toy_model, "evaluate", spy_on_evaluate)
    build_countdown_checkpoint(tmp_path / "toy", **QUICK)
    held_out = (tmp_path / "toy" / "prompts" / "eval.jsonl").read_text().splitlines()
    assert evaluated == [countdown.parse_instance(json.loads(line)["answer"]) for line in held_out]
    assert len(seen) == 3241 and not set(seen) & set(evaluated)


def test_both_loaders_tokenise_alike_one_token_a_word(built):
    directory, _ = built
    for tokenizer in (load_tokenizer(directory), AutoTokenizer.from_pretrained(directory)):
        ids = tokenizer(EXAMPLE + countdown.END_OF_TEXT)["input_ids"]
        assert ids == [countdown.VOCABULARY.index(token) for token in tokenizer.convert_ids_to_tokens(ids)]
        assert len(ids) == 18 and ids[-1] == tokenizer.eos_token_id == tokenizer.pad_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == EXAMPLE
        assert len(tokenizer) == 1024
        assert tokenizer.decode(tokenizer("Großes 123 € \n")["input_ids"]) == "Großes 123 € \n"


def test_a_token_outside_the_task_stays_visible(built):
    tokenizer = load_tokenizer(built[0])
    instance = countdown.parse_instance(EXAMPLE.partition(":")[0] + ":")
    right = tokenizer(EXAMPLE.partition(":")[2])["input_ids"]
    assert countdown.verify(tokenizer.decode(right, skip_special_tokens=True), instance)
    for token in range(1, 1024):
        text = tokenizer.decode([*right[:5], token, *right[5:]], skip_special_tokens=True)
        # White space alone is among the byte tokens; it changes no word.
        if tokenizer.decode([token]).strip():
            assert not countdown.verify(text, instance), token


def test_the_model_that_is_loaded_is_the_one_that_was_trained(built):
    directory, recipe = built
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    tokenizer = load_tokenizer(directory)
    lines = (directory / "prompts" / "eval.jsonl").read_text().splitlines()
    held_out = [countdown.parse_instance(json.loads(line)["answer"]) for line in lines]
    with toy_model.fixed_threads(1):
        results = toy_model.evaluate(
            model, tokenizer, countdown, held_out, num_samples=2, seed=recipe["seed"]
        )
    assert results == {key: recipe["results"][key] for key in ("avg@2", "pass@2")}


def test_the_warm_up_learns(tmp_path):
    recipe = build_countdown_checkpoint(
        tmp_path / "toy", **{**QUICK, "steps": 80, "batch_size": 32, "noise": 0.0}
    )
    # Knowing nothing costs log 1,024 = 6.9 nats a token.
    assert recipe["results"]["loss"] < 4.0


def test_tied_embeddings(tmp_path):
    build_countdown_checkpoint(tmp_path / "toy", tie_word_embeddings=True, **QUICK)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "toy")
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_a_complete_checkpoint_is_reused(built, capsys):
    directory, recipe = built
    before = (directory / "model.safetensors").stat().st_mtime_ns
    assert build_countdown_checkpoint(directory, **{**QUICK, "quiet": False}) == recipe
    assert "already built with these arguments, reused" in capsys.readouterr().out
    assert (directory / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"was built otherwise \(seed\): give --overwrite or another"):
        build_countdown_checkpoint(directory, seed=9, **QUICK)


def test_overwrite_and_older_recipes_build_anew(built, tmp_path):
    directory = tmp_path / "toy"
    build_countdown_checkpoint(directory, seed=9, **QUICK)
    build_countdown_checkpoint(directory, overwrite=True, **QUICK)
    assert contents(directory) == contents(built[0])
    recipe_file = directory / "toy_checkpoint.json"
    recipe_file.write_text(json.dumps({**json.loads(recipe_file.read_text()), "version": 0}))
    build_countdown_checkpoint(directory, **QUICK)
    assert contents(directory) == contents(built[0])
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]


def test_other_directories_are_left_alone(tmp_path):
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "thesis.tex").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="exists and is not a checkpoint of this tool"):
            build_countdown_checkpoint(tmp_path / "toy", overwrite=overwrite, **QUICK)
    assert contents(tmp_path) == {"toy/thesis.tex": b"mine"}


def test_a_build_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(toy_model, "evaluate", fail)
    with pytest.raises(KeyboardInterrupt):
        build_countdown_checkpoint(tmp_path / "toy", **QUICK)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps"),
        (["--noise", "1"], "--noise"),
        (["--num-eval-prompts", "3341"], "--num-eval-prompts"),
        (["--vocab-size", "300"], "--vocab-size"),
        (["--hidden-size", "60"], "--hidden-size"),
        (["--num-key-value-heads", "3"], "--num-key-value-heads"),
        (["--num-layers", "0"], "at least 1"),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path, capsys, arguments, message):
    assert main(["countdown", "--output", str(tmp_path / "toy"), "--quiet", *arguments]) == 2
    errors = capsys.readouterr().err
    assert message in errors and errors.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_text_checkpoint(text_data, tmp_path):
    options = {"vocab_size": 280, "num_layers": 2, "quiet": True}
    recipe = build_text_checkpoint(text_data, tmp_path / "toy", **options)
    build_text_checkpoint(text_data, tmp_path / "again", **options)
    assert contents(tmp_path / "toy") == contents(tmp_path / "again")
    assert recipe["results"] == {"num_tokens": 280}

    prompts = []
    for tokenizer in (load_tokenizer(tmp_path / "toy"), AutoTokenizer.from_pretrained(tmp_path / "toy")):
        assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
        (prompt, *_) = load_prompts(text_data, tokenizer, max_prompt_length=500).prompts
        assert prompt.text == (
            "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}."
            "<|im_end|>\n<|im_start|>user\nAnn has 2 apples and eats 1 of them. How many are left?"
            "<|im_end|>\n<|im_start|>assistant\n"
        )
        assert tokenizer.decode(prompt.token_ids) == prompt.text
        starts = [
            n for n, token in enumerate(prompt.token_ids) if tokenizer.decode([token]) == "<|im_start|>"
        ]
        assert len(starts) == 3 and starts[0] == 0
        prompts.append(prompt)
    assert prompts[0] == prompts[1]

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "toy")
    with torch.no_grad():
        logits = model(torch.tensor([prompts[0].token_ids])).logits
    entropy = torch.distributions.Categorical(logits=logits.double()).entropy().mean().item()
    assert entropy == pytest.approx(math.log(280), abs=0.05)  # random weights know nothing


def test_text_checkpoint_is_rebuilt_for_other_text_on_demand_only(text_data, tmp_path):
    build_text_checkpoint(text_data, tmp_path / "toy", vocab_size=300, quiet=True)
    text_data.write_text(text_data.read_text() + '{"question": "And now?"}\n')
    with pytest.raises(ValueError, match=r"built otherwise \(text_fingerprint\)"):
        build_text_checkpoint(text_data, tmp_path / "toy", vocab_size=300, quiet=True)


def test_text_that_cannot_be_read_is_one_line(text_data, tmp_path, capsys):
    output = str(tmp_path / "toy")
    assert main(["text", "--text-data", str(tmp_path / "missing"), "--output", output]) == 2
    assert main(["text", "--text-data", str(text_data), "--text-key", "q", "--output", output]) == 2
    assert main(["text", "--text-data", str(text_data), "--vocab-size", "258", "--output", output]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "--text-data" in lines[0] and "No such file" in lines[0]
    assert "line 1: no field 'q'" in lines[1]
    assert "--vocab-size must be at least 259" in lines[2]
    assert len(lines) == 3 and not (tmp_path / "toy").exists()


@pytest.mark.skipif(not GSM8K.is_file(), reason="GSM8K is not beside the repository (../shared/data)")
def test_a_tokenizer_of_gsm8k(tmp_path):
    build_text_checkpoint(GSM8K, tmp_path / "toy", vocab_size=1024, num_layers=1, quiet=True)
    tokenizer = load_tokenizer(tmp_path / "toy")
    dataset = load_prompts(GSM8K, tokenizer, max_prompt_length=256)
    assert len(tokenizer) == 1024
    assert len(dataset) + dataset.num_skipped_too_long == 7473
    assert dataset.num_skipped_too_long < 100
    for prompt in dataset.prompts[::50]:
        assert tokenizer.decode(prompt.token_ids) == prompt.text
