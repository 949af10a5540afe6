"""Values of expressions: exact fractions as long as they can be, floats or complex numbers otherwise.

No operation grows beyond a fixed size: larger powers are floats, and what is beyond the floats is an error.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Mapping
from fractions import Fraction

Value = Fraction | float | complex

MAX_BITS = 8192  # of an exact power; larger ones are floats
MAX_FACTORIAL = 400

FUNCTIONS = {
    "sin": cmath.sin,
    "cos": cmath.cos,
    "tan": cmath.tan,
    "cot": lambda x: 1 / cmath.tan(x),
    "sec": lambda x: 1 / cmath.cos(x),
    "csc": lambda x: 1 / cmath.sin(x),
    "arcsin": cmath.asin,
    "arccos": cmath.acos,
    "arctan": cmath.atan,
    "sinh": cmath.sinh,
    "cosh": cmath.cosh,
    "tanh": cmath.tanh,
    "exp": cmath.exp,
    "ln": cmath.log,
    "log": cmath.log,
    "lg": cmath.log10,
}


def evaluate(tree: tuple, point: Mapping[str, float]) -> Value:
    """The value of a tree of :mod:`siren_megatron.grading.expression` where its names have these values.

    Raises:
        ArithmeticError, ValueError, TypeError: it has none, or one beyond the floats.
    """
    kind = tree[0]
    if kind == "number":
        return tree[1]
    if kind == "name":
        return point[tree[1]]
    if kind in _CONSTANTS:
        return _CONSTANTS[kind]
    if kind == "call":
        return _real(FUNCTIONS[tree[1]](_inexact(evaluate(tree[2], point))))
    values = [evaluate(branch, point) for branch in tree[1:]]
    return _OPERATIONS[kind](*values)


def _inexact(value: Value) -> float | complex:
    return float(value) if isinstance(value, Fraction) else value


def _real(value: Value) -> Value:
    """A complex number without a noticeable imaginary part as a float."""
    if isinstance(value, complex) and abs(value.imag) <= 1e-12 * max(1.0, abs(value.real)):
        return value.real
    return value


def _both(left: Value, right: Value) -> tuple[Value, Value]:
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        return left, right
    return _inexact(left), _inexact(right)


def _add(left: Value, right: Value) -> Value:
    left, right = _both(left, right)
    return left + right


def _subtract(left: Value, right: Value) -> Value:
    left, right = _both(left, right)
    return left - right


def _multiply(left: Value, right: Value) -> Value:
    left, right = _both(left, right)
    return left * right


def _divide(left: Value, right: Value) -> Value:
    left, right = _both(left, right)
    return left / right


def _power(base: Value, exponent: Value) -> Value:
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        size = max(base.numerator.bit_length(), base.denominator.bit_length())
        if size * abs(exponent) <= MAX_BITS:
            return base ** int(exponent)
    if isinstance(base, Fraction) and isinstance(exponent, Fraction):
        root = _exact_root(base, exponent)
        if root is not None:
            return root
        if base < 0 and exponent.denominator % 2:
            # A real root of a negative number, as people mean it: the cube root of -2.
            magnitude = float(-base) ** float(exponent)
            return -magnitude if exponent.numerator % 2 else magnitude
    base, exponent = _inexact(base), _inexact(exponent)
    if isinstance(base, float) and isinstance(exponent, float) and base > 0:
        return base**exponent
    return _real(complex(base) ** exponent)


def _exact_root(base: Fraction, exponent: Fraction) -> Fraction | None:
    if not 1 < exponent.denominator <= 12 or base < 0 or abs(exponent.numerator) > 64:
        return None
    parts = []
    for part in (base.numerator, base.denominator):
        if part.bit_length() > 512:
            return None
        root = round(part ** (1 / exponent.denominator))
        if root**exponent.denominator != part:
            return None
        parts.append(root)
    return Fraction(*parts) ** exponent.numerator


def _sqrt(value: Value) -> Value:
    return _power(value, Fraction(1, 2))


def _factorial(value: Value) -> Value:
    if isinstance(value, Fraction) and value.denominator == 1 and 0 <= value <= MAX_FACTORIAL:
        return Fraction(math.factorial(int(value)))
    if isinstance(value, complex):
        raise ArithmeticError("the factorial of a complex number")
    return math.gamma(float(value) + 1)


def _binomial(upper: Value, lower: Value) -> Value:
    exact = all(isinstance(v, Fraction) and v.denominator == 1 and 0 <= v <= 1000 for v in (upper, lower))
    if exact:
        return Fraction(math.comb(int(upper), int(lower)))
    return _divide(_factorial(upper), _multiply(_factorial(lower), _factorial(_subtract(upper, lower))))


def _rounded(function):
    def apply(value: Value) -> Value:
        if isinstance(value, complex):
            raise ArithmeticError("rounding a complex number")
        return Fraction(function(value))

    return apply


_CONSTANTS = {"e": math.e, "i": 1j, "pi": math.pi}
_OPERATIONS = {
    "+": _add,
    "-": _subtract,
    "*": _multiply,
    "/": _divide,
    "fraction": _divide,
    "^": _power,
    "neg": lambda value: -value,
    "group": lambda value: value,
    "abs": abs,
    "sqrt": _sqrt,
    "!": _factorial,
    "binom": _binomial,
    "lfloor": _rounded(math.floor),
    "lceil": _rounded(math.ceil),
}
