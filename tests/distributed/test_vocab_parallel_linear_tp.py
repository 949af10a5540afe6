"""The fused linear path on gloo ranks: values and both gradients equal the unsharded logits path."""

import pytest
import torch
import torch.distributed as dist

from siren_megatron.vocab_parallel import TopPCounters, linear_token_stats
from tests.distributed.launch import run_ranks


def inputs(scale):
    g = torch.Generator().manual_seed(5)
    hidden = torch.randn(23, 8, generator=g, dtype=torch.float32)
    weight = torch.randn(640, 8, generator=g) * scale
    return hidden, weight, torch.randint(0, 630, (23,), generator=g), torch.randn(3, 23, generator=g)


def loss_of(stats, weights):
    return sum((w * s).sum() for w, s in zip(weights, stats, strict=True))


def run(rank, size, scales, paths):
    out = {}
    for scale in scales:
        hidden, weight, labels, weights = inputs(scale)
        for path in paths:
            h = hidden.clone().requires_grad_(True)
            w = torch.nn.Parameter(weight.chunk(size)[rank].clone())
            w.main_grad = torch.zeros_like(w)
            counters = TopPCounters()
            stats = linear_token_stats(
                h, w, labels, top_p=0.8, vocab_size=630, tp_group=dist.group.WORLD, temperature=0.9,
                chunk_mb=0.01, path=path, counters=counters,
            )  # fmt: skip
            loss_of(stats, weights).backward()
            assert counters.rows == 23 and (scale > 0.1 or counters.fallback_rows > 0)
            grads = [torch.empty_like(w.main_grad) for _ in range(size)]
            dist.all_gather(grads, w.main_grad)
            out[scale, path] = [s.detach() for s in stats], h.grad, torch.cat(grads)
    return out


@pytest.mark.parametrize("size", [2, 4])
def test_equals_the_unsharded_logits_path(size):
    scales, paths = (0.02, 1.5), ("fused", "logits")
    for found in run_ranks(run, size, scales, paths):
        for (scale, path), (stats, grad_hidden, grad_weight) in found.items():
            hidden, weight, labels, weights = inputs(scale)
            h, w = hidden.clone().requires_grad_(True), weight.clone().requires_grad_(True)
            expected = linear_token_stats(
                h,
                w,
                labels,
                top_p=0.8,
                vocab_size=630,
                temperature=0.9,
                path="logits",
                implementation="torch",
            )
            loss_of(expected, weights).backward()
            where = f"scale {scale}, path {path}"
            for value, target in zip(stats, expected, strict=True):
                torch.testing.assert_close(
                    value, target.detach(), rtol=1e-5, atol=1e-5, msg=lambda m, where=where: f"{where}: {m}"
                )
            torch.testing.assert_close(grad_hidden, h.grad, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(grad_weight, w.grad, rtol=1e-4, atol=1e-5)
