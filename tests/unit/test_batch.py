"""Samples become tensors whose per-token values stand where the token is predicted."""

import torch

from siren_megatron.batch import Sample, make_batch

SAMPLES = [
    Sample((5, 6, 7), (8, 9), (-0.5, -0.25), "stop"),
    Sample((1,), (2, 3, 4, 2), (-1.0, -2.0, -3.0, -4.0), "length"),
]


def build(multiple=4):
    rewards = torch.tensor([1.0, 0.0])
    return make_batch(SAMPLES, rewards, rewards - 0.5, multiple=multiple)


def test_labels_masks_and_logprobs_line_up():
    batch = build()
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 9, 0, 0, 0], [1, 2, 3, 4, 2, 0, 0, 0]]
    assert batch.labels[batch.loss_mask].tolist() == [8, 9, 2, 3, 4, 2]
    assert batch.loss_mask.nonzero().tolist() == [[0, 2], [0, 3], [1, 0], [1, 1], [1, 2], [1, 3]]
    assert batch.rollout_logprobs[batch.loss_mask].tolist() == [-0.5, -0.25, -1.0, -2.0, -3.0, -4.0]
    assert batch.num_tokens == 6 and batch.num_responses == 2


def test_trimming_drops_shared_padding_and_nothing_else():
    wide, narrow = build(multiple=64), build(multiple=4)
    trimmed = wide.trimmed(4)
    assert torch.equal(trimmed.tokens, narrow.tokens)
    assert torch.equal(trimmed.loss_mask, narrow.loss_mask)
    first = wide.rows(0, 1).trimmed(1)
    assert first.tokens.tolist() == [[5, 6, 7, 8, 9]]
    assert first.rewards.tolist() == [1.0]


def test_trimming_never_widens():
    batch = build(multiple=1)
    assert batch.trimmed(64).tokens.size(1) == batch.tokens.size(1)
