"""Rewards that misbehave as a model's text can make a real one; the reward processes import this."""

from __future__ import annotations

import ctypes
import os
import sys
import time


def act(response: str, answer: str) -> float:
    """Do what the response says, else give its number."""
    if response == "loop":
        while True:
            pass
    if response == "big power":  # one call into C that no signal handler interrupts in time
        return float(len(str(9 ** (9**9))))
    if response == "crash":
        ctypes.string_at(0)
    if response == "exit":
        os._exit(3)
    if response == "sys.exit":
        sys.exit(4)
    if response == "raise":
        raise KeyError("no such\nanswer")
    if response == "recurse":
        return act(response, answer)
    if response == "memory":
        return float(len(bytearray(4 * 2**30)))
    if response == "nan":
        return float("nan")
    if response == "text":
        return "high"
    if response == "print":
        print("a line on standard output", flush=True)
        return 1.0
    return float(response)


def imports_torch(response: str, answer: str) -> float:
    """1 when this process has loaded any of the trainer's libraries."""
    return float(any(name in sys.modules for name in ("torch", "megatron", "transformers", "vllm", "numpy")))


def length(response: str, answer: str) -> float:
    """The number of characters that arrive."""
    return float(len(response))


def wait_for_file(response: str, answer: str) -> float:
    """1 as soon as the file ``response`` exists."""
    while not os.path.exists(response):
        time.sleep(0.01)
    return 1.0


not_callable = 1.0
