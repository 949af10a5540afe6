"""The sharded token statistics on gloo ranks: exact, the same for every TP size, one collective."""

import itertools

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, settings

from siren_megatron.vocab_parallel import (
    TopPCounters,
    native_available,
    top_p_mask,
    vocab_parallel_token_stats,
)
from tests.distributed.launch import run_ranks
from tests.unit.vocab_parallel_reference import KINDS, assert_matches_reference, make_logits

TOP_P = (1e-9, 0.1, 0.8, 0.999, 1.0)
ROWS = 5
IMPLEMENTATIONS = ["torch"] + ["native"] * native_available()


def shard_of(z, rank, size):
    return z.chunk(size, -1)[rank].contiguous()


def run_shard(z, labels, rank, size, options, group):
    """Values, this rank's mask and gradient (weights as in assert_matches_reference)."""
    leaf = shard_of(z, rank, size).requires_grad_(True)
    stats = vocab_parallel_token_stats(leaf, labels, tp_group=group, **options)
    weights = torch.randn(3, labels.numel(), generator=torch.Generator().manual_seed(1))
    sum((w * s).sum() for w, s in zip(weights, stats, strict=True)).backward()
    mask = top_p_mask(leaf.detach(), tp_group=group, **options)
    return [s.detach() for s in stats], mask, leaf.grad, weights


def cases(size):
    """(name, logits [ROWS, vocab], true vocabulary): padding in the last shard, or filling it."""
    for kind, (vocab, padding) in zip(KINDS, ((96, 7), (1024, 0), (4096, 11)) * 3, strict=False):
        yield f"{kind}-{vocab}", make_logits(kind, ROWS, vocab), vocab - padding
    z = make_logits("random", ROWS, 64)
    yield "a shard of padding", z, 64 // size - 3 if size > 1 else 61
    # Ties within and across shards, the threshold among them.
    yield "two levels", torch.where(torch.arange(512) % 3 == 0, 1.0, 0.25).expand(ROWS, -1).clone(), 512
    z = make_logits("random", ROWS, 256)
    z[:, : 256 // size] = -torch.inf
    z[:, -1] = 3.0
    yield "a shard of -inf", z, 256


def all_cases(rank, size):
    group = dist.group.WORLD
    checked = 0
    for name, logits, vocab_size in cases(size):
        for implementation, dtype in itertools.product(IMPLEMENTATIONS, (torch.float32, torch.bfloat16)):
            z = logits.to(dtype)
            labels = z[:, :vocab_size].float().argsort(-1)[:, -3].clone()
            labels[0] = z[0, :vocab_size].float().argmax()
            for top_p in TOP_P:
                for boundary in ("inclusive", "exclusive"):
                    options = dict(
                        top_p=top_p,
                        top_p_boundary=boundary,
                        vocab_size=vocab_size,
                        implementation=implementation,
                    )
                    stats, mask, grad, weights = run_shard(z, labels, rank, size, options, group)
                    masks = [torch.empty_like(mask) for _ in range(size)]
                    grads = [torch.empty_like(grad) for _ in range(size)]
                    dist.all_gather(masks, mask)
                    dist.all_gather(grads, grad)
                    if rank != 0:
                        continue
                    mask, grad = torch.cat(masks, -1), torch.cat(grads, -1)
                    try:
                        assert_matches_reference(
                            z, labels, stats, mask, weights, top_p, boundary == "exclusive", vocab_size, grad
                        )
                    except AssertionError as error:
                        raise AssertionError(f"{name} {dtype} {options}: {error}") from error
                    checked += 1
    return checked


@pytest.mark.parametrize("size", [1, 2, 4])
def test_matches_float64_sort(size):
    expected = (len(KINDS) + 3) * len(IMPLEMENTATIONS) * 2 * len(TOP_P) * 2
    assert run_ranks(all_cases, size)[0] == expected


def property_ranks(rank, size, examples):
    """hypothesis, derandomised, draws the same examples on every rank; each compares with the reference."""
    group = dist.group.WORLD

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.integers(0, 2**31), st.integers(1, 60), st.floats(1e-9, 1.0), st.booleans(), st.booleans())
    def run(seed, per_rank, top_p, exclusive, ties):
        g = torch.Generator().manual_seed(seed)
        z = torch.randn(3, per_rank * size, generator=g) * 3
        z = z.round() if ties else z
        z[:, 1:] = z[:, 1:].masked_fill(torch.rand(3, per_rank * size - 1, generator=g) < 0.3, -torch.inf)
        vocab_size = int(torch.randint(1, per_rank * size + 1, (), generator=g))
        labels = z[:, :vocab_size].argmax(-1)
        boundary = "exclusive" if exclusive else "inclusive"
        options = dict(top_p=top_p, top_p_boundary=boundary, vocab_size=vocab_size)
        stats, mask, grad, weights = run_shard(z, labels, rank, size, options, group)
        masks = [torch.empty_like(mask) for _ in range(size)]
        grads = [torch.empty_like(grad) for _ in range(size)]
        dist.all_gather(masks, mask)
        dist.all_gather(grads, grad)
        assert_matches_reference(
            z,
            labels,
            stats,
            torch.cat(masks, -1),
            weights,
            top_p,
            exclusive,
            vocab_size,
            torch.cat(grads, -1),
        )

    run()


@pytest.mark.parametrize("size", [3])
def test_property_matches_float64_sort(size):
    run_ranks(property_ranks, size, 60)


def masks_of(rank, size, rows, options):
    out = []
    for z, top_p, implementation in itertools.product(rows, options, IMPLEMENTATIONS):
        mask = top_p_mask(
            shard_of(z, rank, size), top_p=top_p, tp_group=dist.group.WORLD, implementation=implementation
        )
        out.append(mask)
    return out


def test_nucleus_is_the_same_for_every_tp():
    """Flat, tied and language-model rows of a real vocabulary size: TP 1, 2 and 4 and all engines agree."""
    parts = [make_logits(kind, 4, 32_000) for kind in ("random", "massive_ties", "language_model")]
    rows = [torch.cat(parts), torch.cat(parts).bfloat16()]
    options = (0.8, 0.999)
    expected = [
        top_p_mask(z, top_p=top_p, implementation=implementation)
        for z, top_p, implementation in itertools.product(rows, options, IMPLEMENTATIONS)
    ]
    for size in (2, 4):
        shards = run_ranks(masks_of, size, rows, options)
        for found, mask in zip(zip(*shards, strict=True), expected, strict=True):
            assert torch.equal(torch.cat(found, -1), mask), size
    step = len(IMPLEMENTATIONS)
    for i in range(0, len(expected), step):
        assert all(torch.equal(expected[i], other) for other in expected[i : i + step])


class CountCollectives:
    """Counts every collective of torch.distributed that is called inside the block, and its bytes."""

    NAMES = (
        "all_reduce",
        "all_gather",
        "all_gather_into_tensor",
        "all_gather_single",
        "reduce_scatter_tensor",
        "broadcast",
    )

    def __enter__(self):
        self.calls, self.sent = [], 0
        self.originals = {name: getattr(dist, name) for name in self.NAMES}
        for name, original in self.originals.items():
            setattr(dist, name, self.wrap(name, original))
        return self

    def wrap(self, name, original):
        def counted(*args, **kwargs):
            self.calls.append(name)
            self.sent += (args[1] if name.startswith("all_gather") else args[0]).nbytes
            return original(*args, **kwargs)

        return counted

    def __exit__(self, *_):
        for name, original in self.originals.items():
            setattr(dist, name, original)


def count_collectives(rank, size, cases):
    out = []
    for implementation, top_p, kind in cases:
        z = shard_of(make_logits(kind, 16, 8192), rank, size).requires_grad_(True)
        counters = TopPCounters()
        options = dict(
            top_p=top_p, tp_group=dist.group.WORLD, implementation=implementation, counters=counters
        )
        with CountCollectives() as forward:
            stats = vocab_parallel_token_stats(z, torch.arange(16), **options)
        with CountCollectives() as backward:
            sum(s.sum() for s in stats).backward()
        out.append((forward.calls, forward.sent, backward.calls, counters.fallback_rows))
    return out


@pytest.mark.parametrize("size", [2, 4])
def test_one_collective_forward_none_backward(size):
    cases = [
        (implementation, top_p, kind)
        for implementation in IMPLEMENTATIONS
        for top_p, kind in ((0.8, "language_model"), (1.0, "language_model"), (0.8, "random"))
    ]
    for of_rank in run_ranks(count_collectives, size, cases):
        for (_, top_p, kind), (calls, sent, backward, fallback) in zip(cases, of_rank, strict=True):
            assert calls[0] in ("all_gather_single", "all_gather_into_tensor") and backward == []
            if kind == "random":
                assert fallback == 16 and 3 <= len(calls) <= 7
            else:
                assert fallback == 0 and len(calls) == 1
                assert sent == 16 * (288 if top_p < 1 else 32)  # bytes: 288 a token and rank


def no_rows(rank, size):
    z = torch.zeros(0, 8, requires_grad=True)
    stats = vocab_parallel_token_stats(
        z, torch.zeros(0, dtype=torch.int64), top_p=0.8, tp_group=dist.group.WORLD, vocab_size=9
    )
    sum(s.sum() for s in stats).backward()
    return tuple(z.grad.shape), stats.entropy.numel()


def nan_on_last_rank(rank, size):
    z = make_logits("random", 3, 400)
    z[1, 300] = torch.nan
    leaf = shard_of(z, rank, size).requires_grad_(True)
    stats = vocab_parallel_token_stats(leaf, torch.arange(3), top_p=0.8, tp_group=dist.group.WORLD)
    sum(s.sum() for s in stats).backward()
    return [s.isnan().tolist() for s in stats], leaf.grad.isnan().any(-1).tolist()


def mixed_engines(rank, size, z):
    options = dict(
        top_p=0.8, tp_group=dist.group.WORLD, implementation=IMPLEMENTATIONS[-1 if rank == 0 else 0]
    )
    return vocab_parallel_token_stats(shard_of(z, rank, size), torch.arange(z.shape[0]), **options)


def odd_cases(rank, size, z):
    return no_rows(rank, size), nan_on_last_rank(rank, size), mixed_engines(rank, size, z)


def test_no_rows_nan_rows_and_mixed_engines():
    """The last: a rank without a C++ compiler joins ranks that have one."""
    z = torch.cat([make_logits("language_model", 3, 2048), make_logits("random", 3, 2048)])
    expected = vocab_parallel_token_stats(z, torch.arange(6), top_p=0.8)
    for empty, (values, grads), mixed in run_ranks(odd_cases, 2, z):
        assert empty == ((0, 8), 0)
        assert values == [[False, True, False]] * 3 and grads == [False, True, False]
        for value, target in zip(mixed, expected, strict=True):
            torch.testing.assert_close(value, target, rtol=0, atol=1e-5)
