"""What megatron-core imports of Transformer Engine's randomness and recomputation; nothing of it is used."""

from contextlib import contextmanager


class CudaRNGStatesTracker:
    """Never made: `--te-rng-tracker` is not an option here."""


@contextmanager
def activation_recompute_forward(activation_recompute=False, recompute_phase=False):
    """Keeps FP8's scales for the second forward pass; there are none."""
    yield
