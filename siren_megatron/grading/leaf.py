"""One value of an answer: a number or an expression, with its unit. Standard library only."""

from __future__ import annotations

import re
from dataclasses import dataclass

from siren_megatron.grading.expression import Expression, NotArithmetic, parse_expression
from siren_megatron.grading.units import Unit, lookup, parse_unit


@dataclass(frozen=True)
class Leaf:
    """A number or an expression.

    Args:
        text: its spelling without unit and percent sign.
        expression: the parsed text, None where the grammar has no place for it.
        unit: what was read behind the number.
        percent: whether a percent sign stood there.
    """

    text: str
    expression: Expression | None
    unit: Unit | None = None
    percent: bool = False


THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_MIXED = re.compile(r"([+-]?)(\d+)\s+(\d+)\s*/\s*(\d+)")
_NUMBER_WORDS = {
    word: number
    for number, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
        "sixteen seventeen eighteen nineteen twenty".split()
    )
} | {"thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90}
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALED = re.compile(
    r"([+-]?[\d.,]*\d)\s*(?:\\text\{\s*)?(hundred|thousand|million|billion|trillion)\b\s*\}?(.*)"
)
CURRENCY = re.compile(r"^([+-]?)\s*(\\\$|€|£|¥|\\text\{(?:USD|EUR)\}|USD|US\\\$|Rs\.?)\s*(?=[\d.+-])")
_CURRENCY_UNITS = {"€": "euro", "£": "pound sterling", "¥": "yen", "Rs": "rupee", "Rs.": "rupee"}
_PERCENT = re.compile(r"\s*(?:\\%|\\text\{\s*(?:\\?%|percent|per cent)\s*\}|\bpercent|\bper cent)$")
_COMPOUND_PART = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)")
_COMPOUND = re.compile(r"\d+(?:\.\d+)?\s*[A-Za-z]{2,}(?:(?:\s|,|\band\b)*\d+(?:\.\d+)?\s*[A-Za-z]{2,})+")
_CIRC = re.compile(r"\s*\^\{\\circ\}\s*(?:\\text\{\s*([CFK])\s*\}|([CFK]))?$")
TEXT = re.compile(r"\\text\{([^{}]*)\}")


def number_word(text: str) -> int | None:
    """The number that words spell (twenty-five, two hundred); None for other words."""
    total, sign = 0, 1
    words = text.replace("-", " ").split()
    if words and words[0] in ("negative", "minus"):
        sign, words = -1, words[1:]
    if not words or len(words) > 4:
        return None
    for word in words:
        if word in _NUMBER_WORDS:
            total += _NUMBER_WORDS[word]
        elif word in _SCALES and total:
            total *= 10 ** _SCALES[word]
        elif word in _SCALES and len(words) == 1:
            return None
        else:
            return None
    return sign * total


def _expression(text: str) -> Expression | None:
    try:
        return parse_expression(TEXT.sub(r"\1", text) if r"\text" in text else text)
    except NotArithmetic:
        return None


def constant(text: str) -> Expression | None:
    """The parsed text where it is a number."""
    expression = _expression(text)
    return expression if expression is not None and expression.is_constant else None


def make_leaf(text: str, loose_units: bool) -> Leaf:
    """A value with what stands around it: currency, unit, percent sign, words, mixed numbers."""
    unit, percent = None, False
    if label := re.fullmatch(r"\\text\{[^{}]*\s[^{}]*\}\s*([-+]?[\d\\].*)", text):
        text = label.group(1)  # words before the value
    if (compound := _compound(text)) is not None:
        return compound
    if match := CURRENCY.match(text):
        sign, mark = match.groups()
        mark = mark.removeprefix(r"\text{").removesuffix("}")
        unit = (
            Unit(1.0, (("money", 1),), "dollars")
            if mark not in _CURRENCY_UNITS
            else Unit(words=_CURRENCY_UNITS[mark], known=False)
        )
        text = sign + text[match.end() :]
    if match := _PERCENT.search(text):
        text, percent = text[: match.start()], True
    elif (match := _CIRC.search(text)) and not re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", text):
        scale = match.group(1) or match.group(2)
        unit = Unit(words=f"degrees {scale}", known=False) if scale else parse_unit("degrees")
        text = text[: match.start()]
    else:
        text, found = _split_unit(text, loose_units)
        unit = found or unit
    text = text.strip()
    if match := _MIXED.fullmatch(text):
        sign, whole, over, under = match.groups()
        text = f"{sign}({whole}+{over}/{under})"
    elif match := re.fullmatch(r"-\s*(\d+)\s*(\\frac\s*\{\d+\}\s*\{\d+\})", text):
        text = f"-({match[1]}+{match[2]})"
    if THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    if match := _SCALED.fullmatch(text):
        number, scale, rest = match.groups()
        if not rest.strip():
            text = f"{number.replace(',', '')}*10^{_SCALES[scale]}"
    return Leaf(text, _expression(text), unit, percent)


def _compound(text: str) -> Leaf | None:
    """``1 hour 30 minutes``: a sum of values whose units are of one dimension, in the last unit."""
    bare = " ".join(TEXT.sub(r" \1 ", text).split())
    if not _COMPOUND.fullmatch(bare):
        return None
    parts = [(number, parse_unit(word)) for number, word in _COMPOUND_PART.findall(bare)]
    units = [unit for _, unit in parts]
    if not all(unit is not None and unit.known for unit in units) or len({u.dimension for u in units}) > 1:
        return None
    total = sum(float(number) * unit.size for number, unit in parts) / units[-1].size
    value = format(total, ".12g")
    return Leaf(value, _expression(value), units[-1])


def _split_unit(text: str, loose_units: bool) -> tuple[str, Unit | None]:
    """(value, unit) where a constant is followed by something that can be a unit."""
    # \frac{\text{m}}{\text{s}^2} is m/s^2.
    tail = re.sub(r"\\frac\s*\{\s*(\\text\{[^{}]*\}(?:\^\{?\d\}?)?)\s*\}\s*\{\s*(.*)\}$", r"\1/\2", text)
    start = tail.find(r"\text{")
    if start > 0:
        value, spelled = tail[:start].strip(), TEXT.sub(r" \1 ", tail[start:])
        unit = parse_unit(re.sub(r"[{}]", "", spelled))
        if unit is not None:
            scaled = re.match(r"\s*(hundred|thousand|million|billion|trillion)\b\s*(.*)", spelled)
            if scaled:
                return f"{value} {scaled[1]}", parse_unit(scaled[2]) if scaled[2] else None
            if constant(_plain_number(value)) is not None:
                return value, unit
    if match := re.fullmatch(
        r"(.*?[\d)}\]i])(?:\s*-\s*|\s*)((?<![A-Za-z])[A-Za-z\\][A-Za-z/ ^{}\d*.\\-]*)", text
    ):
        value, spelled = match.groups()
        if re.match(r"(hundred|thousand|million|billion|trillion)\b", spelled):
            scale, _, rest = spelled.partition(" ")
            return f"{value} {scale}", parse_unit(rest) if rest else None
        apart = text[len(value)].isspace()
        unit = parse_unit(spelled)
        words = re.findall(r"[A-Za-z]+", spelled)
        plausible = unit is not None and (
            (unit.known and (len(words[0]) > 1 or loose_units))
            or (
                apart
                and all(len(word) > 2 or word in ("of", "in", "cm") for word in words)
                and "\\" not in spelled
            )
        )
        if plausible and constant(_plain_number(value)) is not None:
            return value, unit
    # 36\pi cubic inches
    if match := re.fullmatch(r"(.*\\pi)\s+([A-Za-z][A-Za-z /^{}\d.]*)", text):
        unit = parse_unit(match[2])
        if unit is not None and unit.known and constant(match[1]) is not None:
            return match[1], unit
    words = text.split()
    if len(words) == 2 and words[0].lower() in _NUMBER_WORDS and lookup(words[1]):
        return str(_NUMBER_WORDS[words[0].lower()]), parse_unit(words[1])
    return text, None


def _plain_number(text: str) -> str:
    text = text.strip()
    if match := _MIXED.fullmatch(text):
        return "({1}+{2}/{3})".format(*match.groups())
    return text.replace(",", "") if THOUSANDS.fullmatch(text) else text
