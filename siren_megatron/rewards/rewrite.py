"""The rewriting task: turn one string of letters into another in three moves. Standard library only.

A string is four different letters of a-h. Its moves are ``swap`` (the first two change places), ``cross``
(the middle two), ``rotate`` (the first goes to the end) and ``mirror`` (the order is reversed). The prompt is
``Turn a c b d into d b c a:``; a right response is three times a move and the string after it, the last of
them the target. An instance has 1 to 7 right responses of the 64 sequences of moves: where a move is named
there is a choice, and all other tokens follow. Each word is one token together with the space before it: a
prompt is 11 tokens, a response 15 and the end-of-sequence token.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import permutations, product

from siren_megatron.rewards.countdown import END_OF_TEXT

LETTERS = "abcdefgh"
LENGTH = 4
NUM_MOVES = 3

MOVES: dict[str, Callable[[str], str]] = {
    "swap": lambda s: s[1] + s[0] + s[2:],
    "cross": lambda s: s[0] + s[2] + s[1] + s[3],
    "rotate": lambda s: s[1:] + s[0],
    "mirror": lambda s: s[::-1],
}

VOCABULARY = (
    END_OF_TEXT,
    *("Turn", " into", ":"),
    *(f" {move}" for move in MOVES),
    *(f" {letter}" for letter in LETTERS),
)
"""The 16 tokens that the task uses, in the order of their ids."""

PROMPT_TOKENS = 3 + 2 * LENGTH
RESPONSE_WORDS = NUM_MOVES * (1 + LENGTH)

_STRING = " ".join([f"([{LETTERS[0]}-{LETTERS[-1]}])"] * LENGTH)
_PROMPT = re.compile(f"Turn {_STRING} into {_STRING}:")


@dataclass(frozen=True)
class Instance:
    """One problem: the string to begin with and the one to end on, each without blanks."""

    source: str
    target: str


def enumerate_instances() -> list[Instance]:
    """All instances with a solution and two different strings, in alphabetical order."""
    return [
        Instance("".join(source), target)
        for source in permutations(LETTERS, LENGTH)
        for target in sorted(_solutions("".join(source)))
        if target != "".join(source)
    ]


def solve(instance: Instance) -> tuple[str, ...]:
    """Every right response to ``instance`` in alphabetical order; empty when there is none."""
    return _solutions(instance.source).get(instance.target, ())


def render_prompt(instance: Instance) -> str:
    """The prompt, e.g. ``"Turn a c b d into d b c a:"``. It is the answer too."""
    return f"Turn {' '.join(instance.source)} into {' '.join(instance.target)}:"


def parse_instance(text: str) -> Instance:
    """Read an instance back from its prompt.

    Raises:
        ValueError: the text is not such a prompt, or its strings are not of the same different letters.
    """
    match = _PROMPT.fullmatch(text.strip())
    if match:
        letters = "".join(match.groups())
        instance = Instance(letters[:LENGTH], letters[LENGTH:])
        if len(set(instance.source)) == LENGTH and set(instance.source) == set(instance.target):
            return instance
    raise ValueError(
        f"not a rewriting instance: {text[:60]!r} (expected 'Turn a c b d into d b c a:', both strings of "
        f"the same {LENGTH} different letters {LETTERS[0]}-{LETTERS[-1]})"
    )


def verify(response: str, instance: Instance) -> bool:
    """Whether ``response`` reaches the target by three moves, each followed by the string that it makes.

    One end-of-sequence word at the end is allowed; any other word too many or too few makes it wrong.
    """
    # A right response has at most 50 characters: a split of megabytes would be wasted.
    words = response.strip().removesuffix(END_OF_TEXT).split() if len(response) <= 1000 else []
    if len(words) != RESPONSE_WORDS:
        return False
    string = instance.source
    for start in range(0, RESPONSE_WORDS, 1 + LENGTH):
        move, *letters = words[start : start + 1 + LENGTH]
        if move not in MOVES:
            return False
        string = MOVES[move](string)
        if list(string) != letters:
            return False
    return string == instance.target


@cache
def _solutions(source: str) -> dict[str, tuple[str, ...]]:
    """For one string: target -> every right response."""
    found: dict[str, list[str]] = {}
    for moves in product(sorted(MOVES), repeat=NUM_MOVES):
        string, words = source, []
        for move in moves:
            string = MOVES[move](string)
            words += [move, *string]
        found.setdefault(string, []).append(" ".join(words))
    return {target: tuple(sorted(responses)) for target, responses in found.items()}
