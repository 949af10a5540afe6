"""Answers of other kinds: choices, yes and no, dates, times of day, ratios, numerals of a base, words."""

from __future__ import annotations

import math
import re

from siren_megatron.grading.spelling import normalise

_CHOICE = re.compile(r"\(?\s*([A-J])\s*\)?")
_CHOSEN = re.compile(
    r"(?:(?:the\s+)?(?:option|choice|answer)\s*(?:is\s*)?:?\s*)?(?:\(\s*([A-Ja-j])\s*\)|([A-J])(?=[).:,]|\s|$|\\)|([a-j])(?=\)))"
    r"[).:,]?(.*)",
    re.IGNORECASE | re.DOTALL,
)
_MONTHS = "january february march april may june july august september october november december".split()
_MONTH = re.compile(r"\b(" + "|".join(f"{m[:3]}(?:{m[3:]})?" for m in _MONTHS) + r")\b\.?", re.IGNORECASE)
_ISO = re.compile(r"(\d{4})-(\d{1,2})-(\d{1,2})")
_TIME = re.compile(r"(\d{1,2}):(\d{2})(?::(\d{2}))?\s*(?:(a|p)\.?\s*m\.?)?", re.IGNORECASE)
_HOUR = re.compile(r"(\d{1,2})\s*(a|p)\.?\s*m\.?", re.IGNORECASE)
_RATIO = re.compile(r"(\d+(?:\.\d+)?)((?:\s*:\s*\d+(?:\.\d+)?)+)")
_BASED = re.compile(r"([0-9A-Fa-f]+)\s*_\s*\{?\s*(?:\\text\{)?\s*(\d{1,2}|two|eight|sixteen)\s*\}?\}?")
_BASES = {"two": 2, "eight": 8, "sixteen": 16}
_VERDICTS = {"yes", "no", "true", "false"}
_ARTICLES = {"a", "an", "the"}


def _plain(text: str) -> str:
    """Without LaTeX's \\text and dollars, white space as one blank."""
    text = normalise(text)
    return " ".join(re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text).split()).strip(" .")


def compare(candidate: str, gold: str) -> bool | None:
    """The verdict where the gold answer is of one of these kinds; None where it is of none."""
    plain = _plain(gold)
    if len(plain) > 60:
        return None
    if choice := _CHOICE.fullmatch(plain):
        return _same_choice(choice.group(1), candidate)
    if plain.lower() in _VERDICTS:
        first = re.match(r"[A-Za-z]+", _plain(candidate))
        return bool(first) and first.group().lower() == plain.lower()
    other = _plain(candidate)
    if (ours := _date(plain)) is not None:
        theirs = _date(other)
        return theirs is not None and all(a == b or None in (a, b) for a, b in zip(ours, theirs, strict=True))
    if (ours := _time(plain)) is not None and (theirs := _time(other)) is not None:
        (minutes, half), (other_minutes, other_half) = ours, theirs
        if half and other_half or not (half or other_half):
            if minutes == other_minutes:
                return True
            return False if half else _same_ratio(plain, other) and None
        return (
            minutes == other_minutes
            or (minutes - other_minutes) % 720 == 0
            and min(minutes, other_minutes) < 780
        )
    if _RATIO.fullmatch(plain):
        other = re.sub(r"\s*\bto\b\s*", ":", other)
        return _same_ratio(plain, other)
    if based := _BASED.fullmatch(plain):
        return _same_numeral(based, other)
    return None


def _same_choice(letter: str, candidate: str) -> bool:
    plain = _plain(candidate)
    if match := _CHOSEN.match(plain):
        chosen = match.group(1) or match.group(2) or match.group(3)
        if not (match.group(2) and chosen.islower()):
            # "A line through B" is no choice; "C) text" and "(C) text" are.
            marked = match.group(2) is None or re.match(
                r"(?:[^A-Za-z]*|(?:option|choice).*)$", plain, re.IGNORECASE
            )
            bare = plain[: match.end() - len(match.group(4))]
            if marked or not match.group(4).strip() or re.search(r"[).:,]\s*$", bare):
                return chosen.upper() == letter
    return plain == letter


def _date(text: str) -> tuple[int | None, int, int] | None:
    if match := _ISO.fullmatch(text):
        year, month, day = map(int, match.groups())
        return year, month, day
    months = _MONTH.findall(text)
    if len(months) != 1:
        return None
    month = [m[:3] for m in _MONTHS].index(months[0][:3].lower()) + 1
    rest = re.sub(r"(?<=\d)(?:st|nd|rd|th)\b", "", _MONTH.sub(" ", text), flags=re.IGNORECASE)
    if re.search(r"[A-Za-z]{3,}", re.sub(r"\b(?:of|the|on)\b", " ", rest)):
        return None
    numbers = [int(n) for n in re.findall(r"\d+", rest)]
    days, years = [n for n in numbers if n <= 31], [n for n in numbers if n >= 1000]
    if len(days) != 1 or len(years) > 1 or len(numbers) != len(days) + len(years):
        return None
    return (years[0] if years else None), month, days[0]


def _time(text: str) -> tuple[int, str | None] | None:
    """(minutes of the day, "a" or "p" or None)."""
    if match := _TIME.fullmatch(text):
        hour, minute, half = int(match[1]), int(match[2]), (match[4] or "").lower() or None
    elif match := _HOUR.fullmatch(text):
        hour, minute, half = int(match[1]), 0, match[2].lower()
    else:
        return None
    if minute > 59 or hour > 24 or (half and not 1 <= hour <= 12):
        return None
    if half:
        hour = hour % 12 + (12 if half == "p" else 0)
    return hour * 60 + minute, half


def _same_ratio(gold: str, other: str) -> bool | None:
    if "/" in other or "frac" in other:
        match = re.fullmatch(r"(\d+)\s*/\s*(\d+)|\\frac\{(\d+)\}\{(\d+)\}", other)
        if match is None:
            return None
        other = ":".join(part for part in match.groups() if part)
    if not (_RATIO.fullmatch(other) and _RATIO.fullmatch(gold)):
        return False
    ours, theirs = ([float(part) for part in text.split(":")] for text in (gold, other))
    if len(ours) != len(theirs) or not all(ours) or not all(theirs):
        return ours == theirs
    return all(math.isclose(b / a, theirs[0] / ours[0]) for a, b in zip(ours, theirs, strict=True))


def _same_numeral(gold: re.Match[str], other: str) -> bool | None:
    digits, base = (
        gold.group(1),
        int(_BASES.get(gold.group(2), gold.group(2) if gold.group(2).isdigit() else 0)),
    )
    try:
        value = int(digits, base)
    except ValueError:
        return None  # a variable with an index: a_2
    if match := _BASED.fullmatch(other):
        try:
            return int(match[1], int(_BASES.get(match[2], match[2] if match[2].isdigit() else 0))) == value
        except ValueError:
            return False
    if re.fullmatch(r"\d+", other):
        return other.lstrip("0") == digits.lstrip("0") or (len(other) < 30 and int(other) == value)
    return None


def same_words(gold: str, other: str) -> bool:
    """Texts apart from case, punctuation, articles and LaTeX's upright marks."""
    ours, theirs = (_word_list(text) for text in (gold, other))
    return ours == theirs


def _word_list(text: str) -> list[str]:
    words = re.findall(r"[a-z0-9']+", re.sub(r"\\text", " ", text.lower()))
    return [word for word in words if word not in _ARTICLES] or words
