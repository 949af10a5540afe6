"""The Countdown task: reach a target from three numbers in two arithmetic steps. Standard library only.

An instance is three numbers in 1-12 and a target in 1-60. Its prompt is ``Make 36 from 2 5 12:`` and a right
response is ``x op y = z`` twice: the first step takes two of the numbers, the second its result and the
number left over, and ends on the target. Every intermediate result lies in 0-99, so that each number is one
token; 3,341 instances have a solution. Each word is one token together with the space before it: a prompt is
7 tokens, a response 10 and the end-of-sequence token.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import combinations_with_replacement, permutations

MIN_NUMBER, MAX_NUMBER = 1, 12
MIN_TARGET, MAX_TARGET = 1, 60
MAX_RESULT = 99

OPERATORS = ("+", "-", "×")
EQUALS = "="
END_OF_TEXT = "<|endoftext|>"

VOCABULARY = (
    END_OF_TEXT,
    *("Make", " from", ":"),
    *(f" {word}" for word in (*OPERATORS, EQUALS)),
    *(f" {number}" for number in range(MAX_RESULT + 1)),
)
"""The 108 tokens that the task uses, in the order of their ids."""

PROMPT_TOKENS = 7
RESPONSE_WORDS = 10

_PROMPT = re.compile(r"Make (\d{1,2}) from (\d{1,2}) (\d{1,2}) (\d{1,2}):", re.ASCII)
_NUMBERS = {str(n): n for n in range(MAX_RESULT + 1)}


@dataclass(frozen=True)
class Instance:
    """One problem: three numbers (ascending) and the target that they must reach."""

    numbers: tuple[int, int, int]
    target: int


def enumerate_instances() -> list[Instance]:
    """All instances with at least one solution, ordered by numbers and then by target (3,341 of them)."""
    triples = combinations_with_replacement(range(MIN_NUMBER, MAX_NUMBER + 1), 3)
    return [Instance(numbers, target) for numbers in triples for target in sorted(_solutions(numbers))]


def solve(instance: Instance) -> tuple[str, ...]:
    """Every right response to ``instance`` in alphabetical order; empty when there is none."""
    return _solutions(instance.numbers).get(instance.target, ())


def render_prompt(instance: Instance) -> str:
    """The prompt, e.g. ``"Make 36 from 2 5 12:"``. It names the whole instance: it is the answer too."""
    return f"Make {instance.target} from {' '.join(map(str, instance.numbers))}:"


def parse_instance(text: str) -> Instance:
    """Read an instance back from its prompt.

    Raises:
        ValueError: the text is not such a prompt, or a number of it is out of range.
    """
    match = _PROMPT.fullmatch(text.strip())
    if match:
        target, *numbers = map(int, match.groups())
        if all(MIN_NUMBER <= n <= MAX_NUMBER for n in numbers) and MIN_TARGET <= target <= MAX_TARGET:
            return Instance(tuple(sorted(numbers)), target)
    raise ValueError(
        f"not a Countdown instance: {text[:60]!r} (expected 'Make TARGET from A B C:', "
        f"target {MIN_TARGET}-{MAX_TARGET}, numbers {MIN_NUMBER}-{MAX_NUMBER})"
    )


def verify(response: str, instance: Instance) -> bool:
    """Whether ``response`` reaches the target by two right steps that use each number exactly once.

    One end-of-sequence word at the end is allowed; any other word too many or too few makes it wrong.
    """
    # A right response has at most 40 characters: a split of megabytes would be wasted.
    words = response.strip().removesuffix(END_OF_TEXT).split() if len(response) <= 1000 else []
    if len(words) != RESPONSE_WORDS:
        return False
    available = list(instance.numbers)
    result = None
    for step in (words[:5], words[5:]):
        left, operator, right, equals, result_word = step
        if equals != EQUALS:
            return False
        x, y, result = _NUMBERS.get(left), _NUMBERS.get(right), _NUMBERS.get(result_word)
        if x is None or y is None or result is None or _apply(x, operator, y) != result:
            return False
        for operand in (x, y):
            if operand not in available:
                return False
            available.remove(operand)
        available.append(result)
    return available == [instance.target]


def _apply(x: int, operator: str, y: int) -> int | None:
    """The value of a step, or None for an unknown operator or a result outside 0-99."""
    if operator == "+":
        result = x + y
    elif operator == "-":
        result = x - y
    elif operator == "×":
        result = x * y
    else:
        return None
    return result if 0 <= result <= MAX_RESULT else None


def _steps(x: int, y: int) -> Iterator[tuple[str, int]]:
    for operator in OPERATORS:
        result = _apply(x, operator, y)
        if result is not None:
            yield f"{x} {operator} {y} {EQUALS} {result}", result


@cache
def _solutions(numbers: tuple[int, int, int]) -> dict[int, tuple[str, ...]]:
    """For one triple of numbers: target -> every right response."""
    found: dict[int, set[str]] = {}
    for a, b, c in set(permutations(numbers)):
        for first, intermediate in _steps(a, b):
            for x, y in ((intermediate, c), (c, intermediate)):
                for second, target in _steps(x, y):
                    if MIN_TARGET <= target <= MAX_TARGET:
                        found.setdefault(target, set()).add(f"{first} {second}")
    return {target: tuple(sorted(responses)) for target, responses in found.items()}
