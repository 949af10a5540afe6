"""The form of an answer: a value with its unit, a list, a bracket, a region, a relation, a matrix, words.

``parse_form`` reads a text that :mod:`siren_megatron.grading.spelling` has normalised. It decides what kind
of thing an answer is; what two things of a kind have to share to be equal is in ``equivalence``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from siren_megatron.grading.expression import NotArithmetic
from siren_megatron.grading.leaf import CURRENCY, TEXT, THOUSANDS, Leaf, constant, make_leaf, number_word
from siren_megatron.grading.spelling import matching_bracket, normalise, split_top_level

MAX_ITEMS = 200
MAX_DEPTH = 6


@dataclass(frozen=True)
class Collection:
    """Several answers in any order; ``braces`` where they were written as a set."""

    items: tuple[Form, ...]
    braces: bool = False


@dataclass(frozen=True)
class Bracket:
    """``(a,b)``, ``[a,b)``, ``(a,b,c)``: a point, a vector or an interval; order counts."""

    opening: str
    closing: str
    items: tuple[Form, ...]


@dataclass(frozen=True)
class Interval:
    """Part of the real line; an end of None is infinite."""

    low: Form | None
    high: Form | None
    low_closed: bool
    high_closed: bool


@dataclass(frozen=True)
class Region:
    """A union of intervals, and of single points as closed intervals of length 0."""

    intervals: tuple[Interval, ...]
    variable: str | None = None


@dataclass(frozen=True)
class Matrix:
    rows: tuple[tuple[Form, ...], ...]


@dataclass(frozen=True)
class Relation:
    """``left = right`` and other relations, as texts; ``parts`` has more than two for a chain."""

    operator: str
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Words:
    text: str


Form = Leaf | Collection | Bracket | Region | Matrix | Relation | Words

_LIST_SEPARATOR = re.compile(
    r"\s*(?:[,;]\s*(?:\\text\{\s*(?:and|or)\s*,?\s*\}|(?:and|or)(?![A-Za-z]))?"
    r"|\\text\{\s*,?\s*(?:and|or|,)\s*\}|(?<=[\s)}\]])(?:and|or)(?=[\s({\[\\])|\\(?:lor|vee|land|wedge)(?![A-Za-z])"
    r"|&)\s*"
)
_REMOVED = re.compile(
    r"(?:\\?[A-Za-z]\s*\\ne\s*(?![^,]*\\ne)(.+)|(?:\\?[A-Za-z]\s*\\in\s*)?\\?R\s*(?:\\setminus|\\backslash|-)\s*(\\\{.+\\\}))"
)
_UNION = re.compile(r"\\cup(?![A-Za-z])")
_OR = re.compile(r"\s*(?:\\text\{\s*or\s*\}|(?<=\s)or(?=\s)|\\lor(?![A-Za-z])|\\vee(?![A-Za-z])|,)\s*")
_RELATION = re.compile(r"\\(?:le|ge|ne|in|approx|equiv|subset|subseteq)(?![A-Za-z])|<=|>=|!=|:=|<|>|=")
_INEQUALITIES = {r"\le": "<=", r"\ge": ">=", "<=": "<=", ">=": ">=", "<": "<", ">": ">"}
_MATRIX = re.compile(
    r"^([^\[(\\]*|-?\\frac\s*\{[^{}]*\}\s*\{[^{}]*\})\s*[\[(]?\s*\\begin\{(?:[pbB]?matrix|smallmatrix|array)\}(?:\{[^{}]*\})?(.*)"
    r"\\end\{(?:[pbB]?matrix|smallmatrix|array)\}\s*[\])]?$",
    re.DOTALL,
)
_WORD_TEXT = re.compile(r"[A-Za-z][A-Za-z'\"&.() -]*")
_NAME = re.compile(r"\\?[A-Za-z]+(?:_(?:\{[^{}]*\}|\w))?(?:\([^()]{1,20}\))?(?:'|\^\{?\\prime\}?)*")


@lru_cache(maxsize=16384)
def parse_form(text: str, *, loose_units: bool = False, depth: int = 0) -> Form:
    """The form of a normalised text.

    Args:
        text: as :func:`siren_megatron.grading.spelling.normalise` gives it.
        loose_units: take a single letter behind a number for a unit (``5 m``) and not for a variable.
    """
    if depth > MAX_DEPTH:
        return Words(text)

    def inner(part: str) -> Form:
        return parse_form(normalise(part), loose_units=loose_units, depth=depth + 1)

    if match := _MATRIX.match(text):
        factor, body = match.groups()
        factor = {"": "", "-": "-1"}.get(factor.strip(), factor.strip())
        if not factor or constant(factor) is not None:
            cells = [row.split("&") for row in re.split(r"\\\\(?:\[[^\]]*\])?", body) if row.strip()]
            if factor:
                cells = [[f"({factor})*({cell})" for cell in row] for row in cells]
            return Matrix(tuple(tuple(inner(cell) for cell in row) for row in cells))
    if THOUSANDS.fullmatch(text):
        return make_leaf(text.replace(",", ""), loose_units)
    if (region := _region(text, inner)) is not None:
        return region
    if "\\pm" in text and (both := _plus_minus(text)) is not None:
        return Collection(tuple(inner(part) for part in both))
    parts = [part for part in split_top_level(text, _LIST_SEPARATOR) if part.strip()]
    if 1 < len(parts) <= MAX_ITEMS and not _is_currency(text):
        return Collection(_flatten([inner(part) for part in parts]))
    if bracket := _bracket(text, inner):
        return bracket
    if relation := _relation(text, inner):
        return relation
    if _is_words(text):
        number = number_word(text.lower())
        return Words(text) if number is None else make_leaf(str(number), loose_units)
    return make_leaf(text, loose_units)


def _flatten(items: list[Form]) -> tuple[Form, ...]:
    """A list of which an item is itself a list without braces (from plus-minus) is one list."""
    flat: list[Form] = []
    for item in items:
        flat += item.items if isinstance(item, Collection) and not item.braces else [item]
    return tuple(flat)


def _is_currency(text: str) -> bool:
    match = CURRENCY.match(text)
    return bool(match) and bool(THOUSANDS.fullmatch(text[match.end() :]))


def _plus_minus(text: str) -> tuple[str, str] | None:
    if text.count(r"\pm") + text.count(r"\mp") > 2 or any(sep in text for sep in (",", " and ", " or ")):
        return None
    plus = re.sub(r"\\mp(?![A-Za-z])", "-", re.sub(r"\\pm(?![A-Za-z])", "+", text))
    minus = re.sub(r"\\mp(?![A-Za-z])", "+", re.sub(r"\\pm(?![A-Za-z])", "-", text))
    return plus, minus


def _bracket(text: str, inner) -> Form | None:
    if text in (r"\emptyset", r"\{\}", r"\{ \}"):
        return Collection((), braces=True)
    if text.startswith(r"\{") and text.endswith(r"\}") and matching_bracket(text, 1) == len(text) - 1:
        body = text[2:-2]
        if re.search(r"\\mid(?![A-Za-z])|\||:", body):
            return _set_builder(body, inner)
        items = split_top_level(body, re.compile(r"\s*[,;]\s*"))
        return Collection(_flatten([inner(item) for item in items]), braces=True)
    opening, closing = text[:1], text[-1:]
    if opening in "([" and closing in ")]" and text and matching_bracket(text, 0) == len(text) - 1:
        items = split_top_level(text[1:-1], re.compile(r"\s*[,;]\s*"))
        if len(items) > 1 and all(item.strip() for item in items):
            return Bracket(opening, closing, tuple(inner(item) for item in items))
        if len(items) == 1 and opening == "(" and closing == ")" and items[0].strip():
            return inner(items[0])
    return None


def _set_builder(body: str, inner) -> Form | None:
    r"""``x : x > 0`` and ``x \in R \mid x > 0``, where the condition is a region of that name."""
    parts = re.split(r"\\mid(?![A-Za-z])|\||:", body, maxsplit=1)
    name = re.split(r"\\in(?![A-Za-z])", parts[0])[0].strip()
    condition = inner(parts[1])
    return condition if isinstance(condition, Region) and condition.variable == name else None


def _region(text: str, inner) -> Region | None:
    """Unions of intervals, and inequalities between one name and constants."""
    parts = split_top_level(text, _UNION)
    if len(parts) > 1:
        intervals: list[Interval] = []
        for part in parts:
            form = inner(part)
            if isinstance(form, Collection) and form.braces:
                intervals += [Interval(item, item, True, True) for item in form.items]
            elif (region := as_region(form)) is not None:
                intervals += region.intervals
            else:
                return None
        return Region(tuple(intervals))
    if removed := _REMOVED.fullmatch(text):
        # x \ne 1, and all numbers without some.
        return _without_points(removed.group(1) or removed.group(2), inner)
    if not any(sign in text for sign in ("<", ">", r"\le", r"\ge")):
        return None
    intervals = []
    variables = set()
    for part in split_top_level(text, _OR):
        found = _inequality(part.strip(), inner)
        if found is None:
            return None
        intervals.append(found[0])
        variables.add(found[1])
    if len(variables) != 1:
        return None
    return Region(tuple(intervals), variables.pop())


def _without_points(text: str, inner) -> Region | None:
    """The real line without the points of a list."""
    form = inner(text)
    points = form.items if isinstance(form, Collection) else (form,)
    try:
        values = [complex(point.expression.at({})) for point in points]
    except (AttributeError, KeyError, NotArithmetic):
        return None
    ends = [
        None,
        *(point for _, point in sorted(zip(values, points, strict=True), key=lambda p: p[0].real)),
        None,
    ]
    return Region(tuple(Interval(low, high, False, False) for low, high in zip(ends, ends[1:], strict=False)))


def _inequality(text: str, inner) -> tuple[Interval, str] | None:
    signs = [_INEQUALITIES.get(m) for m in _RELATION.findall(text)]
    sides = [side.strip() for side in split_top_level(text, _RELATION)]
    if None in signs or len(sides) != len(signs) + 1 or not 2 <= len(sides) <= 3 or not all(sides):
        return None
    names = [
        index
        for index, side in enumerate(sides)
        if _NAME.fullmatch(side) and side not in (r"\infty", r"\pi", "e")
    ]
    if len(sides) == 2 and signs[0][0] == "<" and (within := re.fullmatch(r"\|(\w+)\|", sides[0])):
        # |x| < 3
        closed = len(signs[0]) == 2
        return Interval(inner(f"-({sides[1]})"), inner(sides[1]), closed, closed), within.group(1)
    if len(sides) == 3:
        if names[:1] != [1] and 1 not in names or len({sign[0] for sign in signs}) != 1:
            return None
        low, high = inner(sides[0]), inner(sides[2])
        closed = [len(sign) == 2 for sign in signs]
        if signs[0][0] == ">":
            low, high, closed = high, low, closed[::-1]
        return Interval(
            _end(low), _end(high), closed[0] and _end(low) is not None, closed[1] and _end(high) is not None
        ), sides[1]
    if not names:
        return None
    sign = signs[0]
    name, bound = (0, 1) if 0 in names else (1, 0)
    if name == 1:
        sign = {"<": ">", ">": "<"}[sign[0]] + sign[1:]
    end = _end(inner(sides[bound]))
    closed = len(sign) == 2 and end is not None
    interval = Interval(None, end, False, closed) if sign[0] == "<" else Interval(end, None, closed, False)
    return interval, sides[name]


def _end(form: Form) -> Form | None:
    """An end of an interval; None for an infinite one."""
    infinite = isinstance(form, Leaf) and form.text.replace(" ", "") in (
        r"\infty",
        r"+\infty",
        r"-\infty",
        "infty",
    )
    return None if infinite else form


def as_region(form: Form) -> Region | None:
    """A region, or a bracket of two read as an interval; None for everything else."""
    if isinstance(form, Region):
        return form
    if isinstance(form, Bracket) and len(form.items) == 2:
        low, high = form.items
        return Region(
            (
                Interval(
                    _end(low),
                    _end(high),
                    form.opening == "[" and _end(low) is not None,
                    form.closing == "]" and _end(high) is not None,
                ),
            )
        )
    text = re.sub(r"[\s{}]|\\text|\\|^x\\in", "", form.text) if isinstance(form, Leaf | Words) else ""
    if text in ("R", "allreals", "allrealnumbers", "realnumbers"):
        return Region((Interval(None, None, False, False),))
    if text in ("R^+", "R_+", "R^>0", "R_>0"):
        return Region((Interval(parse_form("0"), None, False, False),))
    return None


def _relation(text: str, inner) -> Form | None:
    parts = split_top_level(text, _RELATION)
    if len(parts) < 2:
        return None
    signs = []
    position = len(parts[0])
    for part in parts[1:]:
        match = _RELATION.match(text, position)
        if match is None:
            return None
        signs.append(match.group())
        position = match.end() + len(part)
    parts = [normalise(part) for part in parts]
    if not all(parts):
        return None
    if signs[0] == r"\in" and len(parts) == 2:
        return inner(parts[1])
    if r"\approx" in signs:
        # What stands before is exact; behind it, if at all, a decimal.
        exact = parts[: signs.index(r"\approx") + 1]
        if len(exact) == 1 and _NAME.fullmatch(exact[0]):
            return inner(parts[-1])
        return Relation("approx", (*exact, parts[-1]))
    if len(set(signs)) == 1:
        return Relation(
            _INEQUALITIES.get(signs[0], "=" if signs[0] in ("=", ":=") else signs[0]), tuple(parts)
        )
    return Relation("?", (text,))


def _is_words(text: str) -> bool:
    if not _WORD_TEXT.fullmatch(text):
        bare = TEXT.sub(r"\1", text)
        return bare != text and bool(_WORD_TEXT.fullmatch(bare)) and len(bare.strip()) > 2
    words = re.findall(r"[A-Za-z]+", text)
    if len(words) == 1 and words[0] in ("sin", "cos", "tan", "log", "exp"):
        return False
    if re.search(r"[A-Za-z]\s*\(", text) and len(words) <= 2 and all(len(word) <= 3 for word in words):
        return False
    return any(len(word) >= 3 for word in words) and not text.startswith("sqrt")
