"""The top-two gap on a sharded vocabulary equals that of the whole one."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from launch import run_ranks

from siren_megatron.vocab_parallel.top_two import vocab_parallel_top_two_gap

VOCAB, PADDED, ROWS = 250, 256, 40


def logits():
    z = torch.randn(ROWS, PADDED, generator=torch.Generator().manual_seed(0)) * 3
    z[:, VOCAB:] = 99.0  # padding that must not be seen
    z[0, 7] = z[0, 200] = 50.0  # a tie across shards
    z[1, 249] = 60.0  # the last true column, alone in its shard's true part at tp=4 or not
    return z


def sharded(rank, world_size):
    shard = logits().chunk(world_size, dim=1)[rank]
    return vocab_parallel_top_two_gap(shard, vocab_size=VOCAB, tp_group=dist.group.WORLD)


def one_true_column(rank, world_size):
    """Shards of 2: the last of 4 ranks holds padding only, the third one true column."""
    z = torch.tensor([[0.0, 1.0, 2.0, 3.0, 7.0, 99.0, 99.0, 99.0]])
    return vocab_parallel_top_two_gap(z.chunk(world_size, 1)[rank], vocab_size=5, tp_group=dist.group.WORLD)


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_rank_finds_the_gap_of_the_whole_vocabulary(world_size):
    log_p = logits()[:, :VOCAB].double().log_softmax(1).sort(dim=1, descending=True).values
    expected = (log_p[:, 0] - log_p[:, 1]).float()
    for got in run_ranks(sharded, world_size):
        torch.testing.assert_close(got, expected)
    assert expected[0] == 0
    torch.testing.assert_close(vocab_parallel_top_two_gap(logits(), vocab_size=VOCAB), expected)


def test_shards_of_padding_and_of_one_column():
    assert [got.tolist() for got in run_ranks(one_true_column, 4)] == [[4.0]] * 4
    with pytest.raises(ValueError, match="vocab_size must be at least 2"):
        vocab_parallel_top_two_gap(torch.zeros(1, 4), vocab_size=1)
