"""A NaN or an infinity on one rank changes no rank: weights, optimizer, learning rate, coefficient."""

from __future__ import annotations

import json
import math

import torch
from safetensors import safe_open

from tests.checkpoints import make_random_checkpoint
from tests.distributed.launch import run_ranks
from tests.distributed.layouts import ANCHOR, GROUP_SIZE, config_of, fixed_samples

TP, PP, CP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"
PACKED = "max_tokens_per_microbatch"
LAYOUTS = {
    "TP=2 SP packed": {TP: 2, "sequence_parallel": True, PACKED: 64},
    "PP=2": {PP: 2},
    "CP=2": {CP: 2},
    "DP=2": {},
    "DP=2 plain optimizer": {"use_distributed_optimizer": False},
    "DP=2 bf16": {"bf16": True},
}
EXPERT_LAYOUTS = {"EP=2": {"expert_model_parallel_size": 2}, "EP=2 plain": {}}
EXPERT_LAYOUTS["EP=2 plain"] = {**EXPERT_LAYOUTS["EP=2"], "use_distributed_optimizer": False}
# Two optimizer steps an update: the first of a bad batch is as it should be.
STEPS = {
    "global_batch_size": 8,
    "max_consecutive_skips": 2,
    "entropy_method": "adaptive",
    "entropy_coeff": 0.1,
}


def build(checkpoint, save, options):
    from siren_megatron import platform

    device = platform.install()
    from siren_megatron.advantages import group_advantages
    from siren_megatron.batch import make_batch
    from siren_megatron.config import read_hf_config
    from siren_megatron.policy import initialize_model_parallel
    from siren_megatron.trainer import Trainer

    config = config_of(checkpoint, **{"save": save, "micro_batch_size": 2, **STEPS, **options})
    initialize_model_parallel(config)
    trainer = Trainer(config, read_hf_config(checkpoint), device)
    samples, rewards = fixed_samples()
    advantages = group_advantages(rewards, GROUP_SIZE)
    batch = make_batch(samples, rewards, advantages, multiple=trainer.length_multiple)
    return trainer, trainer.compute_logprobs(batch)


def state_of(trainer):
    """Every number that an update moves on this rank, copied."""
    parts = getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer])
    state = {f"p{i}": p for i, p in enumerate(p for chunk in trainer.chunks for p in chunk.parameters())}
    for n, part in enumerate(parts):
        for g, group in enumerate(part.optimizer.param_groups):
            state[f"{n}/{g}/lr"] = torch.tensor(group["lr"], dtype=torch.float64)
            for i, parameter in enumerate(group["params"]):
                state[f"{n}/{g}/{i}"] = parameter
                state |= {f"{n}/{g}/{i}/{k}": v for k, v in part.optimizer.state[parameter].items()}
    state["scheduler"] = torch.tensor(trainer.scheduler.num_steps)
    state["coeff"] = torch.tensor(trainer.entropy.state_dict()["coeff"], dtype=torch.float64)
    return {name: value.detach().clone() for name, value in state.items()}


def with_bad_row(batch, row, value):
    advantages = batch.token_advantages.clone()
    advantages[row] = torch.where(batch.loss_mask[row], torch.tensor(value), advantages[row])
    return batch.replace(token_advantages=advantages)


def gradient_becomes(trainer, value):
    """On this rank, for one backward pass or more: one gradient holds the value. Returns how to end it."""
    parameter = next(p for p in trainer.chunks[0].parameters() if p.requires_grad)
    return parameter.register_hook(lambda gradient: torch.full_like(gradient, value)).remove


def equal(got, expected):
    return got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in got)


def skip_and_go_on(rank, world_size, checkpoint, save, layouts):
    from megatron.core import parallel_state

    from siren_megatron.nonfinite import NonFiniteError

    results = {}
    for name, options in layouts.items():
        trainer, batch = build(checkpoint, save / name, options)
        trainer.update(batch, ANCHOR, step=0)
        trainer.update(batch, ANCHOR, step=1)
        expected, metrics = state_of(trainer), trainer.update(batch, ANCHOR, step=2)
        parallel_state.destroy_model_parallel()

        trainer, batch = build(checkpoint, save / name, options)
        trainer.update(batch, ANCHOR, step=0)
        found = {"before": [], "skipped": []}
        first_half, second_half = batch.rows(0, 8), batch.rows(8, 16)
        before = state_of(trainer)
        # The last row is the last rank's where ranks share the data.
        for value in (math.nan, math.inf):
            bad = with_bad_row(second_half, 7, value)
            found["skipped"].append(trainer.optimizer_step(bad, ANCHOR, step=1)["skipped_updates"])
            found["before"].append(equal(state_of(trainer), before))
            trainer.skips.applied()
        restore = gradient_becomes(trainer, math.nan) if rank == world_size - 1 else lambda: None
        found["skipped"].append(trainer.optimizer_step(first_half, ANCHOR, step=1)["skipped_updates"])
        restore()
        found["before"].append(equal(state_of(trainer), before))
        trainer.skips.applied()
        trainer.update(batch, ANCHOR, step=1)
        found["as usual"] = equal(state_of(trainer), expected)
        found["metrics"] = trainer.update(batch, ANCHOR, step=2) == metrics

        # One bad optimizer step of two: counted, and the means are those of the good one.
        half_bad = trainer.update(with_bad_row(batch, 0, math.nan), ANCHOR, step=3)
        found["half"] = half_bad["skipped_updates"], math.isfinite(half_bad["loss/policy"])
        found["files"] = sorted(path.name for path in (save / name / "bad_batches").iterdir())
        try:
            trainer.update(with_bad_row(with_bad_row(batch, 0, math.nan), 8, math.nan), ANCHOR, step=4)
        except NonFiniteError as error:
            found["end"] = str(error)
        parallel_state.destroy_model_parallel()
        results[name] = found
    return results


def check(ranks, layouts):
    for rank, results in enumerate(ranks):
        for name in layouts:
            found, where = results[name], f"{name}, rank {rank}"
            assert found["skipped"] == [1.0, 1.0, 1.0], where
            assert found["before"] == [True, True, True], where
            assert found["as usual"] and found["metrics"], where
            assert found["half"] == (1.0, True), where
            assert "not finite 2 times in a row, --max-consecutive-skips 2" in found["end"], where
            assert "\n" not in found["end"], where


def test_a_bad_number_on_one_rank_changes_nothing_on_any(tmp_path):
    checkpoint = make_random_checkpoint(tmp_path / "model", hidden_size=32, num_hidden_layers=2)
    ranks = run_ranks(skip_and_go_on, 2, checkpoint, tmp_path, LAYOUTS, timeout=300)
    check(ranks, LAYOUTS)
    # NaN and infinity have one name, so the later file replaced the earlier one.
    assert ranks[0]["PP=2"]["files"] == [
        "step_000002_update_0.safetensors",
        "step_000004_update_0.safetensors",
    ]
    with safe_open(tmp_path / "PP=2" / "bad_batches" / "step_000004_update_0.safetensors", "pt") as file:
        about = json.loads(file.metadata()["about"])
        advantages, mask = file.get_tensor("token_advantages"), file.get_tensor("loss_mask")
    assert (about["step"], about["index"]) == (4, 0)
    assert about["metrics"]["loss/policy"] == "nan"
    assert torch.equal(advantages[0].isnan(), mask[0]) and not advantages[1:].isnan().any()


def test_experts_too(tmp_path):
    checkpoint = make_random_checkpoint(tmp_path / "model", "qwen3-moe", hidden_size=32, num_hidden_layers=2)
    check(run_ranks(skip_and_go_on, 2, checkpoint, tmp_path, EXPERT_LAYOUTS, timeout=300), EXPERT_LAYOUTS)
