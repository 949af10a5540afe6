"""Options: refused with one line and exit code 2, before anything heavy is imported."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from siren_megatron.config import Config, build_parser, check, option_defaults, parse_args
from tests.checkpoints import write_prompts

ARCHITECTURE = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 500,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
}


@pytest.fixture
def files(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(ARCHITECTURE))
    (model / "model.safetensors").write_bytes(b"")
    prompts = write_prompts(tmp_path / "prompts.jsonl", [{"problem": "1+1", "answer": "2"}])
    return {"hf_checkpoint": model, "prompt_data": prompts, "save": tmp_path / "run"}


def arguments(files, *more):
    base = {**files, "seq_length": 128, "rollout_max_response_length": 64}
    flags = [text for key, value in base.items() for text in ("--" + key.replace("_", "-"), str(value))]
    return [*flags, *more]


def test_accepted_options_arrive_by_group(files, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    config = parse_args(arguments(files, "--tensor-model-parallel-size", "2", "--lr", "3e-5", "--no-bf16"))
    assert config.parallel.tensor_model_parallel_size == 2
    assert config.train.lr == 3e-5 and config.model.bf16 is False
    assert config.flat()["save"] == str(files["save"])
    assert config.logprob_tolerance == 0.01


WRONG = [
    (["--tensor-model-parallel-size", "4"],
     "--tensor-model-parallel-size 4 does not divide the model's num_key_value_heads 2"),
    (["--pipeline-model-parallel-size", "3"],
     "--pipeline-model-parallel-size 3 does not divide the model's num_hidden_layers 4"),
    (["--entropy-top-p", "0"], "--entropy-top-p must be greater than 0, got 0.0"),
    (["--entropy-top-p", "1.5"], "--entropy-top-p must be at most 1, got 1.5"),
    (["--entropy-top-p", "nan"], "--entropy-top-p must be finite"),
    (["--siren-peak-quantile", "1"], "--siren-peak-quantile must be less than 1"),
    (["--global-batch-size", "48"], "--global-batch-size 48 does not divide the 256 responses"),
    (["--micro-batch-size", "7"], "--micro-batch-size 7 does not divide --global-batch-size 64"),
    (["--micro-batch-size", "64"], "--micro-batch-size 64 x 4 data-parallel rank(s)"),
    (["--rollout-logprobs-as-old"],
     "--rollout-logprobs-as-old with --siren-anchor-estimate step needs --micro-batch-size x 4"),
    (["--sequence-parallel"], "--sequence-parallel needs --tensor-model-parallel-size"),
    (["--rollout-max-response-length", "128"],
     "--rollout-max-response-length 128 leaves no room for a prompt in --seq-length 128"),
    (["--seq-length", "1024"], "--seq-length 1024 exceeds the model's max_position_embeddings 512"),
    (["--grpo-dual-clip", "0.5"], "--grpo-dual-clip must be greater than 1"),
    (["--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
    (["--entropy-metod", "siren"], "unrecognized arguments: --entropy-metod siren"),
    (["--entropy-coef", "1"], "unrecognized arguments: --entropy-coef 1"),
    (["--fp8-format", "e4m3"], "--fp8-format e4m3 is not supported"),
    (["--transformer-impl", "transformer_engine", "--context-parallel-size", "2"],
     "--transformer-impl transformer_engine with --context-parallel-size 2 needs --bf16"),
    (["--transformer-impl", "te"], "argument --transformer-impl: invalid choice: 'te'"),
    (["--load", "x", "--overwrite"], "--load and --overwrite contradict each other"),
    (["--record-prompts", "0", "--record-interval", "5"],
     "--record-interval 5 has no meaning with --record-prompts 0"),
    (["--load", "no-such-run"], "--load no-such-run holds no checkpoint"),
    (["--hf-checkpoint", "no-such-dir"], "--hf-checkpoint no-such-dir is not a directory"),
    (["--prompt-data", "no-such-file"], "--prompt-data no-such-file"),
    (["--prompt-weights", "1", "2"], "--prompt-weights has 2 number(s) for the 1 file(s) of --prompt-data"),
    (["--prompt-weights", "0"], "--prompt-weights must be greater than 0, got 0.0"),
    (["--prompt-weights", "much"], "argument --prompt-weights: invalid float value: 'much'"),
    (["--prompt-template", "Q: "], "--prompt-template 'Q: ' holds no {prompt}"),
    (["--prompt-template", "{prompt}", "--prompt-system", "s"], "--prompt-template and --prompt-system"),
    (["--reward", "math", "--reward-function", "r.py:f"], "--reward math and --reward-function r.py:f"),
    (["--reward-function", "no-such.py:f"], "--reward-function no-such.py:f: No such file"),
    (["--eval-interval", "5"], "--eval-interval needs --eval-data"),
    (["--eval-data", "no-such-file", "--eval-interval", "5"], "--eval-data no-such-file: No such file"),
    (["--eval-data", "no-such-file"], "--eval-data needs --eval-interval or --eval-at-start"),
    (["--eval-last-num-samples", "5"], "--eval-last-num-samples needs --eval-last-data"),
    (["--eval-last-data", "no-such-file"], "--eval-last-data no-such-file: No such file"),
    (["--eval-last-data", "no-such-file", "--eval-num-samples", "1", "--eval-last-num-samples", "9",
      "--eval-temperature", "0"], "--eval-temperature 0 is greedy: all of --eval-last-num-samples 9"),
    (["--eval-top-p", "0"], "--eval-top-p must be greater than 0, got 0.0"),
    (["--rollout-host", "192.0.2.1"], "--rollout-host '192.0.2.1' is no address of this machine"),
    (["--rollout-host", "no such host"], "--rollout-host 'no such host' is no address of this machine"),
    (["--rollout-async-steps", "1"],
     "--rollout-async-steps 1 trains on responses of older weights, and needs a --rollout-correction"),
    (["--rollout-num-servers", "2", "--rollout-devices", "4,5"],
     "--rollout-num-servers 2 contradicts --rollout-devices 4,5"),
    (["--rollout-tensor-parallel-size", "2", "--rollout-devices", "5,6,7"],
     "--rollout-tensor-parallel-size 2 does not divide the 3 GPU(s) of --rollout-devices 5,6,7"),
    (["--rollout-tensor-parallel-size", "2"],
     "--rollout-tensor-parallel-size 2 has no meaning without --rollout-devices"),
    (["--rollout-max-restarts", "-1"], "--rollout-max-restarts must be at least 0, got -1"),
    (["--max-consecutive-skips", "0"], "--max-consecutive-skips must be at least 1, got 0"),
    (["--tokenizer", "no-such.model"], "--tokenizer no-such.model: no such directory or file"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[" ".join(o) for o, _ in WRONG])
def test_wrong_options_are_one_line_and_exit_code_2(files, monkeypatch, capsys, options, message):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(SystemExit) as error:
        parse_args(arguments(files, *options))
    lines = capsys.readouterr().err.splitlines()
    assert error.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("pretrain_siren.py: error: ") and message in lines[0]


def test_transformer_engine_must_be_installed(files, monkeypatch, capsys):
    options = ["--transformer-impl", "transformer_engine"]
    found = {"transformer_engine": None}
    monkeypatch.setattr("importlib.util.find_spec", found.get)
    with pytest.raises(SystemExit) as error:
        parse_args(arguments(files, *options))
    assert error.value.code == 2
    assert "--transformer-impl transformer_engine needs the package transformer-engine and CUDA" in (
        capsys.readouterr().err
    )
    found["transformer_engine"] = object()
    assert parse_args(arguments(files, *options)).model.transformer_impl == "transformer_engine"


def test_a_broken_prompt_line_is_named(files, capsys):
    files["prompt_data"].write_text('{"problem": "1", "answer": "1"}\n{"problem": \n')
    with pytest.raises(SystemExit):
        parse_args(arguments(files))
    assert f"{files['prompt_data']}, line 2" in capsys.readouterr().err


def test_a_missing_required_option_is_named(capsys):
    with pytest.raises(SystemExit) as error:
        parse_args(["--save", "x"])
    assert error.value.code == 2
    assert "--hf-checkpoint, --prompt-data" in capsys.readouterr().err


def test_an_existing_run_is_not_touched_unless_told(files, capsys):
    files["save"].mkdir()
    (files["save"] / "metrics.jsonl").write_text("")
    with pytest.raises(SystemExit):
        parse_args(arguments(files))
    assert (
        f"--save {files['save']} exists already: pass --load {files['save']} or --overwrite"
        in capsys.readouterr().err
    )
    assert parse_args(arguments(files, "--overwrite")).run.overwrite
    (files["save"] / "checkpoints" / "step_000001").mkdir(parents=True)
    assert parse_args(arguments(files, "--load", str(files["save"]))).run.load == files["save"]


def test_defaults_are_those_of_a_run_with_the_required_options_alone(files):
    flat, defaults = Config.of(**files).flat(), option_defaults()
    assert flat.keys() - defaults.keys() == {"hf_checkpoint", "prompt_data", "save"}
    assert {key: flat[key] for key in defaults if key != "reward"} == {
        key: value for key, value in defaults.items() if key != "reward"
    }


def test_world_size_must_fit_the_layout(files):
    config = Config.of(**files, tensor_model_parallel_size=2, pipeline_model_parallel_size=2,
                       seq_length=128, rollout_max_response_length=64)  # fmt: skip
    check(config, world_size=4)
    with pytest.raises(ValueError, match=r"= 4 does not divide the 6 rank\(s\).*torchrun --nproc-per-node 4"):
        check(config, world_size=6)


def test_config_of_refuses_unknown_and_missing_names(files):
    with pytest.raises(ValueError, match="unknown option.*learning_rate"):
        Config.of(**files, learning_rate=1.0)
    with pytest.raises(ValueError, match="hf_checkpoint"):
        Config.of(save=files["save"])


def test_every_option_has_help_and_the_parser_knows_no_abbreviations():
    parser = build_parser()
    assert all(action.help for action in parser._actions)
    assert not parser.allow_abbrev


def test_checking_options_imports_nothing_heavy(files, repository, tmp_path):
    (tmp_path / "own.py").write_text("import torch\ndef grade(response, answer): return 1.0")
    (tmp_path / "own.model").write_bytes(b"")
    more = ["--reward-function", f"{tmp_path / 'own.py'}:grade", "--tokenizer", str(tmp_path / "own.model")]
    code = (
        "import sys; from siren_megatron.config import parse_args; parse_args(sys.argv[1:]);"
        "print([m for m in ('torch', 'megatron', 'vllm', 'transformers') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, *arguments(files, "--check", *more)]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
