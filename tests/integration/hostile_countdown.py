"""The countdown reward, but some responses make it raise, hang, crash or eat memory."""

from __future__ import annotations

import hashlib
import os

from siren_megatron.rewards.functions import countdown_reward


def grade(response: str, answer: str) -> float:
    kind = hashlib.sha256(response.encode()).digest()[0] % 24
    if kind == 0:
        raise KeyError("no such\nanswer")
    if kind == 1:
        while True:
            pass
    if kind == 2:
        os._exit(3)
    if kind == 3:
        hoard = []
        while True:
            hoard.append(bytearray(64 * 2**20))
    return countdown_reward(response, answer)
