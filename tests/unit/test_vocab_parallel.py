"""Exactness of the token statistics on one rank, for every implementation that runs on a CPU."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from siren_megatron.vocab_parallel import (
    TopPCounters,
    native_available,
    top_p_mask,
    vocab_parallel_token_stats,
)
from tests.unit.vocab_parallel_reference import KINDS, assert_matches_reference, make_logits, reference_stats

TOP_P = (1e-9, 0.1, 0.8, 0.999, 1.0)
IMPLEMENTATIONS = ("torch", "native")


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    if request.param == "native" and not native_available():
        pytest.skip("no C++ compiler: the plain path is all there is")
    return request.param


def check(z, labels, top_p, boundary, implementation, vocab_size=None, seed=0):
    leaf = z.clone().requires_grad_(True)
    options = dict(top_p=top_p, top_p_boundary=boundary, vocab_size=vocab_size, implementation=implementation)
    stats = vocab_parallel_token_stats(leaf, labels, **options)
    weights = torch.randn(3, labels.numel(), generator=torch.Generator().manual_seed(seed))
    sum((w * s).sum() for w, s in zip(weights, stats, strict=True)).backward()
    assert torch.equal(leaf.detach().view(-1).view(torch.uint8), z.reshape(-1).view(torch.uint8))
    mask = top_p_mask(z, **{k: v for k, v in options.items()})
    assert_matches_reference(
        z, labels, stats, mask, weights, top_p, boundary == "exclusive", vocab_size, leaf.grad
    )
    assert all(s.dtype == torch.float32 for s in stats)


@pytest.mark.parametrize("boundary", ["inclusive", "exclusive"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_matches_float64_sort(kind, dtype, boundary, implementation):
    for vocab, padding in ((7, 0), (193, 5), (3001, 7)):
        z = make_logits(kind, 6, vocab + padding).to(dtype)
        labels = torch.randint(0, vocab, (6,), generator=torch.Generator().manual_seed(vocab))
        for top_p in TOP_P:
            check(z, labels, top_p, boundary, implementation, vocab)


@pytest.mark.parametrize("kind", ["language_model", "random", "massive_ties"])
def test_full_vocabulary(kind, implementation):
    z = make_logits(kind, 6, 151_936)
    for dtype in (torch.float32, torch.bfloat16):
        check(z.to(dtype), torch.arange(6) * 25_000, 0.8, "inclusive", implementation)
    check(z, torch.arange(6) * 25_000, 0.999, "exclusive", implementation, 151_643)


@st.composite
def rows_and_options(draw):
    vocab = draw(st.integers(1, 300))
    pool = draw(
        st.lists(
            st.one_of(
                st.floats(-30, 30, width=16), st.just(float("-inf")), st.sampled_from([0.0, -0.0, 1e4, -1e4])
            ),
            min_size=1,
            max_size=12,
        )
    )
    z = torch.tensor(pool)[torch.randint(0, len(pool), (3, vocab), generator=_generator(draw))]
    z = z / draw(st.sampled_from([1.0, 0.6, 2.0]))
    if draw(st.booleans()):
        z = z + torch.randn(3, vocab, generator=_generator(draw))
    size = draw(st.integers(max(1, vocab - 20), vocab))
    z[:, draw(st.integers(0, size - 1))] = draw(st.floats(-5, 5, width=16))  # one finite logit at least
    top_p = draw(st.one_of(st.sampled_from(TOP_P), st.floats(1e-9, 1.0)))
    labels = torch.randint(0, size, (3,), generator=_generator(draw))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    return z.to(dtype), labels, top_p, draw(st.sampled_from(["inclusive", "exclusive"])), size


def _generator(draw):
    return torch.Generator().manual_seed(draw(st.integers(0, 2**31)))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@settings(max_examples=120, deadline=None)
@given(case=rows_and_options())
def test_property_matches_float64_sort(name, case):
    if name == "native" and not native_available():
        return
    z, labels, top_p, boundary, size = case
    finite = z.double().gather(1, labels.unsqueeze(1)).squeeze(1) > -torch.inf
    labels = torch.where(finite, labels, z[:, :size].float().argmax(-1))
    check(z, labels, top_p, boundary, name, size)


def test_hand_computed_nucleus(implementation):
    # Probabilities 0.5, 0.25, 0.125, 0.125: mass 0.75 is reached by exactly two tokens.
    z = torch.tensor([[0.125, 0.5, 0.125, 0.25]]).log()
    expected = {
        (0.74, "inclusive"): [False, True, False, True],
        (0.74, "exclusive"): [False, True, False, False],
        (0.8, "inclusive"): [True, True, False, True],  # the tie goes to the lower id
        (0.8, "exclusive"): [False, True, False, True],
        (0.3, "exclusive"): [False, False, False, False],
    }
    for (top_p, boundary), mask in expected.items():
        got = top_p_mask(z, top_p=top_p, top_p_boundary=boundary, implementation=implementation)
        assert got.tolist() == [mask], (top_p, boundary)
    stats = vocab_parallel_token_stats(z, torch.tensor([1]), top_p=0.74, implementation=implementation)
    two_thirds = torch.tensor([2 / 3, 1 / 3])
    torch.testing.assert_close(stats.top_p_entropy[0], -(two_thirds * two_thirds.log()).sum())
    torch.testing.assert_close(stats.logprobs[0], torch.tensor(0.5).log())


@pytest.mark.parametrize("top_p", [0.3, 0.8, 1.0])
@pytest.mark.parametrize("boundary", ["inclusive", "exclusive"])
def test_gradcheck(top_p, boundary):
    z = make_logits("random", 4, 9).double().requires_grad_(True)
    labels = torch.tensor([0, 8, 3, 3])

    def run(x):
        return tuple(
            vocab_parallel_token_stats(x, labels, top_p=top_p, top_p_boundary=boundary, vocab_size=8)
        )

    labels[1] = 7
    assert torch.autograd.gradcheck(run, (z,), eps=1e-6, atol=1e-7)


def test_nan_stays_in_its_row(implementation):
    z = make_logits("random", 5, 400)
    z[1, 17] = torch.nan
    z[3] = -torch.inf
    z[4, 0] = torch.inf
    counters = TopPCounters()
    leaf = z.clone().requires_grad_(True)
    options = dict(top_p=0.8, implementation=implementation)
    stats = vocab_parallel_token_stats(leaf, torch.tensor([0, 1, 2, 3, 4]), counters=counters, **options)
    bad = torch.tensor([False, True, False, True, True])
    for value in stats:
        assert torch.equal(value.isnan(), bad)
    assert counters.nan_rows == 3 and counters.rows == 5
    sum(s.sum() for s in stats).backward()
    assert torch.equal(leaf.grad.isnan().any(-1), bad)
    assert not top_p_mask(z, **options)[bad].any()


def test_label_with_zero_probability(implementation):
    z = torch.tensor([[0.0, -torch.inf, 1.0]], requires_grad=True)
    stats = vocab_parallel_token_stats(z, torch.tensor([1]), top_p=0.8, implementation=implementation)
    assert stats.logprobs[0] == -torch.inf
    stats.logprobs.sum().backward()
    torch.testing.assert_close(z.grad, torch.tensor([[-0.26894, 1.0, -0.73106]]), rtol=0, atol=1e-5)


def test_shapes_and_empty_rows(implementation):
    z = make_logits("random", 6, 33).view(2, 3, 33).requires_grad_(True)
    labels = torch.arange(6).view(2, 3)
    stats = vocab_parallel_token_stats(z, labels, top_p=0.8, implementation=implementation)
    flat = vocab_parallel_token_stats(z.view(6, 33), labels.view(6), top_p=0.8, implementation=implementation)
    for a, b in zip(stats, flat, strict=True):
        assert torch.equal(a, b.view(2, 3))
    transposed = vocab_parallel_token_stats(
        z.transpose(0, 1), labels.t(), top_p=0.8, implementation=implementation
    )
    for a, b in zip(stats, transposed, strict=True):
        assert torch.equal(a, b.t())
    empty = torch.zeros(0, 33, requires_grad=True)
    none = vocab_parallel_token_stats(empty, labels.view(6)[:0], top_p=0.8, implementation=implementation)
    sum(s.sum() for s in none).backward()
    assert empty.grad.shape == (0, 33) and none.entropy.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_inplace_backward(dtype, implementation):
    base = make_logits("language_model", 5, 700).to(dtype)
    labels = torch.arange(5)
    grads = []
    for inplace in (False, True):
        leaf = base.clone().requires_grad_(True)
        logits = leaf * 1.0
        stats = vocab_parallel_token_stats(
            logits, labels, top_p=0.8, inplace_backward=inplace, implementation=implementation
        )
        sum((i + 1) * s.sum() for i, s in enumerate(stats)).backward()
        grads.append(leaf.grad)
    assert torch.equal(grads[0], grads[1])
    with pytest.raises(ValueError, match="leaf"):
        vocab_parallel_token_stats(base.requires_grad_(True), labels, inplace_backward=True)


def test_inplace_backward_is_seen_by_autograd(implementation):
    """Another operation that saved the logits must fail loudly, not read the gradient in their place."""
    leaf = make_logits("random", 3, 50).requires_grad_(True)
    logits = leaf * 1.0
    other = (logits * logits).sum()
    stats = vocab_parallel_token_stats(
        logits, torch.arange(3), top_p=0.8, inplace_backward=True, implementation=implementation
    )
    stats.entropy.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_chunks_give_the_same(implementation):
    z = make_logits("random", 40, 5000)
    labels = torch.arange(40)
    results = []
    for chunk_mb in (0.05, 64):
        leaf = z.clone().requires_grad_(True)
        stats = vocab_parallel_token_stats(
            leaf, labels, top_p=0.8, chunk_mb=chunk_mb, implementation=implementation
        )
        sum(s.sum() for s in stats).backward()
        results.append((*stats, leaf.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_fallback_share_is_counted(implementation):
    counters = TopPCounters()
    z = torch.cat([make_logits("language_model", 8, 20_000), make_logits("random", 2, 20_000)])
    vocab_parallel_token_stats(
        z, torch.arange(10), top_p=0.8, counters=counters, implementation=implementation
    )
    assert counters.rows == 10 and 2 <= counters.fallback_rows <= 4
    assert counters.nan_rows == 0


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(top_p=0.0), "top_p"),
        (dict(top_p=1.1), "top_p"),
        (dict(top_p=float("nan")), "top_p"),
        (dict(top_p_boundary="both"), "top_p_boundary"),
        (dict(vocab_size=12), "vocab_size"),
        (dict(vocab_size=0), "vocab_size"),
        (dict(chunk_mb=0), "chunk_mb"),
        (dict(implementation="fast"), "implementation"),
    ],
)
def test_refuses_nonsense(options, message):
    with pytest.raises(ValueError, match=message):
        vocab_parallel_token_stats(torch.zeros(2, 11), torch.tensor([0, 1]), **options)


def test_refuses_bad_labels_and_shapes():
    with pytest.raises(ValueError, match="labels"):
        vocab_parallel_token_stats(torch.zeros(2, 11), torch.tensor([0, 11]))
    with pytest.raises(ValueError, match="labels"):
        vocab_parallel_token_stats(torch.zeros(2, 11), torch.tensor([0, -100]))
    with pytest.raises(ValueError, match="labels"):
        vocab_parallel_token_stats(torch.zeros(2, 11), torch.tensor([0, 10]), vocab_size=10)
    with pytest.raises(ValueError, match="labels"):
        vocab_parallel_token_stats(torch.zeros(2, 11), torch.tensor([0]))
    with pytest.raises(ValueError, match="labels"):
        vocab_parallel_token_stats(torch.zeros(2, 11), torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match="floating"):
        vocab_parallel_token_stats(torch.zeros(2, 11, dtype=torch.int64), torch.tensor([0, 1]))


def test_temperature_is_the_callers(implementation):
    z = make_logits("language_model", 4, 600)
    labels = torch.arange(4)
    for temperature in (0.3, 1.0, 1.7):
        scaled = z / temperature
        stats = vocab_parallel_token_stats(scaled, labels, top_p=0.8, implementation=implementation)
        for value, target in zip(stats, reference_stats(scaled, labels, 0.8, False)[:3], strict=True):
            torch.testing.assert_close(value.double(), target.detach(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_rows_whose_maximum_moves(dtype, implementation):
    """Later parts of a row may lie hundreds above or below the earlier ones, or begin with -inf only."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 9000, generator=g), torch.randn(2, 9000, generator=g)
    rows = [
        torch.linspace(-400, 300, 20_000).repeat(2, 1),
        torch.cat([a - 500, b + 70], 1),
        torch.cat([a + 500, b - 70], 1),
        torch.cat([torch.full((2, 9000), -torch.inf), b], 1),
        torch.cat([torch.full((2, 6000), -3e38), torch.full((2, 6000), 3e38)], 1),
    ]
    for z in rows:
        z = z.to(dtype)
        for top_p in (0.3, 0.999):
            check(z, z.float().argmax(-1), top_p, "inclusive", implementation)
