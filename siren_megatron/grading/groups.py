"""Keys under which equal answers meet: what two keys leave open is for the grader to decide."""

from __future__ import annotations

from collections.abc import Collection
from itertools import combinations

from siren_megatron.grading.expression import NotArithmetic
from siren_megatron.grading.forms import parse_form
from siren_megatron.grading.leaf import Leaf
from siren_megatron.grading.spelling import normalise

MAX_COMPARED = 64
"""Distinct spellings of one problem's wrong answers that are compared pair by pair; others stay apart."""

_EXACT = "="


def grouping_key(answer: str) -> str:
    """``=3/4`` for a plain exact number, else the normalised spelling. Equal keys are equal answers."""
    text = normalise(answer)
    form = parse_form(text) if len(text) <= 200 else None
    if isinstance(form, Leaf) and form.unit is None and not form.percent and form.expression is not None:
        if form.expression.is_constant:
            try:
                value = form.expression.at({})
            except NotArithmetic:
                value = None
            if hasattr(value, "denominator") and len(text) <= 60:
                return f"{_EXACT}{value}"
    return text.replace(" ", "")


def undecided_pairs(keys: Collection[str]) -> list[tuple[str, str]]:
    """Pairs of different keys that may still be equal: all but those of two exact numbers."""
    open_keys = list(keys)[:MAX_COMPARED]
    return [(a, b) for a, b in combinations(open_keys, 2) if not (_is_exact(a) and _is_exact(b))]


def _is_exact(key: str) -> bool:
    return key.removeprefix("wrong ").startswith(_EXACT)
