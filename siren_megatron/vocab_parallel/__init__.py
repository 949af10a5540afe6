"""Exact token statistics on logits sharded over the vocabulary: forward and backward."""

from .linear import linear_token_stats
from .nucleus import TopPCounters, engine_name, native_available
from .stats import TokenStats, top_p_mask, vocab_parallel_token_stats

__all__ = [
    "TokenStats",
    "TopPCounters",
    "engine_name",
    "linear_token_stats",
    "native_available",
    "top_p_mask",
    "vocab_parallel_token_stats",
]
