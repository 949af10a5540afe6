"""Rewards: (response, answer) -> float. Importing this module needs the standard library only.

Model text is data here: it is searched, compared and parsed as LaTeX by a grammar, never evaluated as code.
A reward may still hang, crash or eat memory on hostile text, so training calls it through
:class:`siren_megatron.rewards.pool.RewardPool` (also importable from here), in processes that can be killed.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from siren_megatron.grading import extract_final_answer, grade, same_answer
from siren_megatron.grading.leaves import same_by_math_verify
from siren_megatron.rewards import countdown, rewrite
from siren_megatron.rewards.pool import PendingReward, RewardPool, RewardResult

__all__ = [
    "REWARDS",
    "PendingReward",
    "RewardFunction",
    "RewardPool",
    "RewardResult",
    "countdown_reward",
    "exact_reward",
    "extract_final_answer",
    "math_reward",
    "resolve_reward",
    "rewrite_reward",
]

RewardFunction = Callable[[str, str], float]


def countdown_reward(response: str, answer: str) -> float:
    """1 when the response solves the Countdown instance whose prompt is ``answer``, else 0.

    Raises:
        ValueError: ``answer`` is not a Countdown instance.
    """
    return float(countdown.verify(response, countdown.parse_instance(answer)))


def rewrite_reward(response: str, answer: str) -> float:
    """1 when the response solves the rewriting instance whose prompt is ``answer``, else 0.

    Raises:
        ValueError: ``answer`` is not a rewriting instance.
    """
    return float(rewrite.verify(response, rewrite.parse_instance(answer)))


def exact_reward(response: str, answer: str) -> float:
    """1 when both texts are the same apart from white space at the ends, else 0."""
    return float(response.strip() == answer.strip())


def math_reward(response: str, answer: str) -> float:
    """1 when the response's final answer is the ``answer``, by :mod:`siren_megatron.grading`; else 0.

    Args:
        response: its final answer is found by :func:`siren_megatron.grading.extract_final_answer`.
        answer: the gold answer: a number, LaTeX with or without dollar signs, a choice's letter, words.
    """
    return grade(response, answer)


REWARDS: dict[str, RewardFunction] = {
    "countdown": countdown_reward,
    "exact": exact_reward,
    "math": math_reward,
    "rewrite": rewrite_reward,
}


def resolve_reward(name: str, *, flag: str | None = None) -> RewardFunction:
    """The reward of a name in REWARDS, or one's own: ``package.module:function`` or ``path.py:function``.

    Args:
        name: a key of REWARDS; a module or file is imported.
        flag: the option that named it, for the messages; None takes ``--reward-function`` for a file and
            ``--reward`` for the others.

    Raises:
        ValueError: no such name, or the module, file or function cannot be imported.
    """
    if name in REWARDS:
        return REWARDS[name]
    module_name, colon, function_name = name.rpartition(":")
    is_file = module_name.endswith(".py")
    flag = flag or ("--reward-function" if is_file else "--reward")
    if not colon:
        raise ValueError(f"{flag} {name}: neither one of {', '.join(REWARDS)} nor package.module:function")
    try:
        module = _import_file(Path(module_name)) if is_file else importlib.import_module(module_name)
        function = getattr(module, function_name)
    except (ImportError, AttributeError, OSError) as error:
        raise ValueError(f"{flag} {name}: {error}") from error
    except Exception as error:  # the user's own code runs here: whatever it raises is told in one line
        raise ValueError(
            f"{flag} {name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        ) from error
    if not callable(function):
        raise ValueError(f"{flag} {name}: not a function")
    return function


def _import_file(path: Path) -> ModuleType:
    """Import a file under a name that no package has; what lies beside it can be imported by it."""
    path = path.resolve()
    name = f"_siren_reward_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a module up there
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # last: a file beside it never hides a library
    spec.loader.exec_module(module)
    return module


def prepare_reward(name: str) -> RewardFunction:
    """As :func:`resolve_reward`; what the first calls would have to load or build is loaded and built."""
    function = resolve_reward(name)
    if function in (math_reward, same_answer):
        # math-verify warns at each start that its time limit is off.
        logging.getLogger("math_verify").setLevel(logging.CRITICAL)
        for text in (r"\frac{1}{2}", r"2\sqrt{3}+x^{2}", r"(1,2]", r"x=-5", r"\{1,2\}", r"\text{even}"):
            same_by_math_verify(r"\frac{2}{3}", text)
    return function
