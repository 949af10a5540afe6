"""A checkpoint continues the run it was taken from: to the last bit in its own layout, closely in others."""

from __future__ import annotations

import contextlib
import io

import pytest
import torch

from tests.checkpoints import make_random_checkpoint
from tests.distributed.launch import run_ranks
from tests.distributed.layouts import ANCHOR, GROUP_SIZE, config_of, fixed_samples

TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
PLAIN = {"use_distributed_optimizer": False}
NO_LAYOUT = ("sequence_parallel", "transformer_impl")  # change nothing of which rank holds what


def build(checkpoint, options):
    from siren_megatron import platform

    device = platform.install()
    from siren_megatron.advantages import group_advantages
    from siren_megatron.batch import make_batch
    from siren_megatron.config import read_hf_config
    from siren_megatron.policy import initialize_model_parallel
    from siren_megatron.trainer import Trainer

    config = config_of(checkpoint, **options)
    initialize_model_parallel(config)
    trainer = Trainer(config, read_hf_config(checkpoint), device)
    samples, rewards = fixed_samples()
    advantages = group_advantages(rewards, GROUP_SIZE)
    batch = make_batch(samples, rewards, advantages, multiple=trainer.length_multiple)
    return trainer, batch.to(device.device)


def finish(trainer, batch):
    from megatron.core import parallel_state

    metrics = [trainer.update(batch, ANCHOR) for _ in range(2)]
    weights = {name: tensor.clone() for name, tensor in trainer.hf_weights()}
    parallel_state.destroy_model_parallel()
    return metrics, weights


def save_and_go_on(rank, world_size, checkpoint, directory, options):
    trainer, batch = build(checkpoint, options)
    from siren_megatron.checkpointing.checkpoint import CheckpointSaver

    batch = trainer.compute_logprobs(batch)
    trainer.update(batch, ANCHOR)
    saver = CheckpointSaver(directory, trainer)
    saver.save({"step": 1, "entropy_anchor": ANCHOR if rank == 0 else None})
    return finish(trainer, batch)


def load_and_go_on(rank, world_size, checkpoint, directory, layouts, saved_with):
    from siren_megatron.checkpointing.checkpoint import load_checkpoint

    results = []
    for options in layouts:
        trainer, batch = build(checkpoint, options)
        # The ratios' base is the policy before the first update, as in the run that goes on.
        batch = trainer.compute_logprobs(batch)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            loaded = load_checkpoint(directory, trainer)
        same = {n: value for n, value in options.items() if n not in NO_LAYOUT} == saved_with
        told = "random states could not be carried over" in printed.getvalue()
        assert told == (rank == 0 and not same), printed.getvalue()
        state, carried = loaded.state, loaded.random_states is not None
        assert carried == same
        assert state == {"step": 1, "entropy_anchor": ANCHOR}, state
        results.append(finish(trainer, batch))
    return results


def difference(ours, theirs):
    return max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)


@pytest.mark.parametrize("options", [{TP: 2}, {PP: 2}, {}, PLAIN], ids=["TP=2", "PP=2", "DP=2", "plain"])
def test_resume_is_exact_in_the_same_layout(tmp_path, options):
    checkpoint = make_random_checkpoint(tmp_path / "model", tie_word_embeddings=True)
    went_on, weights = run_ranks(save_and_go_on, 2, checkpoint, tmp_path / "saved", options)[0]
    resumed = run_ranks(load_and_go_on, 2, checkpoint, tmp_path / "saved", [options], options)[0]
    assert resumed[0][0] == went_on
    assert all(torch.equal(resumed[0][1][name], weights[name]) for name in weights)
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == ["latest", "step_000001"]


def test_resume_in_another_layout(tmp_path):
    checkpoint = make_random_checkpoint(tmp_path / "model")
    _, weights = run_ranks(save_and_go_on, 2, checkpoint, tmp_path / "saved", {TP: 2})[0]
    layouts = [{PP: 2}, {}, {TP: 2, "sequence_parallel": True}]
    results = run_ranks(load_and_go_on, 2, checkpoint, tmp_path / "saved", layouts, {TP: 2})[0]
    for options, (_, resumed) in zip(layouts, results, strict=True):
        assert difference(resumed, weights) < 1e-5, options
