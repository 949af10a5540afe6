"""Arithmetic in LaTeX or plain text: a small grammar, and values at given points. Standard library only.

The grammar knows what final answers are made of: numbers, letters with subscripts, sums, products (implicit
ones too), fractions, powers, roots, factorials, binomials, floors, absolute values and the usual functions.
Whatever else it meets it refuses; nothing is ever evaluated as code. Values are exact fractions as long as
they can be, floats or complex numbers otherwise, and no operation grows beyond a fixed size, so that no text
takes long.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from siren_megatron.grading.arithmetic import FUNCTIONS, Value, evaluate

MAX_CHARS = 600
MAX_DEPTH = 40

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
_WORDS = {"sqrt", "pi", *FUNCTIONS, "asin", "acos", "atan"}
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
            return evaluate(self.tree, point)
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
                or name in FUNCTIONS
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
        if name in FUNCTIONS:
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
        return token == "(" or (token.startswith("\\") and token[1:] in FUNCTIONS)

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
