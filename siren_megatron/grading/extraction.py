r"""The final answer of a response: the last \boxed{}, what follows ####, "answer is", or the last value.

What kind of answer is looked for (``kind_of``) decides only where no such mark stands: the letter of a choice
or a yes or no is then looked for in the last sentence.
"""

from __future__ import annotations

import re
from collections import deque

MAX_ANSWER_CHARS = 1000
MAX_SEARCHED_CHARS = 4000
MAX_PLAIN_WORDS = 6
"""Words that may follow "the answer is" and still be the answer as a whole."""

_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BARE_BOXED = re.compile(r"\\boxed\s+([^\s{}$]+)")
_ANSWER_PHRASE = re.compile(
    r"\banswers?\b(?:\s+(?:to|for|of)\b[^.\n:]{0,60}?)?\s*(?:\*\*|__)?\s*"
    r"(?:is|are|was|must be|should be|would be|will be|:|=)\s*(?:\*\*|__)?\s*"
    r"(?:(?:thus|therefore|simply|then|just|exactly|equal to|given by|option|choice)\b)?\s*:?\s*"
    r"(?:\*\*|__)?\s*",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.!?](?:\s|$)")
_NUMBER = re.compile(
    r"(?<![\w.\\])[-−]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][+-]?\d+)?(?:/\d+)?(?:\s?\\?%)?|(?<![\w.])-?\.\d+"
)
_MATH = re.compile(
    r"\$\$([^$]{1,800}?)\$\$|(?<!\\)\$([^$\n]{1,500}?)(?<!\\)\$|\\\(([^\n]{1,500}?)\\\)|\\\[(.{1,800}?)\\\]",
    re.DOTALL,
)
_BETWEEN = re.compile(r"[\s,;$.]*(?:\\?(?:text\{)?\s*(?:and|or)\s*\}?)?[\s,;$]*")
_CHOICE_LETTER = re.compile(r"\(([A-J])\)|\b([B-J])\b|\b(A)\b(?=\s*(?:[.):,]|$))")
_THOUGHT = re.compile(r"</think(?:ing)?>")
_KIND_CHOICE = re.compile(r"\s*\(?\s*[A-J]\s*\)?\s*\.?\s*")
_KIND_LIST = re.compile(r"[^,;]*(?:[,;]\s*\S[^,;]*)+")
_KIND_BRACKET = re.compile(r"[(\[].*,.*[)\]]", re.DOTALL)
_PLAIN_BRACKET = re.compile(r"[(\[][^()\[\]\n]{1,80},[^()\[\]\n]{1,80}[)\]]")
_PLAIN_LIST = re.compile(r"(?:,\s*(?:and|or)?|\band\b|\bor\b|\s)*", re.IGNORECASE)
_ASIDE = re.compile(
    r"(?<=[^\s.]),?[ ](?:which is |and is )?"
    r"(?:attained|achieved|reached|obtained|occurring|when|where)\b[^.\n]*[.\s]*$"
)
# The result of a computation: 9 + 6 = 15, but not x = 15.
_COMPUTED = re.compile(r"[\d%)]\s*(?:[A-Za-z]+\s*)?=\s*\\?[$€£]?\s*(?=[-−.\d])")
_THOUSANDS = re.compile(r"[$\\]*[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_YES_NO = re.compile(r"\b(yes|no|true|false)\b", re.IGNORECASE)


def kind_of(answer: str) -> str:
    """What to look for, by the gold answer: "choice", "verdict", "words", "list", "bracket" or "value"."""
    bare = re.sub(r"\\(?:text|mathrm|textbf)\s*\{([^{}]*)\}", r"\1", answer).strip().strip("$")
    if _KIND_CHOICE.fullmatch(bare):
        return "choice"
    if _YES_NO.fullmatch(bare):
        return "verdict"
    if re.fullmatch(r"[A-Za-z][A-Za-z ,'-]{2,}", bare):
        return "words"
    bare = bare.replace("$", "").strip()
    if _KIND_BRACKET.fullmatch(bare):
        return "bracket"
    return "list" if _KIND_LIST.fullmatch(bare) and not _THOUSANDS.fullmatch(bare) else "value"


def extract_final_answer(response: str, kind: str = "value") -> str | None:
    r"""The final answer of a response, or None.

    The content of the last complete ``\boxed{}`` (of several, joined by commas, when "and" joins them); else
    what follows the last ``####``; else what follows the last "answer is" or "answer:"; else a response that
    is short enough to be an answer, or the last formula or number of the text.

    Args:
        response: the text, of which what a closing ``</think>`` ends is passed over.
        kind: what is looked for, as :func:`kind_of` gives it.
    """
    if _THOUGHT.search(response):
        after = _THOUGHT.split(response)[-1]
        response = after if after.strip() else response
    boxed = _last_boxed(response)
    if boxed is not None:
        return boxed
    _, mark, after = response.rpartition("####")
    if mark:
        return _first_line(after)
    phrase = _last_match(_ANSWER_PHRASE, response[-20 * MAX_SEARCHED_CHARS :])
    if phrase is not None:
        stated = _stated(response[-20 * MAX_SEARCHED_CHARS :][phrase.end() :], kind)
        if stated is not None:
            return stated
    return _last_statement(response, kind)


def _stated(text: str, kind: str) -> str | None:
    """The answer at the beginning of what follows "the answer is"."""
    text = text.lstrip(" *_:\n")
    display = _MATH.match(text)
    if display is not None and (display.group(1) or display.group(4)):
        return (display.group(1) or display.group(4)).strip()
    line = _first_line(text)
    sentence = _first_sentence(line).strip().strip("*_").strip()
    if not sentence:
        return None
    if kind == "choice":
        letter = _CHOICE_LETTER.search(sentence) or re.search(r"()\b([a-j])\)", sentence)
        if letter is not None:
            return next(group for group in letter.groups() if group).upper()
        single = re.match(r"([A-Ja-j])\b", sentence)
        return single.group(1).upper() if single else sentence
    if kind in ("verdict", "words"):
        return sentence
    formulas = list(_MATH.finditer(sentence))
    if formulas:
        if len(formulas) == 1 and formulas[0].group() == sentence:
            return _content(formulas[0])
        rest = _MATH.sub(" ", sentence)
        if len(re.findall(r"[A-Za-z]+", rest)) <= MAX_PLAIN_WORDS and sentence.lstrip("(").startswith(
            ("$", "\\(")
        ):
            return sentence
        return _joined(formulas, sentence)
    if "\\" in sentence or len(sentence.split()) <= MAX_PLAIN_WORDS or re.match(r"[-+(\[{\d$]", sentence):
        if not re.search(r"[A-Za-z]{2,}\s*=|=\s*\d.*[A-Za-z]{3,}", sentence):
            words = re.findall(r"(?<!\\)\b[A-Za-z]{2,}\b", re.sub(r"\\[A-Za-z]+", " ", sentence))
            if len(words) <= MAX_PLAIN_WORDS and not re.match(r"[A-Za-z]+\s.*\d", sentence):
                return sentence
    return _last_value(sentence) or sentence


def _first_sentence(line: str) -> str:
    """Up to a full stop that stands outside of formulas, and is that of no abbreviation (p.m., U.S.)."""
    hidden = _MATH.sub(lambda m: "\x00" * len(m.group()), line)
    for match in _SENTENCE_END.finditer(hidden):
        before = hidden[: match.start()]
        if match.group()[0] == "!" and re.search(r"\d$", before):
            continue
        if re.search(r"(?:^|[\s.])[A-Za-z]$", before) and not re.search(r"(?:^|\s)[A-J]$", before):
            continue
        return line[: match.start()]
    return line


def _joined(formulas: list[re.Match[str]], text: str) -> str:
    """The last formula, with those before it that only commas, "and" or "or" separate from it."""
    parts = [_content(formulas[-1])]
    for earlier, later in zip(reversed(formulas[:-1]), reversed(formulas[1:]), strict=True):
        if not _BETWEEN.fullmatch(text[earlier.end() : later.start()]):
            break
        parts.insert(0, _content(earlier))
    return ", ".join(parts)


def _content(formula: re.Match[str]) -> str:
    return next(group for group in formula.groups() if group is not None).strip()


def _last_statement(response: str, kind: str) -> str | None:
    text = response[-MAX_SEARCHED_CHARS:].strip()
    if not text:
        return None
    if kind in ("verdict", "words") and len(text.split()) <= 4 and "\n" not in text:
        return _tail_words(text) if kind == "words" else text
    last_line = text.rpartition("\n")[2].strip()
    if kind == "choice":
        found = _last_match(_CHOICE_LETTER, last_line.replace("*", ""))
        return next(group for group in found.groups() if group) if found else text if len(text) <= 4 else None
    if kind == "verdict":
        found = re.match(r"\W*(yes|no|true|false)\b", last_line, re.IGNORECASE) or _last_match(
            _YES_NO, last_line
        )
        return found.group(1) if found else None
    if kind == "words":
        bold = _last_match(re.compile(r"\*\*([^*\n]{1,60})\*\*"), text)
        return (
            bold.group(1)
            if bold
            else last_line
            if len(last_line.split()) <= MAX_PLAIN_WORDS
            else _tail_words(last_line)
        )
    text = _ASIDE.sub("", text)
    brackets = _last_match(_PLAIN_BRACKET, last_line) if kind == "bracket" and "$" not in last_line else None
    if brackets is not None:
        return brackets.group()
    if kind == "list" and "$" not in last_line and (numbers := _last_numbers(_ASIDE.sub("", last_line))):
        return ", ".join(numbers)
    last_sentence = re.split(r"(?<=[^\d\s])[.!?]\s+|(?<=\d)[.!?]\s+(?=[A-Z])", last_line.rstrip(" .!"))[-1]
    computed = _last_match(_COMPUTED, last_sentence) if "\\" not in last_line else None
    if computed is not None and (number := _NUMBER.match(last_sentence, computed.end())):
        return number.group()
    return _last_value(text)


def _last_numbers(line: str) -> list[str]:
    """The last numbers of a line that only commas, "and" and "or" separate."""
    found = list(_NUMBER.finditer(line))[-50:]
    numbers = [found[-1].group()] if found else []
    for earlier, later in zip(reversed(found[:-1]), reversed(found[1:]), strict=True):
        if not _PLAIN_LIST.fullmatch(line[earlier.end() : later.start()]):
            break
        numbers.insert(0, earlier.group())
    return numbers


def _tail_words(line: str) -> str:
    """What a sentence ends on: "so it must be infinitely many"."""
    return re.split(r"\b(?:is|are|be|was|:)\b", line)[-1].strip()


def _last_value(text: str) -> str | None:
    """The last number of a text, or the formulas around or behind it."""
    text = text[-MAX_SEARCHED_CHARS:]
    number = _last_match(_NUMBER, text)
    formulas = (
        list(_MATH.finditer(text)) if text.count("$") + text.count("\\(") + text.count("\\[") < 400 else []
    )
    if formulas and (number is None or number.end() <= formulas[-1].end()):
        return _joined(formulas, text)
    if number is None:
        plain = text.strip()
        short = (
            "\n" not in plain
            and len(plain) <= 60
            and re.fullmatch(r"[^a-z]*(?:\\?[a-z]+[^a-z]*){0,4}", plain)
        )
        return plain if short and re.search(r"[\\^=()]", plain) else None
    if "\n" not in text.strip() and len(text) <= 80 and not re.search(r"(?<!\\)\b[A-Za-z]{2,}\b", text):
        return text.strip()  # a bare expression
    return number.group()


def _last_match(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return next(iter(deque(pattern.finditer(text), maxlen=1)), None)


def _last_boxed(text: str) -> str | None:
    """The content of the last ``\\boxed{...}`` whose braces close; of several in a row, all of them."""
    found: list[tuple[int, int, str]] = []
    for match in list(_BOXED.finditer(text))[-20:]:
        end = _closing_brace(text, match.end())
        if end is not None and not (found and match.start() < found[-1][1]):
            found.append((match.start(), end + 1, text[match.end() : end]))
    if not found:
        bare = _last_match(_BARE_BOXED, text[-MAX_SEARCHED_CHARS:])
        if bare is not None:
            return bare.group(1)
        # Cut off before its brace closes, at the very end.
        match = _last_match(_BOXED, text[-MAX_ANSWER_CHARS:])
        rest = text[-MAX_ANSWER_CHARS:][match.end() :].strip() if match else ""
        return rest if rest and re.fullmatch(r"[^{}\n]{1,60}", rest) else None
    parts = [found[-1][2]]
    for earlier, later in zip(reversed(found[:-1]), reversed(found[1:]), strict=True):
        between = text[earlier[1] : later[0]]
        if len(between) > 20 or not re.search(r"and|or|,", between) or not _BETWEEN.fullmatch(between):
            break
        parts.insert(0, earlier[2])
    return ", ".join(parts)


def _closing_brace(text: str, start: int) -> int | None:
    depth = 1
    for brace in re.finditer(r"\\.|[{}]", text[start : start + 20 * MAX_ANSWER_CHARS], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return start + brace.start()
    return None


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0].strip()
