"""Packing and context-parallel splitting: every token once, in its place; balanced; or refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from siren_megatron.batch import Sample, make_batch
from siren_megatron.microbatch import (
    ContextShare,
    contiguous_rows,
    packed_lengths,
    packed_micro_batch,
    packed_rows,
    padded_micro_batch,
)

SAMPLES = [
    Sample((5, 6, 7), (8, 9), (-0.5, -0.25), "stop"),
    Sample((1,), (2, 3, 4, 2), (-1.0, -2.0, -3.0, -4.0), "length"),
    Sample((4, 4), (3,), (-1.5,), "stop"),
]


def batch_of(samples, multiple=8):
    zeros = torch.zeros(len(samples))
    return make_batch(samples, zeros, zeros, multiple=multiple)


def responses_by_row(micros):
    """{place in [B, S]: the token before it} over the context ranks of one micro-batch."""
    seen = {}
    for micro in micros:
        inputs = micro.tokens.flatten()
        for source, target in zip(micro.sources.tolist(), micro.targets.tolist(), strict=True):
            assert target not in seen, "a response token is on two context ranks"
            seen[target] = int(inputs[source])
    return seen


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("packed", [False, True])
def test_every_response_token_is_predicted_once_from_the_token_before_it(size, packed):
    batch = batch_of(SAMPLES)
    shares = [ContextShare(rank, size) for rank in range(size)]
    total = sum(packed_lengths(batch, size)) + 2 * size
    micros = [
        packed_micro_batch(batch, total, share) if packed else padded_micro_batch(batch, share)
        for share in shares
    ]
    expected = batch.tokens.flatten()
    places = batch.loss_mask.flatten().nonzero().squeeze(1).tolist()
    assert responses_by_row(micros) == {place: int(expected[place]) for place in places}
    for micro in micros:
        length = total if packed else batch.tokens.size(1)
        assert micro.tokens.shape == ((1 if packed else len(SAMPLES)), length // size)


def test_context_ranks_hold_the_first_and_the_last_pieces():
    device = torch.device("cpu")
    assert ContextShare(0, 2).positions(8, device).tolist() == [0, 1, 6, 7]
    assert ContextShare(1, 2).positions(8, device).tolist() == [2, 3, 4, 5]


def test_a_pack_lays_rows_end_to_end_with_their_own_positions():
    batch = batch_of(SAMPLES)
    micro = packed_micro_batch(batch, 16, ContextShare())
    # Labels end one token before the row does: the last token of a row predicts nothing.
    assert packed_lengths(batch, 1) == [5, 5, 3]
    assert micro.tokens.tolist() == [[5, 6, 7, 8, 9, 1, 2, 3, 4, 2, 4, 4, 3, 0, 0, 0]]
    assert micro.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2]]
    assert micro.packed.cu_seqlens_q.tolist() == [0, 5, 10, 13, 16]
    assert micro.packed.max_seqlen_q == 5


def test_packed_rows_are_filled_up_to_pieces_of_every_context_rank():
    assert packed_lengths(batch_of(SAMPLES), 2) == [8, 8, 4]


def test_contiguous_rows():
    assert contiguous_rows(8, 2, rank=1, ranks=2) == [[4, 5], [6, 7]]
    # Fewer rows than a micro-batch, as of a policy check; rows that micro-batches of 4 do not divide.
    assert contiguous_rows(2, 64, rank=1, ranks=2) == [[1]]
    assert contiguous_rows(6, 4, rank=0, ranks=1) == [[0, 1, 2], [3, 4, 5]]
    assert contiguous_rows(4, 4, rank=0, ranks=1, multiple=2) == [[0, 1], [2, 3]]


@settings(deadline=None, max_examples=200)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=16, max_size=60),
    ranks=st.sampled_from([1, 2, 4]),
    multiple=st.sampled_from([1, 2]),
)
def test_packs_hold_every_row_once_within_the_budget(lengths, ranks, multiple):
    budget = 100
    packs = packed_rows(lengths, budget, ranks, multiple=multiple)
    rows = [row for of_rank in packs for pack in of_rank for row in pack]
    assert sorted(rows) == list(range(len(lengths)))
    counts = {len(of_rank) for of_rank in packs}
    assert len(packs) == ranks and len(counts) == 1 and counts.pop() % multiple == 0
    assert all(pack and sum(lengths[i] for i in pack) <= budget for of_rank in packs for pack in of_rank)
    loads = [sum(lengths[i] for pack in of_rank for i in pack) for of_rank in packs]
    assert max(loads) - min(loads) <= max(lengths), "longest first never leaves a larger gap"


def test_impossible_packs_are_refused():
    with pytest.raises(ValueError, match="--max-tokens-per-microbatch 10 is less than a sequence of 11"):
        packed_rows([3, 11], 10, 1)
    with pytest.raises(ValueError, match="3 responses are too few"):
        packed_rows([5, 5, 5], 10, 4)
