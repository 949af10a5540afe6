"""The whole program: real vLLM, real megatron-core on gloo ranks, through its command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess

import psutil
import pytest
import torch

from siren_megatron.metrics import read_metrics
from siren_megatron.report import read_records
from tests.distributed.launch import run_ranks
from tests.integration.jobs import (
    REPOSITORY,
    processes_mentioning,
    run_job,
    started_job,
    toy_options,
    wait_until,
)

# The first test installs and builds what the quick start needs; a busy machine takes its time.
pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1500)]

METRICS = """step reward entropy entropy_top_p siren/entropy_masked siren/entropy_anchor siren/loss
loss/policy clip_fraction kl_old_new grad_norm lr response_length rollout_logprob_diff tokens_per_second
time/rollout time/reward time/logprob time/train time/weight_sync time/step weight_sync_bytes
time/weight_transfer""".split()
SCRIPT_STEPS = 40


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    """The quick start's own script, as a newcomer calls it; it builds the toy checkpoint."""
    save = tmp_path_factory.mktemp("toy") / "run"
    script = REPOSITORY / "examples" / "run_siren_cpu.sh"
    arguments = ["--num-steps", str(SCRIPT_STEPS), "--save", str(save), "--tensorboard-dir", str(save / "tb")]
    held_out = REPOSITORY / "runs" / "toy-countdown" / "prompts" / "eval.jsonl"
    arguments += ["--eval-data", str(held_out), "--eval-interval", "30", "--eval-at-start"]
    arguments += ["--eval-num-samples", "4", "--eval-temperature", "1", "--eval-top-p", "1", "--profile", "3"]
    arguments += ["--eval-last-data", str(held_out), "--eval-last-num-samples", "8"]
    done = subprocess.run(["bash", str(script), *arguments], capture_output=True, text=True, timeout=1400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return save, done.stdout


@pytest.fixture(scope="module")
def toy_checkpoint(toy_run):
    return REPOSITORY / "runs" / "toy-countdown"


def test_the_reward_rises_and_every_metric_is_there(toy_run):
    save, output = toy_run
    rows = read_metrics(save / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, SCRIPT_STEPS + 1))
    for row in rows:
        missing = set(METRICS) - set(row)
        assert not missing, f"step {row['step']} lacks {missing}"
        assert all(torch.isfinite(torch.tensor(float(row[name]))) for name in METRICS), row
    first, last = (sum(r["reward"] for r in part) / 10 for part in (rows[:10], rows[-10:]))
    assert last > first + 0.05, f"mean reward of ten steps went from {first:.3f} to {last:.3f}"
    assert str(save / "report.html") in output and str(save / "hf") in output
    used = json.loads((save / "run.json").read_text())["implementations"]
    assert used["attention"] == "CausalAttention (siren_megatron)" and used["optimizer"] == "AdamW (torch)"
    assert output.index(f"attention  {used['attention']}") < output.index(f"step  1/{SCRIPT_STEPS}")


def test_vllm_and_trainer_agree_after_every_update(toy_run):
    rows = read_metrics(toy_run[0] / "metrics.jsonl")
    assert max(row["rollout_logprob_diff"] for row in rows) < 1e-4
    assert max(row["weight_sync_logprob_diff"] for row in rows) < 1e-4


def test_a_profiled_step_has_a_trace_of_each_rank_and_its_timeline(toy_run):
    save, _ = toy_run
    assert {path.name for path in (save / "profile").glob("*.gz")} == {
        "step-3-rank-0.json.gz",
        "step-3-rank-1.json.gz",
    }
    assert "Step 3, seconds by stage and rank" in (save / "report.html").read_text()


def test_the_held_out_prompts_are_evaluated(toy_run):
    save, output = toy_run
    rows = [json.loads(line) for line in (save / "eval.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 30, SCRIPT_STEPS], "at the start, when due and after the last"
    logged = {row["step"]: row for row in read_metrics(save / "metrics.jsonl") if "eval/eval/avg@4" in row}
    assert set(logged) == {30, SCRIPT_STEPS}
    for row in rows[1:]:
        metrics = logged[row["step"]]
        for name in ("avg@4", "maj@4", "pass@2", "pass@4"):
            assert metrics[f"eval/eval/{name}"] == row["eval"][name]["value"]
        assert metrics["time/eval"] > 0
        assert row["eval"]["avg@4"]["low"] < row["eval"]["avg@4"]["value"] < row["eval"]["avg@4"]["high"]
        assert row["eval"]["avg@4"]["value"] < row["eval"]["pass@4"]["value"]
    first, last = rows[0]["eval"]["avg@4"]["value"], rows[-1]["eval"]["avg@4"]["value"]
    assert last > first + 0.03, f"avg@4 of the held-out prompts went from {first:.3f} to {last:.3f}"
    assert "step 0: eval eval  avg@4" in output and "eval/eval/avg@4" in (save / "report.html").read_text()


def test_the_last_policy_is_evaluated_with_its_own_data_and_its_responses_are_kept(toy_run):
    save, output = toy_run
    rows = [json.loads(line) for line in (save / "eval.jsonl").read_text().splitlines()]
    assert ["eval-last" in row for row in rows] == [False, False, True]
    last = rows[-1]["eval-last"]
    graded = [
        json.loads(line) for line in (save / "eval_last" / "eval_graded.jsonl").read_text().splitlines()
    ]
    right = [sum(row["correct"]) / 8 for row in graded if len(row["responses"]) == 8]
    assert sum(right) / len(graded) == pytest.approx(last["avg@8"]["value"])
    # Twice the samples of the same policy: the same accuracy, within what chance allows.
    assert abs(last["avg@8"]["value"] - rows[-1]["eval"]["avg@4"]["value"]) < 0.05
    assert last["pass@8"]["value"] > last["pass@4"]["value"]
    assert str(save / "eval_last" / "eval_graded.jsonl") in output.replace("\n", "")


def test_tensorboard_holds_the_reward(toy_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(toy_run[0] / "tb"))
    events.Reload()
    rows = read_metrics(toy_run[0] / "metrics.jsonl")
    assert [e.value for e in events.Scalars("reward")] == pytest.approx([row["reward"] for row in rows])


def megatron_greedy(rank, world_size, save, checkpoint, prompts, max_tokens):
    """For `run_ranks`: greedy responses of the Megatron model in the run's last checkpoint."""
    from siren_megatron import platform

    device = platform.install()
    from siren_megatron.checkpointing.checkpoint import load_checkpoint
    from siren_megatron.config import Config, read_hf_config
    from siren_megatron.policy import initialize_model_parallel
    from siren_megatron.trainer import Trainer

    config = Config.of(
        hf_checkpoint=checkpoint,
        prompt_data=checkpoint,
        save=save,
        tensor_model_parallel_size=world_size,
    )
    initialize_model_parallel(config)
    trainer = Trainer(config, read_hf_config(checkpoint), device)
    load_checkpoint(save / "checkpoints", trainer)
    responses = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(max_tokens):
            tokens = torch.tensor([ids])
            with torch.no_grad():
                hidden = trainer.model[0](
                    input_ids=tokens, position_ids=torch.arange(len(ids))[None], attention_mask=None
                )
                logits = hidden[0, -1] @ trainer.head.weight.t()
            shards = [torch.empty_like(logits) for _ in range(world_size)]
            torch.distributed.all_gather(shards, logits, group=trainer.tp_group)
            ids.append(int(torch.cat(shards)[: trainer.vocab_size].argmax()))
        responses.append(ids[len(prompt) :])
    return responses


def test_the_export_is_the_megatron_model(toy_run, toy_checkpoint):
    """transformers loads <save>/hf, and its greedy outputs are those of the Megatron model at TP=2."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    save, _ = toy_run
    model = AutoModelForCausalLM.from_pretrained(save / "hf")
    tokenizer = AutoTokenizer.from_pretrained(save / "hf")
    rows = [json.loads(line) for line in (toy_checkpoint / "prompts" / "eval.jsonl").open()][:8]
    prompts = [tokenizer(row["problem"])["input_ids"] for row in rows]
    expected = []
    for prompt in prompts:
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=11,
            eos_token_id=None,
            pad_token_id=0,
        )
        expected.append(out[0, len(prompt) :].tolist())
    got = run_ranks(megatron_greedy, 2, save, toy_checkpoint, prompts, 11)[0]
    assert got == expected
    assert len({tuple(e) for e in expected}) > 4, "the model answers every prompt alike"


def test_a_run_resumes_from_its_checkpoint(toy_checkpoint, tmp_path):
    save = tmp_path / "run"
    first = run_job(toy_options(toy_checkpoint, save, num_steps=2))
    assert first.returncode == 0, first.stderr[-3000:]
    again = run_job(toy_options(toy_checkpoint, save, num_steps=3, load=save))
    assert again.returncode == 0, again.stderr[-3000:]
    rows = read_metrics(save / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert len({row["siren/entropy_anchor"] for row in rows}) == 1, "the anchor is kept, not measured again"
    assert rows[-1]["rollout_logprob_diff"] < 1e-4, "vLLM got the resumed weights"
    assert [record["step"] for record in read_records(save / "tokens.jsonl")] == [1, 2, 3]


@pytest.mark.parametrize("layout", ["tensor-model-parallel-size", "pipeline-model-parallel-size"])
def test_real_text_with_math_verify(shared_data, tmp_path, layout):
    """GSM8K's own JSONL, a BPE tokenizer trained on it, a chat template, an untrained Qwen2, math-verify."""
    model, save = tmp_path / "model", tmp_path / "run"
    data = shared_data / "gsm8k" / "train.jsonl"
    make = [
        str(REPOSITORY / ".venv" / "bin" / "python"),
        str(REPOSITORY / "tools" / "make_toy_checkpoint.py"),
    ]
    build = ["text", "--text-data", str(data), "--output", str(model), "--tie-word-embeddings", "--quiet"]
    subprocess.run([*make, *build], check=True, timeout=300)
    options = {
        "hf-checkpoint": model,
        "prompt-data": data,
        "reward": "math",
        "save": save,
        "num-steps": 2,
        "rollout-batch-size": 4,
        "rollout-num-samples": 4,
        "rollout-max-response-length": 48,
        "seq-length": 320,
        "global-batch-size": 8,
        "micro-batch-size": 2,
        layout: 2,
    }
    done = run_job([text for name, value in options.items() for text in (f"--{name}", str(value))])
    assert done.returncode == 0, done.stderr[-3000:]
    rows = read_metrics(save / "metrics.jsonl")
    assert len(rows) == 2
    for row in rows:
        assert 0 < row["response_length"] <= 48 and row["grad_norm"] > 0
        assert row["entropy"] > 5, "an untrained model is nearly uniform"
        assert row["rollout_logprob_diff"] < 1e-4
        assert row["reward_errors"] == 0


def test_wandb_runs_offline(toy_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    save = tmp_path / "run"
    done = run_job(toy_options(toy_checkpoint, save, num_steps=1, wandb_project="siren-test"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(save.rglob("run-*.wandb")), "wandb wrote no offline run"


def trainer_ranks(job: psutil.Process) -> list[psutil.Process]:
    """The ranks of a job in the order of their start: rank 0 is first."""
    ranks = [p for p in job.children() if any("pretrain_siren.py" in word for word in p.cmdline())]
    return sorted(ranks, key=lambda p: int(p.environ().get("RANK", "99")))


def test_killing_the_trainer_leaves_no_vllm_behind(toy_checkpoint, tmp_path):
    save = tmp_path / "run"
    with started_job(toy_options(toy_checkpoint, save, num_steps=1000)) as job:
        wait_until(
            lambda: (save / "metrics.jsonl").exists() and read_metrics(save / "metrics.jsonl"), 180, "step"
        )
        servers = [p for p in psutil.process_iter() if "vllm" in " ".join(p.cmdline()).lower()]
        group = {
            p.pid for p in servers if str(save) in str(p.environ()) or str(toy_checkpoint) in str(p.cmdline())
        }
        assert group, "the server is up"
        for process in [*trainer_ranks(psutil.Process(job.pid)), psutil.Process(job.pid)]:
            process.send_signal(signal.SIGKILL)
        wait_until(lambda: not any(psutil.pid_exists(pid) for pid in group), 30, "vLLM's processes ended")
        wait_until(lambda: not processes_mentioning(str(save)), 30, "every process of the run ended")


def test_killing_vllm_ends_a_job_without_restarts_with_one_clear_line(toy_checkpoint, tmp_path):
    save = tmp_path / "run"
    with started_job(toy_options(toy_checkpoint, save, num_steps=1000, rollout_max_restarts=0)) as job:
        wait_until(
            lambda: (save / "metrics.jsonl").exists() and read_metrics(save / "metrics.jsonl"), 180, "step"
        )
        rank0 = trainer_ranks(psutil.Process(job.pid))[0]
        launchers = [p for p in rank0.children() if "siren_megatron.rollout.vllm_launcher" in p.cmdline()]
        assert len(launchers) == 1
        victims = launchers[0].children(recursive=True)
        os.kill(victims[-1].pid, signal.SIGKILL)
        _, err = job.communicate(timeout=60)
    lines = [line for line in err.splitlines() if "pretrain_siren.py: error:" in line]
    assert job.returncode != 0
    assert len(lines) == 1 and "vLLM" in lines[0] and str(save / "vllm.log") in lines[0], err[-3000:]
    assert not processes_mentioning(str(save))
