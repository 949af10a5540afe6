"""How different the answers to a problem are: distinct answers, distinct n-grams. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Sequence

NGRAM = 4
_WORD = re.compile(r"\\[A-Za-z]+|\w+|[^\w\s]")


def distinct_ngrams(responses: Sequence[str], n: int = NGRAM) -> float | None:
    """Different n-grams over all n-grams of a problem's responses taken together, in (0, 1].

    1: no n-gram comes twice; 1/r: r copies of one response without repetitions in it. Source: "distinct-n" of
    Li et al. 2016 (arXiv 1510.03055), over the responses of one prompt.

    Args:
        responses: texts; words, numbers, LaTeX commands and marks are the units.
        n: length of the n-grams; a response shorter than that counts as one n-gram.

    Returns:
        None where no response has any text.
    """
    seen: set[tuple[str, ...]] = set()
    total = 0
    for response in responses:
        words = _WORD.findall(response)
        if not words:
            continue
        grams = [tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))]
        seen.update(grams)
        total += len(grams)
    return len(seen) / total if total else None
