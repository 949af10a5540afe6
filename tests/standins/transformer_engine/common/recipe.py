"""megatron-core derives a class from this one when it is imported."""


class DelayedScaling:
    """Never made: FP8 is refused."""
