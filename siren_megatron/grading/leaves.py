"""Whether two values are the same: exact numbers, units, percentages, rounding, points; math-verify last."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from functools import lru_cache

from siren_megatron.grading.arithmetic import Value
from siren_megatron.grading.expression import Expression, NotArithmetic
from siren_megatron.grading.leaf import Leaf
from siren_megatron.grading.time_limit import OutOfTime, cpu_time_limit

TOLERANCE = 1e-9
"""Relative, of floats that stand for the same number."""

MATH_VERIFY_SECONDS = 1.5
"""Processor time of one call of math-verify; nearly all take a few milliseconds."""

# Towers of powers and huge exponents, which nothing but an exact copy would equal.
_EXPLOSIVE = re.compile(r"\^\s*\{?\s*\d+\s*\^|\^\s*\{?\s*\d{4,}|\d{4,}\s*!")
_DECIMAL = re.compile(r"[+-]?(\d*)\.(\d+)(?:[eE]([+-]?\d+))?|[+-]?(\d+)[eE]([+-]?\d+)")
# Values of the first variable: irregular, so that two different answers hardly agree at all of them.
POINTS = (0.7316, 1.3847, 2.2361, -0.8613)


def is_constant(leaf: Leaf) -> bool:
    """Whether it is a number."""
    return leaf.expression is not None and leaf.expression.is_constant


def same_leaves(gold: Leaf, other: Leaf, strict: bool) -> bool | None:
    """The verdict on two values, or None where only math-verify may know."""
    if (
        gold.text.replace(" ", "") == other.text.replace(" ", "")
        and not (gold.unit and other.unit)
        and gold.percent == other.percent
    ):
        return True
    infinite = [
        leaf.text.replace(" ", "").removeprefix("+") in (r"\infty", r"-\infty") for leaf in (gold, other)
    ]
    if any(infinite):
        return all(infinite) and gold.text.replace(" ", "").lstrip("+") == other.text.replace(" ", "").lstrip(
            "+"
        )
    if gold.expression is None or other.expression is None:
        return None
    if not (is_constant(gold) and is_constant(other)):
        return _same_functions(gold.expression, other.expression)
    try:
        ours = gold.expression.at({})
    except NotArithmetic:
        return None
    try:
        theirs = other.expression.at({})
    except NotArithmetic:
        return False  # a division by zero, or beyond any number that the gold answer is

    def equal(factor_ours: float = 1.0, factor_theirs: float = 1.0) -> bool:
        return _same_numbers(gold, _scaled(ours, factor_ours), other, _scaled(theirs, factor_theirs), strict)

    if gold.percent or other.percent:
        return _same_percent(gold, other, ours, theirs, equal)
    if gold.unit is not None and other.unit is not None and gold.unit.known and other.unit.known:
        if gold.unit.dimension != other.unit.dimension:
            return False
        if gold.unit.size == other.unit.size:
            return equal()
        ratio = other.unit.size / gold.unit.size
        return _nearly(complex(ours), complex(theirs) * ratio, 1e-6)
    if equal():
        return True
    for leaf, factors in ((gold, (0, 1)), (other, (1, 0))):
        # 45 degrees is pi/4, where the other side speaks of pi.
        rest = other if leaf is gold else gold
        if leaf.unit is not None and leaf.unit.is_angle and leaf.unit.size != 1 and r"\pi" in rest.text:
            return equal(*(leaf.unit.size if position == 0 else 1.0 for position in factors))
    return False


def _scaled(value: Value, factor: float) -> Value:
    return (
        value
        if factor == 1.0
        else (complex(value) * factor if isinstance(value, complex) else float(value) * factor)
    )


def _same_percent(gold: Leaf, other: Leaf, ours: Value, theirs: Value, equal) -> bool:
    if gold.percent and other.percent:
        return equal()
    if gold.percent:
        return equal() or _nearly(complex(ours) / 100, complex(theirs), TOLERANCE)
    if _nearly(complex(ours), complex(theirs) / 100, TOLERANCE):
        return True
    return abs(ours) > 1 and equal()


def _nearly(first: complex, second: complex, tolerance: float) -> bool:
    return abs(first - second) <= tolerance * max(abs(first), abs(second))


def _same_numbers(gold: Leaf, ours: Value, other: Leaf, theirs: Value, strict: bool) -> bool:
    if isinstance(ours, Fraction) and isinstance(theirs, Fraction):
        if ours == theirs:
            return True
    else:
        try:
            if _nearly(complex(ours), complex(theirs), TOLERANCE):
                return True
        except OverflowError:
            return False
    if strict or isinstance(ours, complex) or isinstance(theirs, complex):
        return False
    our_decimal, their_decimal = _precision(gold.text), _precision(other.text)
    try:
        distance = abs(float(ours) - float(theirs))
    except OverflowError:
        return False
    if our_decimal is not None:
        digits, step = our_decimal
        their_digits = math.inf if not _terminates(theirs) else their_decimal[0] if their_decimal else 0
        enough = digits + 1 if digits >= 3 else digits + 2
        # Half a unit of two digits can be 5%: within one percent then.
        near = digits >= 3 or distance <= 0.01 * abs(float(theirs)) * (1 + 1e-9)
        return digits >= 2 and near and their_digits >= enough and distance <= 0.5 * step * (1 + 1e-9)
    if their_decimal is not None and not _terminates(ours):
        digits, step = their_decimal
        return digits >= 6 and distance <= 0.5 * step * (1 + 1e-9)
    return False


def _terminates(value: Value) -> bool:
    """Whether a number has an end as a decimal."""
    if not isinstance(value, Fraction):
        return False
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1


def _precision(text: str) -> tuple[int, float] | None:
    """(significant digits, size of the last one) of a decimal; None for everything else."""
    match = _DECIMAL.fullmatch(text.strip())
    if match is None:
        return None
    whole, places, exponent, bare, bare_exponent = match.groups()
    if bare is not None:
        return len(bare.lstrip("0")), 10.0 ** min(300, int(bare_exponent))
    digits = (whole + places).lstrip("0")
    return len(digits), 10.0 ** max(-300, min(300, int(exponent or 0) - len(places)))


def point_at(names: tuple[str, ...], shift: float) -> dict[str, float]:
    """Values of the variables, all different, near ``shift``."""
    return {name: shift * (1 + 0.1873 * index) + 0.0417 * index * index for index, name in enumerate(names)}


def _same_functions(gold: Expression, other: Expression) -> bool | None:
    """Compare at points. The names have to be the same ones: a letter that cancels is still a letter."""
    names = tuple(sorted({*gold.variables, *other.variables}))
    if any("(" in name for name in {*gold.variables} ^ {*other.variables}):
        return None
    compared = 0
    for shift in POINTS:
        point = point_at(names, shift)
        try:
            ours, theirs = complex(gold.at(point)), complex(other.at(point))
        except (NotArithmetic, OverflowError):
            continue
        if shift < 0 and (ours.imag or theirs.imag):
            continue  # sqrt and log of negative numbers: branches decide, not the answers
        compared += 1
        if not _nearly(ours, theirs, 1e-8) and abs(ours - theirs) > 1e-11:
            return False
    return True if compared >= 2 else None


# -------------------------------------------------------------------- math-verify


def _parse_latex(text: str) -> list:
    from math_verify import LatexExtractionConfig, parse

    # LaTeX only: for plain expressions math-verify goes through sympy's parse_expr, which evaluates code.
    return parse(f"${text}$", [LatexExtractionConfig()], parsing_timeout=None)


@lru_cache(maxsize=4096)
def _parse_gold(text: str) -> list:
    return _parse_latex(text)


@lru_cache(maxsize=16384)
def same_by_math_verify(gold: str, candidate: str) -> bool:
    """math-verify's verdict on two texts; False when it takes longer than MATH_VERIFY_SECONDS.

    The pool ends what this limit cannot stop: a single operation of C code.
    """
    from math_verify import verify

    if not gold or not candidate or _EXPLOSIVE.search(candidate) or candidate.count("!") > 3:
        return False
    try:
        with cpu_time_limit(MATH_VERIFY_SECONDS):
            parsed = _parse_latex(candidate)
            return bool(parsed) and bool(verify(_parse_gold(gold), parsed, timeout_seconds=None))
    except OutOfTime:
        return False
