"""Transformer Engine's own layers against local ones: log-probs and gradients of an update, and checkpoints.

Transformer Engine multiplies float32 matrices in TF32, whose products are more exact than bfloat16's. So no
tolerance is chosen: local layers in float32 are the reference, and local layers in bfloat16 the measure.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.checkpoints import make_random_checkpoint
from tests.distributed.gradients import Update, relative_error, update
from tests.distributed.launch import run_ranks
from tests.distributed.layouts import Layout
from tests.distributed.te_standin import TE
from tests.distributed.test_checkpoint import load_and_go_on, save_and_go_on
from tests.distributed.test_layouts import CP, EP, PACKED, PP, SP, SP1, TP

pytestmark = pytest.mark.skipif(find_spec("transformer_engine") is None, reason="needs transformer-engine")
BF16 = {"bf16": True}
SLACK = 2  # Transformer Engine may round twice as badly as local layers in the same precision


def run(checkpoint: Path, gpus: int, layouts: list[Layout]) -> list[Update]:
    return run_ranks(update, gpus, [(checkpoint, layout) for layout in layouts], timeout=600, backend="nccl")[
        0
    ]


def errors(updates: list[Update], reference: Update) -> list[tuple[float, float]]:
    """Mean difference of the log-probs in nats, and relative difference of the gradients."""
    return [
        (
            float((u.logprobs - reference.logprobs).abs().mean()),
            relative_error(u.gradients, reference.gradients),
        )
        for u in updates
    ]


def compare(checkpoint: Path, gpus: int, layouts: list[Layout]) -> None:
    """Hold layouts of Transformer Engine's layers to local layers on one GPU."""
    reference, bf16 = run(checkpoint, 1, [Layout("local float32"), Layout("local bf16", BF16)])
    ((logprobs, gradients),) = errors([bf16], reference)
    print(f"\nlocal bf16: log-probs {logprobs:.1e}, gradients {gradients:.1e}")
    updates = run(checkpoint, gpus, layouts)
    for layout, used, (a, b) in zip(layouts, updates, errors(updates, reference), strict=True):
        print(f"{layout.name}: log-probs {a:.1e}, gradients {b:.1e}")
        assert "Transformer Engine" in used.implementations["attention"]
        assert used.implementations["optimizer"] == "FusedAdam (Transformer Engine)"
        assert a < SLACK * logprobs and b < SLACK * gradients, layout.name


@pytest.mark.gpus(1)
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama3", "qwen3-moe"])
def test_one_gpu(tmp_path, family):
    layouts = [
        Layout("float32", TE),
        Layout("float32 packed", {PACKED: 64, **TE}),
        Layout("bf16", {**BF16, **TE}),
        Layout("bf16 packed", {**BF16, PACKED: 64, **TE}),
        Layout("bf16 recomputed", {**BF16, "recompute_granularity": "full", **TE}),
    ]
    compare(make_random_checkpoint(tmp_path / "model", family), 1, layouts)


@pytest.mark.gpus(2)
def test_two_gpus(tmp_path):
    layouts = [
        Layout("TP=2 SP", {**BF16, **SP, **TE}),
        Layout("TP=2 SP packed", {**BF16, **SP, PACKED: 64, **TE}),
        Layout("PP=2", {**BF16, PP: 2, **TE}),
        Layout("CP=2", {**BF16, CP: 2, **TE}),
        Layout("CP=2 packed", {**BF16, CP: 2, PACKED: 64, **TE}),
    ]
    # A size of heads that every attention kernel takes.
    compare(make_random_checkpoint(tmp_path / "model", "qwen3", head_dim=64), 2, layouts)


@pytest.mark.gpus(2)
def test_experts_on_two_gpus(tmp_path):
    layouts = [
        Layout("EP=2 packed", {**BF16, EP: 2, PACKED: 64, **TE}),
        Layout("EP=2 TP=2 SP, one replica", {**BF16, EP: 2, **SP1, **TE}),
    ]
    compare(make_random_checkpoint(tmp_path / "model", "qwen3-moe"), 2, layouts)


@pytest.mark.gpus(2)
@pytest.mark.parametrize(("own", "other"), [({}, TE), (TE, {})], ids=["from local", "to local"])
def test_a_checkpoint_of_the_other_layers(tmp_path, own, other):
    """In float32; what differs is TF32, and so the metrics of the updates that follow only nearly agree."""
    checkpoint = make_random_checkpoint(tmp_path / "model")
    ranks = {"timeout": 600, "backend": "nccl"}
    went_on, _ = run_ranks(save_and_go_on, 2, checkpoint, tmp_path / "saved", {**SP, **own}, **ranks)[0]
    layouts, saved_with = [{**SP, **other}], {TP: 2}
    place = tmp_path / "saved"
    ((resumed, _),) = run_ranks(load_and_go_on, 2, checkpoint, place, layouts, saved_with, **ranks)[0]
    for got, want in zip(resumed, went_on, strict=True):
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=0.05)
        assert got["siren/entropy_masked"] == pytest.approx(want["siren/entropy_masked"], rel=0.05)
