"""Units of measure: their dimension and size, read from the end of an answer. Standard library only."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

_PREFIXES = {
    "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "c": 1e-2, "m": 1e-3, "u": 1e-6, "n": 1e-9, "p": 1e-12,
    "d": 1e-1,
}  # fmt: skip
_LONG_PREFIXES = {
    "kilo": 1e3,
    "mega": 1e6,
    "giga": 1e9,
    "centi": 1e-2,
    "milli": 1e-3,
    "micro": 1e-6,
    "nano": 1e-9,
}

# symbol -> (size in the base, dimension); dimensions are lists of (base, power).
_SYMBOLS: dict[str, tuple[float, dict[str, int]]] = {
    "m": (1.0, {"L": 1}),
    "g": (1e-3, {"M": 1}),
    "s": (1.0, {"T": 1}),
    "A": (1.0, {"I": 1}),
    "K": (1.0, {"K": 1}),
    "mol": (1.0, {"n": 1}),
    "L": (1e-3, {"L": 3}),
    "l": (1e-3, {"L": 3}),
    "N": (1.0, {"M": 1, "L": 1, "T": -2}),
    "J": (1.0, {"M": 1, "L": 2, "T": -2}),
    "W": (1.0, {"M": 1, "L": 2, "T": -3}),
    "Pa": (1.0, {"M": 1, "L": -1, "T": -2}),
    "Hz": (1.0, {"T": -1}),
    "V": (1.0, {"M": 1, "L": 2, "T": -3, "I": -1}),
    "C": (1.0, {"T": 1, "I": 1}),
    "F": (1.0, {"M": -1, "L": -2, "T": 4, "I": 2}),
    "T": (1.0, {"M": 1, "T": -2, "I": -1}),
    "ohm": (1.0, {"M": 1, "L": 2, "T": -3, "I": -2}),
    "eV": (1.602176634e-19, {"M": 1, "L": 2, "T": -2}),
    "cal": (4.184, {"M": 1, "L": 2, "T": -2}),
}
_WORDS: dict[str, tuple[float, dict[str, int]]] = {
    "meter": (1.0, {"L": 1}),
    "metre": (1.0, {"L": 1}),
    "gram": (1e-3, {"M": 1}),
    "second": (1.0, {"T": 1}),
    "liter": (1e-3, {"L": 3}),
    "litre": (1e-3, {"L": 3}),
    "newton": (1.0, {"M": 1, "L": 1, "T": -2}),
    "joule": (1.0, {"M": 1, "L": 2, "T": -2}),
    "watt": (1.0, {"M": 1, "L": 2, "T": -3}),
    "pascal": (1.0, {"M": 1, "L": -1, "T": -2}),
    "hertz": (1.0, {"T": -1}),
    "volt": (1.0, {"M": 1, "L": 2, "T": -3, "I": -1}),
    "ohm": (1.0, {"M": 1, "L": 2, "T": -3, "I": -2}),
    "ampere": (1.0, {"I": 1}),
    "kelvin": (1.0, {"K": 1}),
    "mole": (1.0, {"n": 1}),
    "calorie": (4.184, {"M": 1, "L": 2, "T": -2}),
}
_PLAIN: dict[str, tuple[float, dict[str, int]]] = {
    "sec": (1.0, {"T": 1}),
    "min": (60.0, {"T": 1}),
    "minute": (60.0, {"T": 1}),
    "h": (3600.0, {"T": 1}),
    "hr": (3600.0, {"T": 1}),
    "hour": (3600.0, {"T": 1}),
    "day": (86400.0, {"T": 1}),
    "week": (604800.0, {"T": 1}),
    "month": (1.0, {"month": 1}),
    "year": (12.0, {"month": 1}),
    "yr": (12.0, {"month": 1}),
    "decade": (120.0, {"month": 1}),
    "inch": (0.0254, {"L": 1}),
    "inche": (0.0254, {"L": 1}),
    "in": (0.0254, {"L": 1}),
    "ft": (0.3048, {"L": 1}),
    "foot": (0.3048, {"L": 1}),
    "feet": (0.3048, {"L": 1}),
    "yd": (0.9144, {"L": 1}),
    "yard": (0.9144, {"L": 1}),
    "mi": (1609.344, {"L": 1}),
    "mile": (1609.344, {"L": 1}),
    "micron": (1e-6, {"L": 1}),
    "angstrom": (1e-10, {"L": 1}),
    "lb": (0.45359237, {"M": 1}),
    "lbs": (0.45359237, {"M": 1}),
    "pound": (0.45359237, {"M": 1}),
    "oz": (0.45359237 / 16, {"M": 1}),
    "ounce": (0.45359237 / 16, {"M": 1}),
    "tonne": (1000.0, {"M": 1}),
    "gallon": (3.785411784e-3, {"L": 3}),
    "quart": (3.785411784e-3 / 4, {"L": 3}),
    "pint": (3.785411784e-3 / 8, {"L": 3}),
    "cup": (3.785411784e-3 / 16, {"L": 3}),
    "cc": (1e-6, {"L": 3}),
    "hectare": (1e4, {"L": 2}),
    "mph": (0.44704, {"L": 1, "T": -1}),
    "kph": (1 / 3.6, {"L": 1, "T": -1}),
    "kmh": (1 / 3.6, {"L": 1, "T": -1}),
    "dollar": (1.0, {"money": 1}),
    "usd": (1.0, {"money": 1}),
    "buck": (1.0, {"money": 1}),
    "cent": (0.01, {"money": 1}),
    "euro": (1.0, {"euro": 1}),
    "degree": (math.pi / 180, {"angle": 1}),
    "deg": (math.pi / 180, {"angle": 1}),
    "radian": (1.0, {"angle": 1}),
    "rad": (1.0, {"angle": 1}),
    "erg": (1e-7, {"M": 1, "L": 2, "T": -2}),
    "erg/s": (1e-7, {"M": 1, "L": 2, "T": -3}),
    "atm": (101325.0, {"M": 1, "L": -1, "T": -2}),
    "bar": (1e5, {"M": 1, "L": -1, "T": -2}),
    "dozen": (12.0, {}),
}
_POWER_WORDS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cubed": 3, "cu": 3}
_FACTORS = re.compile(r"[A-Za-z]+|\\Omega|[/*^().{}+-]|\\cdot|\\times|\d+")


@dataclass(frozen=True)
class Unit:
    """A unit as people write it behind a number.

    Args:
        size: of one such unit in SI's (or the dimension's own) base; 1 where it is not known.
        dimension: powers of base dimensions, sorted; empty for a plain count.
        words: what was read, for units that are not known ("apples").
        known: whether every part of it is in the tables.
    """

    size: float = 1.0
    dimension: tuple[tuple[str, int], ...] = ()
    words: str = ""
    known: bool = field(default=True)

    @property
    def is_angle(self) -> bool:
        """Degrees or radians."""
        return self.dimension == (("angle", 1),)


def lookup(word: str) -> tuple[float, dict[str, int]] | None:
    """Size and dimension of a unit's name or symbol, prefixes and plurals included."""
    if word in _SYMBOLS:
        return _SYMBOLS[word]
    if word == r"\Omega":
        return _SYMBOLS["ohm"]
    lower = word.lower()
    for name in (lower, lower.removesuffix("s")):
        for table in (_PLAIN, _WORDS):
            if name in table and not (len(name) == 1 and word != name):
                return table[name]
    for prefix, factor in _PREFIXES.items():
        rest = word.removeprefix(prefix)
        if (
            rest != word
            and rest in _SYMBOLS
            and rest not in ("l",)
            or rest in ("l",)
            and prefix in "mcd"
            and rest != word
        ):
            size, dimension = _SYMBOLS[rest]
            return size * factor, dimension
    for prefix, factor in _LONG_PREFIXES.items():
        rest = lower.removeprefix(prefix).removesuffix("s")
        if lower.startswith(prefix) and rest in _WORDS:
            size, dimension = _WORDS[rest]
            return size * factor, dimension
    return None


def parse_unit(text: str) -> Unit | None:
    r"""The unit that a text spells: ``cm``, ``m/s^2``, ``miles per hour``, ``square feet``, ``apples``.

    Args:
        text: without \text and braces of layout.

    Returns:
        None for what can be no unit (digits that are no powers, too many words).
    """
    text = " ".join(text.replace("~", " ").split()).strip(" .")
    if not text or len(text) > 60:
        return None
    text = re.sub(r"\bper\b", "/", text)
    text = text.replace("meters squared", "m^2")
    tokens = _FACTORS.findall(text)
    if "".join(tokens) != text.replace(" ", ""):
        return None
    size, dimension, sign, power_next, previous = 1.0, {}, 1, 1, None
    unknown = []
    index = 0
    while index < len(tokens):
        token = tokens[index]
        index += 1
        if token == "/":
            sign = -1
        elif token in ("*", r"\cdot", r"\times", ".", "(", ")", "{", "}"):
            continue
        elif token == "^":
            digits = []
            while index < len(tokens) and (tokens[index].isdigit() or tokens[index] in "{}-+"):
                digits.append(tokens[index])
                index += 1
            exponent = "".join(digits).strip("{}+")
            if previous is None and unknown:
                continue
            if previous is None or not re.fullmatch(r"-?\d", exponent):
                return None
            _add(dimension, previous[1], previous[2] * (int(exponent) - 1))
            size *= previous[0] ** (previous[2] * (int(exponent) - 1))
        elif token.lower() in _POWER_WORDS:
            power = _POWER_WORDS[token.lower()]
            if token.lower().endswith("ed"):
                if previous is None:
                    return None
                _add(dimension, previous[1], previous[2] * (power - 1))
                size *= previous[0] ** (previous[2] * (power - 1))
            else:
                power_next = power
        elif token[0].isalpha() or token == r"\Omega":
            found = lookup(token)
            if found is None:
                unknown.append(token)
                continue
            one, of = found
            size *= one ** (sign * power_next)
            _add(dimension, of, sign * power_next)
            previous, power_next = (one, of, sign), 1
        else:
            return None
    if len(unknown) > 5:
        return None
    clean = tuple(sorted((base, power) for base, power in dimension.items() if power))
    known = not unknown and (bool(clean) or "dozen" in text)
    return Unit(size if known else 1.0, clean if known else (), text, known)


def _add(total: dict[str, int], dimension: dict[str, int], times: int) -> None:
    for base, power in dimension.items():
        total[base] = total.get(base, 0) + power * times
