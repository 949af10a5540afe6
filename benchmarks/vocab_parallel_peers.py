"""The methods of benchmarks/vocab_parallel.py: ours, verl's, and our own writing of the other algorithms.

Each is a function (z [T, vocab/tp], labels [T], upstream [3, T]) that runs forward and backward once.
"""

import contextlib

import torch
import torch.distributed as dist

from siren_megatron.vocab_parallel import TopPCounters, native_available, vocab_parallel_token_stats

CANDIDATE = "torch.compile"  # measured only where --methods names it: it compiles for each shape
SLOW = ("full sort", "released (top-k 10,000)", "all-to-all top-p")


def language_model_rows(tokens: int, vocab: int) -> torch.Tensor:
    """fp32 [tokens, vocab]: 40 likely tokens, falling as a power of their rank, over a Gaussian tail."""
    z = torch.randn(tokens, vocab).mul_(2.0)
    ranks = torch.arange(1, 41, dtype=torch.float32)
    ids = torch.randint(0, vocab, (tokens, 40))
    return z.scatter_(1, ids, 16.0 - 2.5 * ranks.log() * (1.0 + torch.rand(tokens, 1)))


def ours(implementation: str, top_p: float, inplace: bool = False, only_logprobs: bool = False):
    own = {}

    def prepare(z):  # not timed: logits that this run may overwrite
        if inplace:
            if "z" not in own or own["z"].shape != z.shape:
                own["z"] = torch.empty_like(z)
            own["z"].copy_(z)

    def run(z, labels, upstream):
        counters = TopPCounters()
        logits = (own["z"] if inplace else z).detach().requires_grad_(True)
        if inplace:
            logits = _NotALeaf.apply(logits)
        stats = vocab_parallel_token_stats(
            logits, labels, top_p=1.0 if only_logprobs else top_p, tp_group=dist.group.WORLD,
            implementation=implementation, inplace_backward=inplace, counters=counters,
        )  # fmt: skip
        outputs, grads = (stats[:1], upstream[:1]) if only_logprobs else (stats, upstream)
        torch.autograd.grad(outputs, logits, list(grads))
        return dict(fallback=counters.fallback_rows)

    run.prepare = prepare
    return run


class _NotALeaf(torch.autograd.Function):
    """The same storage as the output of an operation (a real copy would be timed)."""

    @staticmethod
    def forward(ctx, leaf):
        return torch.empty(0, dtype=leaf.dtype).set_(leaf.detach())

    @staticmethod
    def backward(ctx, grad):
        return grad


def verl_entropy_and_logprob():
    from megatron.core import parallel_state
    from verl.utils.megatron.tensor_parallel import (
        vocab_parallel_entropy,
        vocab_parallel_log_probs_from_logits,
    )

    parallel_state._TENSOR_MODEL_PARALLEL_GROUP = dist.group.WORLD

    def run(z, labels, upstream):
        # As verl's Megatron engine does: the cross entropy overwrites its logits, so it gets a copy.
        leaf = z.detach().requires_grad_(True)
        logprobs = vocab_parallel_log_probs_from_logits(leaf.clone(), labels)
        entropy = vocab_parallel_entropy(leaf)
        torch.autograd.grad([logprobs, entropy], leaf, [upstream[0], upstream[1].to(entropy.dtype)])

    return run


def gathered(z: torch.Tensor, size: int) -> torch.Tensor:
    """The whole vocabulary on every rank, which these algorithms need. [T, vocab]."""
    if size == 1:
        return z
    parts = [torch.empty_like(z) for _ in range(size)]
    dist.all_gather(parts, z)
    return torch.cat(parts, -1)


def full_sort(size: int, top_p: float):
    def run(z, labels, upstream):
        leaf = gathered(z, size).detach().requires_grad_(True)
        logp = leaf.float().log_softmax(-1)
        with torch.no_grad():
            p, ids = logp.exp().sort(-1, descending=True)
            keep = p.cumsum(-1) - p < top_p
            mask = torch.zeros_like(keep).scatter_(1, ids, keep)
        entropy = -(logp.exp() * logp).sum(-1)
        logq = logp.masked_fill(~mask, -1e30).log_softmax(-1)
        top = -(logq.exp() * logq).masked_fill(~mask, 0.0).sum(-1)
        outputs = [logp.gather(1, labels.unsqueeze(1)).squeeze(1), entropy, top]
        torch.autograd.grad(outputs, leaf, list(upstream))

    return run


def released(size: int, top_p: float):
    """SIREN's released algorithm in our words: softmax, top-k of 10,000, cumulative mass, scattered mask."""

    def run(z, labels, upstream):
        leaf = gathered(z, size).detach().requires_grad_(True)
        logits = leaf.float()
        p = logits.softmax(-1)
        with torch.no_grad():
            values, ids = p.topk(min(10_000, p.shape[1]), -1)
            mask = torch.zeros_like(p, dtype=torch.bool).scatter_(1, ids, values.cumsum(-1) < top_p)
        q = p * mask
        q = q / (q.sum(-1, keepdim=True) + 1e-12)
        top = -(q * (q + 1e-12).log()).sum(-1)
        entropy = logits.logsumexp(-1) - (p * logits).sum(-1)
        logprobs = logits.log_softmax(-1).gather(1, labels.unsqueeze(1)).squeeze(1)
        torch.autograd.grad([logprobs, entropy, top], leaf, list(upstream))

    return run


class _Swap(torch.autograd.Function):
    """[T, vocab/tp] of every rank -> [T/tp, vocab] (forward) and back (backward), by all-to-all."""

    @staticmethod
    def forward(ctx, z, size, inverse):
        ctx.size, ctx.inverse = size, inverse
        return _swap(z, size, inverse)

    @staticmethod
    def backward(ctx, grad):
        return _swap(grad, ctx.size, not ctx.inverse), None, None


def _swap(z, size, inverse):
    if size == 1:
        return z.clone()
    if inverse:  # [T/tp, vocab] -> [T, vocab/tp]
        send = torch.cat([part.contiguous() for part in z.chunk(size, -1)])
        out = torch.empty_like(send)
        dist.all_to_all_single(out, send)
        return out
    out = torch.empty_like(z)
    dist.all_to_all_single(out, z.contiguous())
    return torch.cat(out.chunk(size, 0), -1)


def all_to_all_top_p(size: int, top_p: float):
    """NeMo-RL's algorithm in our words: swap to whole rows, sort, filter, softmax, gradients swapped back."""

    def run(z, labels, upstream):
        leaf = z.detach().requires_grad_(True)
        whole = _Swap.apply(leaf, size, False).float()
        with torch.no_grad():
            values, ids = whole.sort(-1, descending=True)
            p = values.softmax(-1)
            keep = p.cumsum(-1) - p < top_p
            mask = torch.zeros_like(keep).scatter_(1, ids, keep)
        filtered = whole.masked_fill(~mask, -1e30)
        top = -(filtered.softmax(-1) * filtered.log_softmax(-1)).masked_fill(~mask, 0.0).sum(-1)
        logp = whole.log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        own = slice(0, whole.shape[0]) if size == 1 else _own_rows(whole.shape[0])
        outputs = [logp.gather(1, labels[own].unsqueeze(1)).squeeze(1), entropy, top]
        torch.autograd.grad(outputs, leaf, [g[own] for g in upstream])

    return run


def _own_rows(rows: int) -> slice:
    return slice(dist.get_rank() * rows, (dist.get_rank() + 1) * rows)


def floor(z, labels, upstream, buffer={}):  # noqa: B006 - the buffer is the point: allocated once
    """Read the logits once, read and write as many bytes in place: as 32-bit words, whatever the dtype."""
    key = (z.nbytes, z.dtype)
    if key not in buffer:
        buffer.clear()
        buffer[key] = torch.zeros(z.nbytes // 4, dtype=torch.float32)
    words = z.view(-1).view(torch.int32)
    torch.amax(words, 0)
    buffer[key].neg_()


def make_methods(size: int, top_p: float, *, candidate: bool = False) -> dict:
    """name -> method, those that exist here."""
    methods = {"floor": floor}
    if native_available():
        methods["ours, compiled"] = ours("native", top_p)
        methods["ours, compiled, in place"] = ours("native", top_p, inplace=True)
        methods["ours, compiled, log-prob only"] = ours("native", top_p, only_logprobs=True)
    methods["ours, plain torch"] = ours("torch", top_p)
    with contextlib.suppress(ImportError):
        methods["verl"] = verl_entropy_and_logprob()
    methods["full sort"] = full_sort(size, top_p)
    methods["released (top-k 10,000)"] = released(size, top_p)
    methods["all-to-all top-p"] = all_to_all_top_p(size, top_p)
    if candidate:
        from vocab_parallel_inductor import inductor

        methods[CANDIDATE] = inductor(top_p)
    return methods
