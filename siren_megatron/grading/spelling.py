r"""One spelling for answers: ``normalise`` maps LaTeX, Unicode and plain variants of a text onto one.

What it leaves is LaTeX without layout: no dollar signs, no spacing commands, \frac for every fraction, plain
brackets, and \text{...} for every upright text.
"""

from __future__ import annotations

import re
from functools import lru_cache

_CHARACTERS = str.maketrans(
    {
        "−": "-",
        "–": "-",
        "—": "-",
        "‐": "-",
        "×": r" \times ",
        "·": r" \cdot ",
        "⋅": r" \cdot ",
        "∗": "*",
        "÷": r" \div ",
        "π": r" \pi ",
        "∞": r" \infty ",
        "≤": r" \le ",
        "≥": r" \ge ",
        "⩽": r" \le ",
        "⩾": r" \ge ",
        "≠": r" \ne ",
        "≈": r" \approx ",
        "∈": r" \in ",
        "∪": r" \cup ",
        "∩": r" \cap ",
        "∅": r" \emptyset ",
        "±": r" \pm ",
        "∓": r" \mp ",
        "°": r"^{\circ}",
        "º": r"^{\circ}",
        "′": "'",
        "’": "'",
        "“": '"',
        "”": '"',
        "√": r"\sqrt ",
        "θ": r" \theta ",
        "α": r" \alpha ",
        "β": r" \beta ",
        "λ": r" \lambda ",
        "μ": r" \mu ",
        "ω": r" \omega ",
        "Ω": r" \Omega ",
        "ℝ": r" \R ",
        "½": r"\frac{1}{2}",
        "¼": r"\frac{1}{4}",
        "¾": r"\frac{3}{4}",
        "⅓": r"\frac{1}{3}",
        "⅔": r"\frac{2}{3}",
        "\u00a0": " ",
        "\u2009": " ",
        "\u202f": " ",
        "\u200b": "",
        "⟨": r"\langle ",
        "⟩": r"\rangle ",
        "，": ",",
        "（": "(",
        "）": ")",
        "：": ":",
        "＝": "=",
        "％": "%",
    }
)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", "0123456789-+n")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_SUPERSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ]+")
_SUBSCRIPT = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_COMMANDS = {
    **dict.fromkeys(("dfrac", "tfrac", "cfrac"), "frac"),
    **dict.fromkeys(("dbinom", "tbinom"), "binom"),
    **dict.fromkeys(("leq", "leqslant"), "le"),
    **dict.fromkeys(("geq", "geqslant"), "ge"),
    "neq": "ne",
    "lt": "<",
    "gt": ">",
    **dict.fromkeys(("simeq", "sim", "thickapprox"), "approx"),
    **dict.fromkeys(("varnothing", "emptyset"), "emptyset"),
    **dict.fromkeys(("ldots", "dotsc", "cdots", "dotsb"), "dots"),
    "degrees": "degree",
    **dict.fromkeys(("mathrm", "textrm", "mbox", "textnormal", "operatorname", "textsf", "texttt"), "text"),
    **dict.fromkeys(("textbf", "textit", "emph", "mathsf", "mathtt", "mathit", "hbox"), "text"),
}
# Commands of layout, which say nothing.
_LAYOUT = re.compile(
    r"\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits|left|right|bigl|bigr|biggl|biggr|Bigl|Bigr|Biggl"
    r"|Biggr|big|Big|bigg|Bigg|large|Large|normalsize|small|rm|bf|it|boldmath|mathstrut|strut|hfill|notag"
    r"|nonumber|phantom\s*\{[^{}]*\}|hspace\*?\s*\{[^{}]*\}|vspace\*?\s*\{[^{}]*\})(?![A-Za-z])\s*\.?(?=\s|\S|$)"
)
_LEFT_DOT = re.compile(r"\\(?:left|right)\s*\.")
_SPACING = re.compile(
    r"(?<!\\)\\(?:[,;:!> ]|quad(?![A-Za-z])|qquad(?![A-Za-z])|thinspace(?![A-Za-z])|enspace(?![A-Za-z]))|~"
)
_STYLE = re.compile(r"\\(?:mathbf|boldsymbol|bm|mathcal|mathbb|pmb|underline|ensuremath)\s*\{([^{}]*)\}")
_TEXT = re.compile(r"\\text\s*\{\s*([^{}]*?)\s*\}")
_FUNCTION_NAMES = re.compile(
    r"\\text\{(sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|ln|log|exp|lg|gcd|lcm|e|i|d)\}"
)
_OVER = re.compile(r"\{([^{}]*)\\over(?![A-Za-z])([^{}]*)\}")
_BARE_SQRT = re.compile(r"\\sqrt\s*(\d+|[A-Za-z])")
_REPEATING = re.compile(r"(?<![\d.])(\d{1,9})\.(\d{0,9})\\(?:overline|bar)\s*\{(\d{1,9})\}")
_CHOOSE = re.compile(r"\{([^{}]*)\\choose(?![A-Za-z])([^{}]*)\}")
_NUMPY = re.compile(r"\b(?:np|numpy|math)\.([a-z]+)")
_CIRC = re.compile(r"\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z])|\{\s*\\degree\s*\})|\\degree(?![A-Za-z])")
_THOUSANDS_SPACE = re.compile(r"(?<![\d.])(\d{1,3})((?: \d{3})+)(?![\d])")
_EXPONENT_MARK = re.compile(
    r"(?<=\d)\s*(?:\\times|\\cdot|\*|[xX](?=\s*10\s*\^))\s*10\s*\^\s*(?:\{\s*([+-]?\d+)\s*\}|\(\s*([+-]?\d+)\s*\)|([+-]?\d+))"
)


def _repeating(match: re.Match[str]) -> str:
    """0.1666... with a bar over the 6 as the fraction it is."""
    whole, fixed, period = match.groups()
    numerator = int(whole + fixed + period) - int(whole + fixed or "0")
    return rf"\frac{{{numerator}}}{{{'9' * len(period)}{'0' * len(fixed)}}}"


@lru_cache(maxsize=16384)
def normalise(text: str) -> str:
    """The one spelling of an answer; a text that is no LaTeX comes back much as it is."""
    text = text.translate(_CHARACTERS)
    text = _SUPERSCRIPT.sub(lambda m: "^{" + m.group().translate(_SUPERSCRIPTS) + "}", text)
    text = _SUBSCRIPT.sub(lambda m: "_{" + m.group().translate(_SUBSCRIPTS) + "}", text)
    text = text.replace("**", "^") if re.search(r"\w\*\*[\w({-]", text) else text.replace("**", "")
    text = text.replace(r"\$", "\x00").replace("$", " ").replace("\x00", r"\$")
    text = text.replace(r"\(", " ").replace(r"\)", " ").replace(r"\[", " ").replace(r"\]", " ")
    text = _LEFT_DOT.sub(" ", text)
    text = _LAYOUT.sub(" ", text)
    text = text.replace("{,}", ",")
    # A thin space between digits groups them; others separate.
    text = re.sub(r"(?<=\d)\\[,!](?=\d{3}(?!\d))", "", text)
    text = re.sub(r",\s*\\!\s*", ",", text)
    text = _SPACING.sub(" ", text)
    text = _NUMPY.sub(r"\1", text)
    text = re.sub(r"\\langle(?![A-Za-z])", "(", re.sub(r"\\rangle(?![A-Za-z])", ")", text))
    text = re.sub(r"\\lbrace(?![A-Za-z])", r"\\{", text)
    text = re.sub(r"\\rbrace(?![A-Za-z])", r"\\}", text)
    text = re.sub(r"\\([A-Za-z]+)", _command, text)
    for _ in range(3):
        shorter = _STYLE.sub(r"\1", text)
        if shorter == text:
            break
        text = shorter
    text = _TEXT.sub(lambda m: r"\text{" + m.group(1) + "}", text)
    text = _FUNCTION_NAMES.sub(lambda m: "\\" + m.group(1) if len(m.group(1)) > 1 else m.group(1), text)
    text = re.sub(r"\\text\{\s*\}", " ", text)
    for _ in range(3):
        text = _OVER.sub(r"\\frac{\1}{\2}", text)
        text = _CHOOSE.sub(r"\\binom{\1}{\2}", text)
    text = _REPEATING.sub(_repeating, text)
    text = _BARE_SQRT.sub(r"\\sqrt{\1}", text)
    text = re.sub(r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = _CIRC.sub(r"^{\\circ}", text)
    text = re.sub(r"(?<!\\)%", r"\\%", text)
    text = _THOUSANDS_SPACE.sub(lambda m: m.group(1) + m.group(2).replace(" ", ""), text)
    text = _EXPONENT_MARK.sub(lambda m: "e" + (m.group(1) or m.group(2) or m.group(3)), text)
    text = " ".join(text.split())
    return _trim(text)


def _command(match: re.Match[str]) -> str:
    name = match.group(1)
    replaced = _COMMANDS.get(name, name)
    return replaced if replaced in "<>" else "\\" + replaced


def _trim(text: str) -> str:
    """Without full stops and marks at the end, and without braces around the whole."""
    while True:
        before = text
        text = text.strip().strip("`").strip()
        if text.endswith((".", ";", ",", ":", "!")) and not (
            text.endswith("!") and re.search(r"[\w)}]!$", text)
        ):
            text = text[:-1].rstrip("\\") if not text.endswith("\\.") else text[:-2]
        if text.startswith("{") and matching_bracket(text, 0) == len(text) - 1:
            text = text[1:-1]
        inner = re.match(r"\\(?:boxed|fbox|text)\s*\{", text)
        if inner and matching_bracket(text, inner.end() - 1) == len(text) - 1:
            text = text[inner.end() : -1]
        if text.startswith(("=", ":")):
            text = text[1:]
        if text == before:
            return text


_OPEN, _CLOSE = "([{", ")]}"


def matching_bracket(text: str, start: int) -> int:
    """Index of the bracket that closes the one at ``start``, of whatever kind; -1 without one."""
    depth = 0
    for index in range(start, len(text)):
        if text[index] in _OPEN:
            depth += 1
        elif text[index] in _CLOSE:
            depth -= 1
            if depth == 0:
                return index
    return -1


def split_top_level(text: str, separators: re.Pattern[str]) -> list[str]:
    """Cut a text at the separators that stand outside of all brackets.

    Half-open intervals close any bracket with any other, so kinds are not compared.
    """
    parts, depth, start, index = [], 0, 0, 0
    while index < len(text):
        char = text[index]
        if char in _OPEN:
            depth += 1
        elif char in _CLOSE:
            depth -= 1
        elif depth == 0 and (match := separators.match(text, index)):
            parts.append(text[start:index])
            start = index = match.end()
            continue
        if char == "\\" and depth >= 0 and index + 1 < len(text) and text[index + 1] not in _OPEN + _CLOSE:
            # A command is one word.
            word = re.compile(r"\\[A-Za-z]+|\\.", re.DOTALL).match(text, index)
            if word:
                index = word.end()
                continue
        index += 1
    parts.append(text[start:])
    return parts
