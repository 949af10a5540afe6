"""The likeliest tokens of logits sharded over the vocabulary, with their log-probs.

Legend: T = rows, vocab = padded vocabulary, tp = tensor-parallel size; rank r holds the token ids
[r * vocab/tp, (r + 1) * vocab/tp).
"""

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_BYTES = 64 * 2**20  # of logits in fp32 at a time


@torch.no_grad()
def vocab_parallel_top_tokens(
    vocab_parallel_logits: Tensor, count: int, *, vocab_size: int, tp_group=None
) -> tuple[Tensor, Tensor]:
    """Ids and log-probs of the `count` likeliest tokens of each row, the likeliest first.

    Args:
        vocab_parallel_logits: [T, vocab/tp], already divided by the temperature.
        count: at least 1.
        vocab_size: true vocabulary; columns with a global id >= vocab_size don't exist.
        tp_group: tensor-parallel process group; None = unsharded.

    Returns:
        (ids [T, count] int64, log-probs [T, count] fp32 in nats), the same on every rank; no gradient. Equal
        log-probs come in any order. Where count exceeds vocab_size the rest is id -1 with log-prob -inf.
    """
    rows, shard = vocab_parallel_logits.shape
    size = 1 if tp_group is None else dist.get_world_size(tp_group)
    rank = 0 if tp_group is None else dist.get_rank(tp_group)
    width = min(max(vocab_size - rank * shard, 0), shard)
    # One word each: count log-weights, their ids (exact in fp64), and the shard's log-sum-exp.
    own = torch.full(
        (rows, 2 * count + 1), float("-inf"), dtype=torch.float64, device=vocab_parallel_logits.device
    )
    own[:, count:-1] = -1
    step = max(1, CHUNK_BYTES // (4 * shard))
    for start in range(0, rows if width else 0, step):
        logits = vocab_parallel_logits[start : start + step, :width].float()
        values, columns = logits.topk(min(count, width), dim=1)
        part = own[start : start + step]
        part[:, : values.size(1)] = values.double()
        part[:, count : count + values.size(1)] = (columns + rank * shard).double()
        part[:, -1] = logits.logsumexp(dim=1).double()
    if size > 1:
        gathered = own.new_empty((size, *own.shape))
        dist.all_gather_into_tensor(gathered.flatten(0, 1), own, group=tp_group)
    else:
        gathered = own.unsqueeze(0)
    values = gathered[:, :, :count].transpose(0, 1).reshape(rows, size * count)
    ids = gathered[:, :, count:-1].transpose(0, 1).reshape(rows, size * count)
    best = values.topk(count, dim=1)
    logprobs = best.values - gathered[:, :, -1].logsumexp(dim=0).unsqueeze(1)
    return ids.gather(1, best.indices).long(), logprobs.float()
