"""Ranks that host servers: who they are, and how rank 0's tensors come to all of them."""

from __future__ import annotations

import os

import torch

from tests.distributed.launch import run_ranks


def on_two_nodes(rank, world_size):
    """For `run_ranks`: ranks 0 and 1 on the first node, rank 2 on the second."""
    from siren_megatron.control import Control
    from siren_megatron.rollout.hosts import Hosts

    os.environ["LOCAL_RANK"] = str([0, 1, 0][rank])
    first, every = Hosts.agree("first"), Hosts.agree("all")
    control = Control()
    tensors = [("a", torch.arange(6.0).view(2, 3).t()), ("b", torch.ones(2, dtype=torch.bfloat16))]
    named = tensors if rank == 0 else [(name, None) for name, _ in tensors] if rank == 2 else []
    alone = [name for name, _ in first.share(iter(tensors if rank == 0 else []))]
    shared = [(name, tensor.clone()) for name, tensor in every.share(iter(named))]
    gathered = control.gather((rank, shared))
    if rank == 0:
        control.tell(3, 2)
        heard = None
    else:
        heard = control.hear()
    return first.ranks, first.node, every.ranks, every.node, alone, gathered, heard


def test_hosts_agree_and_share_tensors():
    ranks = run_ranks(on_two_nodes, 3)
    assert [r[0] for r in ranks] == [(0,)] * 3 and [r[1] for r in ranks] == [0, None, None]
    assert [r[2] for r in ranks] == [(0, 2)] * 3 and [r[3] for r in ranks] == [0, None, 1]
    assert [r[4] for r in ranks] == [["a", "b"], [], []]
    assert ranks[1][5] is None and ranks[2][5] is None
    of_rank = dict(ranks[0][5])
    assert of_rank[1] == [] and [name for name, _ in of_rank[2]] == ["a", "b"]
    for (_, ours), (_, theirs) in zip(of_rank[0], of_rank[2], strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    assert torch.equal(of_rank[2][0][1], torch.arange(6.0).view(2, 3).t())
    assert [r[6] for r in ranks] == [None, (3, 2), (3, 2)]
