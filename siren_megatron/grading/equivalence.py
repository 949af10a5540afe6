"""Whether two answers are the same: spelling, exact numbers, structure, values at points, then math-verify.

The rules, where people could differ:

- Numbers are equal exactly. A decimal gold answer of at least three significant digits also takes a more
  precise value that rounds to it (2.68 takes 2.677), one of two digits an unrounded value within one percent
  that rounds to it (0.33 takes 1/3, 3.5 does not take 2*sqrt(3)); the reverse does not
  hold: 1/3 does not take 0.33, but a decimal of six digits or more that rounds right.
- A unit that only one side names is passed over; units that both name must agree, after conversion.
- 50% is 50 or 0.5; a plain gold above 1 takes the same number with a percent sign.
- A list is in any order, and may be written as a set; ``(1,2)`` is ordered and no set; ``[0,1)`` is not
  ``[0,1]``.
- ``x = 5`` is 5; an equation in several variables is equal to its multiples and rearrangements.
"""

from __future__ import annotations

import re
from functools import lru_cache

from siren_megatron.grading import special
from siren_megatron.grading.expression import NotArithmetic
from siren_megatron.grading.forms import (
    Bracket,
    Collection,
    Form,
    Interval,
    Leaf,
    Matrix,
    Region,
    Relation,
    Words,
    as_region,
    parse_form,
)
from siren_megatron.grading.leaves import POINTS, is_constant, point_at, same_by_math_verify, same_leaves
from siren_megatron.grading.spelling import normalise

MAX_ANSWER_CHARS = 1000
MAX_NESTING = 30
_IDENTIFIER = re.compile(
    r"\\?[A-Za-z]+(?:_(?:\{[^{}]*\}|\w))?(?:\s?\([^()]{1,20}\))?(?:'|\^\{?\\prime\}?)*"
    r"|\\angle [A-Z ]+|\|[A-Z]+\|"
)
_INTEGER = re.compile(r"[+-]?\d+")


def equivalent(candidate: str, gold: str, *, strict: bool = False) -> bool:
    """Whether a candidate answer is the gold one.

    Args:
        candidate: an answer without the text around it; LaTeX, with or without dollar signs, or plain.
        gold: the right answer.
        strict: no rounding: for the grouping of answers of which none is the right one.
    """
    if not candidate.strip() or max(len(candidate), len(gold)) > MAX_ANSWER_CHARS:
        return bool(candidate.strip()) and candidate.strip() == gold.strip()
    if _nesting(candidate) > MAX_NESTING:
        return False
    return _equivalent(candidate, gold, strict)


@lru_cache(maxsize=65536)
def _equivalent(candidate: str, gold: str, strict: bool) -> bool:
    """Cached, as the responses of a group often agree."""
    verdict = special.compare(candidate, gold)
    if verdict is not None:
        return verdict
    candidate, gold = normalise(candidate), normalise(gold)
    if not candidate:
        return False
    if candidate.replace(" ", "") == gold.replace(" ", ""):
        return True
    if any(re.search(r"\\log_(?:\{10\}|10)", text) for text in (candidate, gold)):
        # Beside a decimal logarithm a plain one is decimal too.
        candidate, gold = (re.sub(r"\\log\s*_(?:\{10\}|10)", r"\\log", text) for text in (candidate, gold))
    if _INTEGER.fullmatch(candidate) and _INTEGER.fullmatch(gold):
        # As text: int() of thousands of digits is slow and refused.
        return _plain_integer(candidate) == _plain_integer(gold)
    ours, theirs = parse_form(gold), parse_form(candidate)
    if _names_unit(ours) or (isinstance(ours, Leaf) and is_constant(ours)):
        theirs = parse_form(candidate, loose_units=True)
    if _names_unit(theirs):
        ours = parse_form(gold, loose_units=True)
    verdict = _same(ours, theirs, strict)
    if verdict is None:
        verdict = same_by_math_verify(gold, candidate)
    return verdict


def _names_unit(form: Form) -> bool:
    return isinstance(form, Leaf) and form.unit is not None and form.unit.known


def _nesting(text: str) -> int:
    depth = deepest = 0
    for char in text:
        depth += (char in "{([") - (char in "})]")
        deepest = max(deepest, depth)
    return deepest


def _plain_integer(text: str) -> str:
    digits = text.lstrip("+-").lstrip("0") or "0"
    return "-" + digits if text.startswith("-") and digits != "0" else digits


def _same(gold: Form, other: Form, strict: bool) -> bool | None:
    """The verdict, or None where only math-verify may know."""
    if isinstance(gold, Relation) or isinstance(other, Relation):
        return _same_relations(gold, other, strict)
    regions = (as_region(gold), as_region(other))
    by_name = all(regions) and not all(isinstance(form, Bracket) for form in (gold, other))
    if isinstance(gold, Region) or isinstance(other, Region) or by_name:
        ours, theirs = regions
        if ours is None or theirs is None:
            return False
        return _same_regions(ours, theirs, strict)
    if isinstance(gold, Matrix) or isinstance(other, Matrix):
        return _same_matrices(gold, other, strict)
    if isinstance(gold, Bracket) or isinstance(other, Bracket):
        return _same_brackets(gold, other, strict)
    if isinstance(gold, Collection) or isinstance(other, Collection):
        return _same_collections(gold, other, strict)
    if isinstance(gold, Words) or isinstance(other, Words):
        return _same_words(gold, other)
    return same_leaves(gold, other, strict)


# -------------------------------------------------------------------- several values


def _same_collections(gold: Form, other: Form, strict: bool) -> bool | None:
    ours = gold.items if isinstance(gold, Collection) else (gold,)
    theirs = other.items if isinstance(other, Collection) else (other,)
    ours, theirs = _distinct(ours), _distinct(theirs)
    if len(ours) != len(theirs):
        return False
    left = list(theirs)
    for item in ours:
        for index, candidate in enumerate(left):
            if _decided(item, candidate, strict):
                del left[index]
                break
        else:
            return False
    return True


def _distinct(items: tuple[Form, ...]) -> list[Form]:
    """Without exact repetitions: {1,2,1} is {1,2}."""
    kept: list[Form] = []
    for item in items:
        if item not in kept:
            kept.append(item)
    return kept


def _decided(gold: Form, other: Form, strict: bool) -> bool:
    """As _same, with math-verify for leaves that the grammar does not know."""
    verdict = _same(gold, other, strict)
    if verdict is None:
        verdict = same_by_math_verify(_text(gold), _text(other))
    return verdict


def _text(form: Form) -> str:
    if isinstance(form, Leaf | Words):
        return form.text
    if isinstance(form, Relation):
        return f" {form.operator} ".join(form.parts)
    return ""


def _same_brackets(gold: Form, other: Form, strict: bool) -> bool | None:
    if not (isinstance(gold, Bracket) and isinstance(other, Bracket)):
        bracket, rest = (gold, other) if isinstance(gold, Bracket) else (other, gold)
        if not isinstance(rest, Collection) or rest.braces or len(rest.items) != len(bracket.items):
            if isinstance(rest, Collection) and len(rest.items) == 1:
                return _decided(bracket, rest.items[0], strict)
            return False
        # x=1, y=2, or a list without brackets: in the same order.
        ours = [_right_side(item) for item in (bracket.items if bracket is gold else rest.items)]
        theirs = [_right_side(item) for item in (rest.items if bracket is gold else bracket.items)]
        return all(_decided(a, b, strict) for a, b in zip(ours, theirs, strict=True))
    if len(gold.items) != len(other.items):
        return False
    same_marks = (gold.opening, gold.closing) == (other.opening, other.closing)
    vectors = len(gold.items) > 2 and {gold.opening + gold.closing, other.opening + other.closing} <= {
        "()",
        "[]",
    }
    if not (same_marks or vectors):
        ours, theirs = as_region(gold), as_region(other)
        return bool(ours and theirs) and _same_regions(ours, theirs, strict)
    return all(_decided(a, b, strict) for a, b in zip(gold.items, other.items, strict=True))


def _right_side(form: Form) -> Form:
    if isinstance(form, Relation) and form.operator == "=" and len(form.parts) == 2:
        return parse_form(form.parts[1])
    return form


def _same_matrices(gold: Form, other: Form, strict: bool) -> bool | None:
    if isinstance(gold, Bracket) or isinstance(other, Bracket):
        matrix, bracket = (gold, other) if isinstance(gold, Matrix) else (other, gold)
        # A column or row as people write vectors in plain text.
        cells = [cell for row in matrix.rows for cell in row]
        if 1 not in (len(matrix.rows), max(map(len, matrix.rows))) or len(cells) != len(bracket.items):
            return False
        return all(_decided(a, b, strict) for a, b in zip(cells, bracket.items, strict=True))
    if not (isinstance(gold, Matrix) and isinstance(other, Matrix)):
        return False
    if [len(row) for row in gold.rows] != [len(row) for row in other.rows]:
        return False
    return all(
        _decided(a, b, strict)
        for ours, theirs in zip(gold.rows, other.rows, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    )


def _same_regions(gold: Region, other: Region, strict: bool) -> bool:
    left = list(other.intervals)
    if len(left) != len(gold.intervals):
        return False
    for interval in gold.intervals:
        for index, candidate in enumerate(left):
            if _same_intervals(interval, candidate, strict):
                del left[index]
                break
        else:
            return False
    return True


def _same_intervals(gold: Interval, other: Interval, strict: bool) -> bool:
    if (gold.low_closed, gold.high_closed) != (other.low_closed, other.high_closed):
        return False
    for ours, theirs in ((gold.low, other.low), (gold.high, other.high)):
        if (ours is None) != (theirs is None):
            return False
        if ours is not None and not _decided(ours, theirs, strict):
            return False
    return True


# -------------------------------------------------------------------- relations


def _same_relations(gold: Form, other: Form, strict: bool) -> bool | None:
    if isinstance(gold, Relation) and isinstance(other, Relation):
        if _right(gold) is None or _right(other) is None or _left_name(gold) != _left_name(other):
            verdict = _same_equations(gold, other)
            if verdict is not None:
                return verdict
        if _left_name(gold) is not None and _left_name(gold) != _left_name(other) and _left_name(other):
            return False
        if gold.operator != other.operator and "approx" not in (gold.operator, other.operator):
            return None if "?" in (gold.operator, other.operator) else False
        values = _values(gold)
        return any(_any_value(value, other, strict) for value in values) if values else None
    relation, form = (gold, other) if isinstance(gold, Relation) else (other, gold)
    if isinstance(form, Collection | Bracket) and not (isinstance(form, Collection) and len(form.items) == 1):
        right = _right(relation)
        if right is None or isinstance(right, Leaf):
            return False
        return _same(right, form, strict) if relation is gold else _same(form, right, strict)
    if relation is other:
        return _any_value(gold, relation, strict)
    values = _values(relation)
    return any(_decided(value, other, strict) for value in values) if values else None


def _left_name(relation: Relation) -> str | None:
    """What is defined; a function of x as f(x) is y."""
    left = re.sub(r"^[fgh]\(x\)$", "y", relation.parts[0].replace(" ", ""))
    return left if relation.operator in ("=", "approx") and _IDENTIFIER.fullmatch(relation.parts[0]) else None


def _right(relation: Relation) -> Form | None:
    """The value of ``name = value``; None where the left side is more than a name."""
    if relation.operator == "=" and len(relation.parts) == 2 and _left_name(relation) is not None:
        return parse_form(relation.parts[1])
    return None


def _values(relation: Relation) -> list[Form]:
    """What a relation says that something is: the end of a chain, and what it is computed from.

    None of them for an equation of two expressions.
    """
    if relation.operator == "approx":
        return [parse_form(part) for part in relation.parts[1 if _left_name(relation) else 0 :]]
    if relation.operator != "=":
        return []
    forms = [parse_form(part) for part in relation.parts]
    if _left_name(relation) is not None:
        forms = forms[1:]
    elif not (isinstance(forms[0], Leaf) and is_constant(forms[0])) and len(forms) == 2:
        return []
    else:
        forms = forms if isinstance(forms[0], Leaf) and is_constant(forms[0]) else forms[1:]
    last = forms[-1]
    return [last, *(form for form in forms[:-1] if _close(form, last))]


def _any_value(gold: Form, relation: Relation, strict: bool) -> bool | None:
    values = _values(relation)
    if not values:
        return None
    return any(_decided(gold, value, strict) for value in values)


def _close(first: Form, last: Form) -> bool:
    """Within one percent: 1/3 = 0.33 is one answer, 3 = 4 is none."""
    if not (isinstance(first, Leaf) and isinstance(last, Leaf)):
        return False
    if not (is_constant(first) and is_constant(last)):
        return True
    try:
        return abs(first.expression.at({}) - last.expression.at({})) <= 0.01 * abs(last.expression.at({}))
    except (NotArithmetic, ArithmeticError):
        return False


def _same_equations(gold: Relation, other: Relation) -> bool | None:
    """Equations are equal when left minus right of one is a constant multiple of the other's."""
    if gold.operator != "=" or other.operator != "=" or len(gold.parts) != 2 or len(other.parts) != 2:
        return None
    if [part.replace(" ", "") for part in gold.parts] == [
        part.replace(" ", "") for part in other.parts[::-1]
    ]:
        return True
    sides = [parse_form(part) for relation in (gold, other) for part in relation.parts]
    if not all(isinstance(side, Leaf) and side.expression is not None for side in sides):
        return None
    names = [set(a.expression.variables) | set(b.expression.variables) for a, b in (sides[:2], sides[2:])]
    if names[0] != names[1]:
        return False
    ratios = []
    for shift in POINTS[:3]:
        point = point_at(tuple(sorted(names[0])), shift)
        try:
            values = [side.expression.at(point) for side in sides]
            first, second = complex(values[0]) - complex(values[1]), complex(values[2]) - complex(values[3])
            ratios.append(second / first)
        except (NotArithmetic, ArithmeticError, OverflowError):
            return None
    return all(abs(ratio - ratios[0]) <= 1e-7 * abs(ratios[0]) for ratio in ratios) and abs(ratios[0]) > 1e-9


# -------------------------------------------------------------------- words and values


def _same_words(gold: Form, other: Form) -> bool | None:
    if isinstance(gold, Words) and isinstance(other, Words):
        return special.same_words(gold.text, other.text)
    if isinstance(gold, Leaf) and isinstance(other, Leaf):
        return None
    return False
