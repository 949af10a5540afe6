"""megatron-core asks of every tensor whether it is of this class."""


class QuantizedTensor:
    """Never made."""
