"""megatron-core names these classes in annotations."""


class FusibleOperation:
    """Never made."""


class Sequential:
    """Never made."""
