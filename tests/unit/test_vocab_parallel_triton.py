"""The Triton kernels, in Triton's interpreter, against the float64 sort."""

import multiprocessing as mp
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from tests.unit.vocab_parallel_reference import assert_matches_reference, make_logits

pytest.importorskip("triton")

CASES = [
    ("language_model", torch.float32, 0.8, "inclusive"),
    ("language_model", torch.bfloat16, 0.8, "exclusive"),
    ("language_model", torch.float32, 1.0, "inclusive"),
    ("random", torch.float32, 0.8, "inclusive"),  # the radix select
    ("massive_ties", torch.bfloat16, 0.999, "exclusive"),
    ("minus_inf", torch.float32, 1e-9, "inclusive"),
    ("peaked", torch.float32, 0.999, "inclusive"),
    ("one_allowed", torch.bfloat16, 0.8, "inclusive"),
]


def check(kind, dtype, top_p, boundary):
    from siren_megatron.vocab_parallel import top_p_mask, vocab_parallel_token_stats

    z = make_logits(kind, 2, 1303).to(dtype)
    labels = z[:, :1300].float().argmax(-1)
    leaf = z.clone().requires_grad_(True)
    options = dict(top_p=top_p, top_p_boundary=boundary, vocab_size=1300, implementation="triton")
    stats = vocab_parallel_token_stats(leaf, labels, **options)
    weights = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    sum((w * s).sum() for w, s in zip(weights, stats, strict=True)).backward()
    mask = top_p_mask(z, **options) if kind != "peaked" else None
    exclusive = boundary == "exclusive"
    assert_matches_reference(z, labels, stats, mask, weights, top_p, exclusive, 1300, leaf.grad)


def test_matches_float64_sort_in_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read when triton is imported: hence fresh processes
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with ProcessPoolExecutor(2, mp_context=mp.get_context("spawn")) as pool:
        for case, future in [(case, pool.submit(check, *case)) for case in CASES]:
            error = future.exception(timeout=300)
            assert error is None, f"{case}: {error}"


def nan_row():
    from siren_megatron.vocab_parallel import vocab_parallel_token_stats

    z = make_logits("random", 2, 200)
    z[1, 3] = torch.nan
    stats = vocab_parallel_token_stats(z, torch.tensor([0, 1]), implementation="triton")
    return [s.isnan().tolist() for s in stats]


def test_nan_stays_in_its_row(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with ProcessPoolExecutor(1, mp_context=mp.get_context("spawn")) as pool:
        assert pool.submit(nan_row).result(timeout=120) == [[False, True]] * 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the CPU tensor is not refused for want of a GPU")
def test_needs_a_gpu_outside_the_interpreter():
    from siren_megatron.vocab_parallel import vocab_parallel_token_stats

    with pytest.raises(ValueError, match="triton"):
        vocab_parallel_token_stats(torch.zeros(1, 4), torch.tensor([0]), implementation="triton")
