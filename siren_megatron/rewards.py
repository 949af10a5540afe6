"""Rewards: (response, answer) -> float. Importing this module needs the standard library only.

Model text is data here: it is searched, compared and parsed as LaTeX by a grammar, never evaluated as code.
A reward may still hang, crash or eat memory on hostile text, so training calls it through
:class:`siren_megatron.reward_pool.RewardPool` (also importable from here), in processes that can be killed.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import re
import sys
from collections import deque
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import ModuleType

from siren_megatron import countdown
from siren_megatron.reward_pool import PendingReward, RewardPool, RewardResult

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
]

RewardFunction = Callable[[str, str], float]

MAX_ANSWER_CHARS = 1000
MAX_NESTING = 30
MAX_SEARCHED_CHARS = 4000

_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_ANSWER_PHRASE = re.compile(r"answer\s*(?:is|:|=)\s*:?\s*", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\.(?:\s|$)")
_NUMBER = re.compile(r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?|(?<![\w.])-?\.\d+")
_INLINE_MATH = re.compile(r"(?<!\\)\$([^$\n]{1,500})(?<!\\)\$|\\\(([^\n]{1,500}?)\\\)")
_INTEGER = re.compile(r"[+-]?\d+")
_THOUSANDS_COMMA = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def countdown_reward(response: str, answer: str) -> float:
    """1 when the response solves the Countdown instance whose prompt is ``answer``, else 0.

    Raises:
        ValueError: ``answer`` is not a Countdown instance.
    """
    return float(countdown.verify(response, countdown.parse_instance(answer)))


def exact_reward(response: str, answer: str) -> float:
    """1 when both texts are the same apart from white space at the ends, else 0."""
    return float(response.strip() == answer.strip())


def math_reward(response: str, answer: str) -> float:
    """1 when the response's final answer is mathematically equal to ``answer`` by math-verify, else 0.

    Args:
        response: its final answer is found by :func:`extract_final_answer`.
        answer: the gold answer, a number or LaTeX without or with dollar signs.
    """
    candidate = extract_final_answer(response)
    if candidate is None:
        return 0.0
    candidate, gold = _tidy(candidate), _tidy(answer)
    if not candidate or len(candidate) > MAX_ANSWER_CHARS or _nesting(candidate) > MAX_NESTING:
        return 0.0
    if candidate == gold:
        return 1.0
    if _INTEGER.fullmatch(candidate) and _INTEGER.fullmatch(gold):
        # As text: int() of thousands of digits is slow and refused.
        return float(_plain_integer(candidate) == _plain_integer(gold))
    return float(_equal(candidate, gold))


def extract_final_answer(response: str) -> str | None:
    """The final answer of a response, or None.

    The content of the last complete ``\\boxed{}``; else what follows the last ``####``; else what follows the
    last "answer is" or "answer:"; else the last number, or the inline formula that it stands in.
    """
    boxed = _last_boxed(response)
    if boxed is not None:
        return boxed
    _, mark, after = response.rpartition("####")
    if mark:
        return _first_line(after)
    phrase = _last_match(_ANSWER_PHRASE, response)
    if phrase is not None:
        sentence = _SENTENCE_END.split(_first_line(response[phrase.end() :]), maxsplit=1)[0]
        return _last_value(sentence) or sentence
    return _last_value(response)


def _last_value(text: str) -> str | None:
    """The last number of a text, or the inline formula around it."""
    text = text[-MAX_SEARCHED_CHARS:]
    number, formula = _last_match(_NUMBER, text), _last_match(_INLINE_MATH, text)
    if formula is not None and (number is None or number.end() <= formula.end()):
        return formula.group(1) or formula.group(2)
    return number.group() if number is not None else None


def _last_match(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return next(iter(deque(pattern.finditer(text), maxlen=1)), None)


def _last_boxed(text: str) -> str | None:
    """The content of the last ``\\boxed{...}`` whose braces close."""
    for start in reversed([match.end() for match in _BOXED.finditer(text)][-20:]):
        depth = 1
        for brace in re.finditer(r"\\.|[{}]", text[start : start + 20 * MAX_ANSWER_CHARS], re.DOTALL):
            depth += {"{": 1, "}": -1}.get(brace.group(), 0)
            if depth == 0:
                return text[start : start + brace.start()]
    return None


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0].strip()


def _tidy(text: str) -> str:
    """An answer without dollar signs, a full stop at the end and commas between thousands."""
    text = " ".join(text.replace("\\$", " ").replace("$", " ").split()).removesuffix(".")
    return _THOUSANDS_COMMA.sub("", text).strip()


def _nesting(text: str) -> int:
    depth = deepest = 0
    for char in text:
        depth += (char in "{([") - (char in "})]")
        deepest = max(deepest, depth)
    return deepest


def _plain_integer(text: str) -> str:
    digits = text.lstrip("+-").lstrip("0") or "0"
    return "-" + digits if text.startswith("-") and digits != "0" else digits


def _parse_latex(text: str) -> list:
    from math_verify import LatexExtractionConfig, parse

    # LaTeX only: for plain expressions math-verify goes through sympy's parse_expr, which evaluates code.
    return parse(f"${text}$", [LatexExtractionConfig()], parsing_timeout=None)


@lru_cache(maxsize=4096)
def _parse_gold(text: str) -> list:
    return _parse_latex(text)


@lru_cache(maxsize=16384)
def _equal(candidate: str, gold: str) -> bool:
    """Cached, as the responses of a group often agree."""
    from math_verify import verify

    parsed = _parse_latex(candidate)
    # The pool ends whatever takes too long; math-verify's own alarm would stop pure Python code only.
    return bool(parsed) and verify(_parse_gold(gold), parsed, timeout_seconds=None)


REWARDS: dict[str, RewardFunction] = {
    "countdown": countdown_reward,
    "exact": exact_reward,
    "math": math_reward,
}


def resolve_reward(name: str, *, flag: str | None = None) -> RewardFunction:
    """The reward of a name in REWARDS, or one's own: ``package.module:function`` or ``path.py:function``.

    Args:
        name: one of the three; a module or file is imported.
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
    if function is math_reward:
        # math-verify warns at each start that its time limit is off.
        logging.getLogger("math_verify").setLevel(logging.CRITICAL)
        for text in (r"\frac{1}{2}", r"2\sqrt{3}+x^{2}", r"(1,2]", r"x=-5", r"\{1,2\}", r"\text{even}"):
            math_reward(rf"\boxed{{{text}}}", r"\frac{2}{3}")
    return function
