"""Arithmetic in LaTeX or plain text: a small grammar, and values at given points. Standard library only.

The grammar knows what final answers are made of: numbers, letters with subscripts, sums, products (implicit
ones too), fractions, powers, roots, factorials, binomials, floors, absolute values and the usual functions.
Whatever else it meets it refuses; nothing is ever evaluated as code. Values are exact fractions as long as
they can be, floats or complex numbers otherwise, and no operation grows beyond a fixed size, so that no text
takes long.
"""

from __future__ import annotations

import cmath
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

Value = Fraction | float | complex

MAX_CHARS = 600
MAX_DEPTH = 40
MAX_BITS = 8192  # of an exact power; larger ones are floats
MAX_FACTORIAL = 400

_TOKEN = re.compile(
    r"\s+|(?P<number>\d+(?:\.\d*)?(?:[eE][+-]?\d+(?![A-Za-z\d]))?|\.\d+(?:[eE][+-]?\d+)?)"
    r"|(?P<command>\\[A-Za-z]+)|(?P<symbol>\\[^A-Za-z]|[A-Za-z]|\*\*|.)",
    re.DOTALL,
)
_GREEK = set(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho varrho "
    "sigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Upsilon Phi Psi Omega "
    "hbar ell odot".split()
)
_FUNCTIONS = {
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
_WORDS = {"sqrt", "pi", *_FUNCTIONS, "asin", "acos", "atan"}
_CLOSING = {"(": ")", "[": "]", "{": "}", r"\{": r"\}"}


class NotArithmetic(ValueError):
    """The text is none of this grammar, or has no value at the point."""


@dataclass(frozen=True)
class Expression:
    """A parsed text.

    Args:
        tree: nested tuples, an operator's name first.
        variables: the free names in it, sorted.
    """

    tree: tuple
    variables: tuple[str, ...]

    def at(self, point: Mapping[str, float]) -> Value:
        """The value where the variables have these values.

        Raises:
            NotArithmetic: it has none (a division by zero), or one beyond the floats.
        """
        try:
            return _evaluate(self.tree, point)
        except (ArithmeticError, ValueError, TypeError, RecursionError) as error:
            raise NotArithmetic(str(error)) from error

    @property
    def is_constant(self) -> bool:
        """Whether there is no variable in it."""
        return not self.variables


@lru_cache(maxsize=16384)
def parse_expression(text: str) -> Expression:
    """Parse a text that :mod:`siren_megatron.grading.spelling` has normalised.

    Raises:
        NotArithmetic: it is none of the grammar.
    """
    if len(text) > MAX_CHARS:
        raise NotArithmetic("too long")
    parser = _Parser(text)
    try:
        tree = parser.sum()
    except RecursionError as error:
        raise NotArithmetic("nested too deep") from error
    if parser.peek() is not None:
        raise NotArithmetic(f"unexpected {parser.peek()!r}")
    return Expression(tree, tuple(sorted(parser.variables)))


def _tokens(text: str) -> list[str]:
    found = []
    for match in _TOKEN.finditer(text):
        if match.group("number") or match.group("command") or match.group("symbol"):
            found.append(match.group())
    return _join_words(found, text)


def _join_words(tokens: list[str], text: str) -> list[str]:
    """Letters that spell a function of plain text, as ``sqrt`` and ``arcsin``, become its command."""
    joined: list[str] = []
    index = 0
    while index < len(tokens):
        if len(tokens[index]) == 1 and tokens[index].isalpha():
            for word in sorted(_WORDS, key=len, reverse=True):
                if tokens[index : index + len(word)] == list(word) and word in text:
                    if word in ("asin", "acos", "atan"):
                        word = "arc" + word[1:]
                        index -= 2
                    joined.append("\\" + word)
                    index += len(word)
                    break
            else:
                joined.append(tokens[index])
                index += 1
        else:
            joined.append(tokens[index])
            index += 1
    return joined


class _Parser:
    def __init__(self, text: str) -> None:
        self.tokens = _tokens(text)
        self.position = 0
        self.depth = 0
        self.variables: set[str] = set()

    def peek(self, ahead: int = 0) -> str | None:
        index = self.position + ahead
        return self.tokens[index] if index < len(self.tokens) else None

    def take(self, *expected: str) -> str:
        token = self.peek()
        if token is None or (expected and token not in expected):
            raise NotArithmetic(f"expected {expected or 'more'}, found {token!r}")
        self.position += 1
        return token

    def sum(self) -> tuple:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise NotArithmetic("nested too deep")
        tree = self.product(signed=True)
        while self.peek() in ("+", "-"):
            operator = self.take()
            tree = (operator, tree, self.product(signed=True))
        self.depth -= 1
        return tree

    def product(self, *, signed: bool = False) -> tuple:
        if signed and self.peek() in ("+", "-"):
            sign = self.take()
            if self.peek() in ("+", "-"):
                raise NotArithmetic("two signs")
            tree = self.product()
            return ("neg", tree) if sign == "-" else tree
        tree = self.power()
        while True:
            token = self.peek()
            if token in ("*", r"\cdot", r"\times", r"\ast"):
                self.take()
                tree = ("*", tree, self.signed_power())
            elif token in ("/", r"\div"):
                self.take()
                tree = ("/", tree, self.signed_power())
            elif self._begins_factor(token):
                if token[0].isdigit() or token[0] == ".":
                    raise NotArithmetic("a number after a factor")
                before = tree
                factor = self.power()
                mixed = before[0] == "number" and factor[0] == "fraction" and before[1].denominator == 1
                tree = ("+" if mixed else "*", before, factor)
            else:
                return tree

    def signed_power(self) -> tuple:
        if self.peek() == "-":
            self.take()
            return ("neg", self.power())
        return self.power()

    def _begins_factor(self, token: str | None) -> bool:
        if token is None:
            return False
        if token.startswith("\\"):
            name = token[1:]
            return (
                name in _GREEK
                or name in _FUNCTIONS
                or name
                in ("frac", "sqrt", "pi", "binom", "lfloor", "lceil", "{", "infty", "max", "min", "lvert")
            )
        return token.isalnum() or token[0] == "." or token in "({["

    def power(self) -> tuple:
        tree = self.postfix(self.base())
        if self.peek() in ("^", "**"):
            self.take()
            if self.peek() == r"\circ" or (self.peek() == "{" and self.peek(1) == r"\circ"):
                self.group_or_token()
                return ("*", tree, ("/", ("pi",), ("number", Fraction(180))))
            tree = self.postfix(("^", tree, self.exponent()))
        return tree

    def postfix(self, tree: tuple) -> tuple:
        while self.peek() in ("!", r"\%"):
            tree = ("!", tree) if self.take() == "!" else ("/", tree, ("number", Fraction(100)))
        return tree

    def exponent(self) -> tuple:
        if self.peek() == "{":
            return self.group()
        if self.peek() == "-":
            self.take()
            return ("neg", self.power())
        if self.peek() == "(":
            return self.base()
        token = self.peek() or ""
        if token.isdigit() and len(token) > 1:
            # LaTeX raises the first digit alone, plain text means them all.
            self.take()
            return ("number", Fraction(token))
        return self.base()

    def group(self) -> tuple:
        self.take("{")
        tree = self.sum()
        self.take("}")
        return tree

    def group_or_token(self) -> str:
        """Pass over ``{x}`` or one token."""
        if self.peek() != "{":
            return self.take()
        self.take("{")
        inner = self.take()
        self.take("}")
        return inner

    def argument(self) -> tuple:
        r"""Of \frac and its like: a group, one digit of a number, or one token."""
        token = self.peek()
        if token == "{":
            return self.group()
        if token and token[0].isdigit() and len(token) > 1 and token.isdigit():
            self.tokens[self.position : self.position + 1] = list(token)
        if token in ("+", "-", None):
            raise NotArithmetic("an argument is missing")
        return self.base()

    def base(self) -> tuple:
        token = self.take()
        if token[0].isdigit() or (token[0] == "." and len(token) > 1):
            if len(token) > 300:
                raise NotArithmetic("a long number")
            mantissa, _, exponent = token.lower().partition("e")
            if exponent and abs(int(exponent)) > 400:
                raise NotArithmetic("a large exponent")
            return ("number", Fraction(token))
        if token in ("(", "[", "{", r"\{"):
            tree = self.sum()
            self.take(_CLOSING[token])
            return ("group", tree)
        if token == "|" or token == r"\lvert":
            tree = self.sum()
            self.take("|" if token == "|" else r"\rvert")
            return ("abs", tree)
        if token.startswith("\\"):
            return self.command(token[1:])
        if token.isalpha() and len(token) == 1:
            if token == "e":
                return ("e",)
            if token == "i":
                return ("i",)
            return self.name(token)
        raise NotArithmetic(f"unexpected {token!r}")

    def command(self, name: str) -> tuple:
        if name == "frac":
            if self.peek() == "{" and self.peek(1) == "d":
                raise NotArithmetic("a derivative")
            numerator = self.argument()
            denominator = self.argument()
            plain = numerator[0] == denominator[0] == "number"
            return ("fraction" if plain else "/", numerator, denominator)
        if name == "binom":
            return ("binom", self.argument(), self.argument())
        if name == "sqrt":
            if self.peek() == "[":
                self.take()
                index = self.sum()
                self.take("]")
                return ("^", self.argument(), ("/", ("number", Fraction(1)), index))
            return ("sqrt", self.argument())
        if name in ("lfloor", "lceil"):
            tree = self.sum()
            self.take(r"\rfloor" if name == "lfloor" else r"\rceil")
            return (name, tree)
        if name == "pi":
            return ("pi",)
        if name in _FUNCTIONS:
            return self.function(name)
        if name in _GREEK:
            return self.name("\\" + name)
        raise NotArithmetic(f"unknown \\{name}")

    def function(self, name: str) -> tuple:
        base = exponent = None
        if name == "log" and self.peek() == "_":
            self.take()
            base = self.argument()
        if self.peek() == "^":
            self.take()
            exponent = self.exponent()
            if exponent == ("neg", ("number", Fraction(1))):
                if name not in ("sin", "cos", "tan"):
                    raise NotArithmetic("an inverse function")
                name, exponent = "arc" + name, None
        if self.peek() in ("(", "{", "[", "|"):
            argument = self.power() if self.peek() == "|" else self.base()
        else:
            # As it is read: sin 2x is sin(2x), and ends before a sum, a quotient or another function.
            argument = self.signed_power()
            while self._begins_factor(self.peek()) and not self._begins_function(self.peek()):
                if self.peek()[0].isdigit():
                    raise NotArithmetic("a number after a factor")
                argument = ("*", argument, self.power())
        tree = ("call", name, argument)
        if base is not None:
            tree = ("/", tree, ("call", "log", base))
        return tree if exponent is None else ("^", tree, exponent)

    def _begins_function(self, token: str) -> bool:
        return token == "(" or (token.startswith("\\") and token[1:] in _FUNCTIONS)

    def name(self, name: str) -> tuple:
        """A variable with its subscript; ``I(0)`` and ``x(t)`` are names as well, and n(n+1) a product."""
        if self.peek() == "_":
            self.take()
            if self.peek() == "{":
                end = self.position + 1
                while end < len(self.tokens) and self.tokens[end] != "}":
                    if self.tokens[end] == "{":
                        raise NotArithmetic("a nested subscript")
                    end += 1
                subscript = "".join(self.tokens[self.position + 1 : end])
                self.position = min(end + 1, len(self.tokens))
            else:
                subscript = self.take()
            name += "_" + subscript
        inner = self.peek(1) or ""
        applied = self.peek() == "(" and self.peek(2) == ")" and inner.isalnum() and inner != name
        if applied and (self.peek(3) != "^" or inner.isalpha()):
            name += f"({inner})"
            self.position += 3
        if self.peek() in ("'", r"\prime"):
            raise NotArithmetic("a derivative")
        self.variables.add(name)
        return ("name", name)


def _evaluate(tree: tuple, point: Mapping[str, float]) -> Value:
    kind = tree[0]
    if kind == "number":
        return tree[1]
    if kind == "name":
        return point[tree[1]]
    if kind in _CONSTANTS:
        return _CONSTANTS[kind]
    if kind == "call":
        return _real(_FUNCTIONS[tree[1]](_inexact(_evaluate(tree[2], point))))
    values = [_evaluate(branch, point) for branch in tree[1:]]
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
