"""Log-prob gap of the two likeliest tokens on logits sharded over the vocabulary.

Legend: T = rows, vocab = padded vocabulary, tp = tensor-parallel size; rank r holds the token ids
[r * vocab/tp, (r + 1) * vocab/tp).
"""

import torch
import torch.distributed as dist
from torch import Tensor


@torch.no_grad()
def vocab_parallel_top_two_gap(vocab_parallel_logits: Tensor, *, vocab_size: int, tp_group=None) -> Tensor:
    """log p of the likeliest token minus log p of the second: the difference of the two largest logits.

    Args:
        vocab_parallel_logits: [T, vocab/tp], already divided by the temperature.
        vocab_size: true vocabulary, at least 2; columns with a global id >= vocab_size don't count.
        tp_group: tensor-parallel process group; None = unsharded.

    Returns:
        [T] fp32 in nats, at least 0 (0 = a tie), the same on every rank; no gradient.

    Raises:
        ValueError: vocab_size is less than 2.
    """
    if vocab_size < 2:
        raise ValueError(f"vocab_size must be at least 2, got {vocab_size}")
    rows, shard = vocab_parallel_logits.shape
    size = 1 if tp_group is None else dist.get_world_size(tp_group)
    rank = 0 if tp_group is None else dist.get_rank(tp_group)
    width = min(max(vocab_size - rank * shard, 0), shard)
    best = vocab_parallel_logits.new_full((rows, 2), float("-inf"), dtype=torch.float32)
    if width:
        own = vocab_parallel_logits[:, :width].topk(min(2, width), dim=1).values
        best[:, : own.size(1)] = own.float()
    if size > 1:
        gathered = best.new_empty((size, rows, 2))
        dist.all_gather_into_tensor(gathered.flatten(0, 1), best, group=tp_group)
        best = gathered.transpose(0, 1).reshape(rows, 2 * size)
    first, second = best.topk(2, dim=1).values.unbind(1)
    return first - second
