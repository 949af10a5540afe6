"""Exact token statistics on logits sharded over the vocabulary: forward and backward."""

from .stats import TokenStats, vocab_parallel_token_stats

__all__ = ["TokenStats", "vocab_parallel_token_stats"]
