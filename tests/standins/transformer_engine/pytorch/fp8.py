"""What megatron-core imports of FP8; nothing of it is used."""

from contextlib import nullcontext


class FP8GlobalStateManager:
    @staticmethod
    def is_fp8_enabled() -> bool:
        return False


def fp8_autocast(enabled=False, fp8_recipe=None, fp8_group=None):
    assert not enabled
    return nullcontext()
