"""The compiled engine: built once by many processes, refused gracefully, and the twin of the plain one."""

import multiprocessing as mp
import warnings

import pytest
import torch

from siren_megatron.vocab_parallel import native, native_available, torch_engine, vocab_parallel_token_stats
from siren_megatron.vocab_parallel.radix import radix_select
from tests.unit.vocab_parallel_reference import make_logits

needs_compiler = pytest.mark.skipif(not native_available(), reason="no C++ compiler")


@needs_compiler
def test_processes_that_start_together_build_one_library(tmp_path):
    with mp.get_context("spawn").Pool(3) as pool:
        paths = pool.map(native.build, [tmp_path] * 3)
    assert len(set(paths)) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["build.lock", paths[0].name]


def test_without_a_compiler_plain_torch_takes_over(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.library.cache_clear()
    try:
        with pytest.warns(UserWarning, match="using plain torch"):
            assert not native_available()
        z, labels = make_logits("random", 3, 50), torch.arange(3)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # one warning is enough
            stats = vocab_parallel_token_stats(z, labels, top_p=0.8)
        plain = vocab_parallel_token_stats(z, labels, top_p=0.8, implementation="torch")
        assert all(torch.equal(a, b) for a, b in zip(stats, plain, strict=True))
        with pytest.raises(ValueError, match="native"):
            vocab_parallel_token_stats(z, labels, implementation="native")
    finally:
        native.library.cache_clear()


def test_a_compiler_that_fails_is_reported(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(RuntimeError, match="could not build"):
        native.build(tmp_path)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["language_model", "random", "massive_ties", "minus_inf"])
def test_sweep_and_merge_are_the_plain_ones(kind, dtype):
    z = make_logits(kind, 6, 3001).to(dtype)
    labels = torch.tensor([0, 3000, -1, 5, 4000, 7])
    ours, columns = native.sweep(z, labels, 2990, 64, 1 << 20)
    plain, plain_columns = torch_engine.sweep(z, labels, 2990, 64, 1 << 20)
    assert torch.equal(ours[:, :2], plain[:, :2])
    wide, plain_wide = ours.view(torch.float64)[:, 1:3], plain.view(torch.float64)[:, 1:3]
    torch.testing.assert_close(wide, plain_wide, rtol=2e-6, atol=1e-6)
    for exclusive in (False, True):
        first = native.merge(ours.unsqueeze(0), columns, 0, 0.8, exclusive)
        second = torch_engine.merge(plain.unsqueeze(0), plain_columns, 0, 0.8, exclusive)
        both = first.certified & second.certified
        assert both.sum() >= (6 if kind == "language_model" else 0)
        assert torch.equal(first.tau[both], second.tau[both])
        assert torch.equal(first.cut[both], second.cut[both])


@needs_compiler
@pytest.mark.parametrize("kind", ["random", "massive_ties", "all_equal", "minus_inf", "large"])
def test_radix_scans_are_the_plain_ones(kind):
    z = make_logits(kind, 5, 2000)
    index, width = torch.tensor([0, 2, 4]), 1990
    row_max = z[index, :width].amax(-1)
    for top_p in (0.3, 0.8, 0.999):
        found = [
            radix_select(engine.RowScans(z, index, row_max, width), row_max, top_p, False)
            for engine in (native, torch_engine)
        ]
        assert torch.equal(found[0].tau, found[1].tau) and torch.equal(found[0].cut, found[1].cut)
        for name in ("sum_e", "mass", "mass_ed"):
            first, second = (getattr(f, name) for f in found)
            torch.testing.assert_close(first, second, rtol=1e-6 if name == "mass_ed" else 1e-13, atol=1e-6)


@needs_compiler
def test_every_width_and_alignment():
    """Rows that begin anywhere in a cache line, and end anywhere in a vector."""
    for width in (*range(1, 70), 511, 512, 513, 4095, 4097):
        z = make_logits("random", 3, width)
        labels = torch.arange(3) % width
        grads = []
        for implementation in ("native", "torch"):
            leaf = z.clone().requires_grad_(True)
            stats = vocab_parallel_token_stats(leaf, labels, top_p=0.7, implementation=implementation)
            sum((i + 1) * s.sum() for i, s in enumerate(stats)).backward()
            grads.append((*stats, leaf.grad))
        for first, second in zip(*grads, strict=True):
            torch.testing.assert_close(first, second, rtol=1e-5, atol=2e-6)
