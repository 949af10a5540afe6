"""A report's HTML: one document without any request, and with no markup but its own."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from siren_megatron.charts import CHART_CSS, THEME_CSS, Chart, render
from siren_megatron.report.curves import hover_data

ASSETS = Path(__file__).parent / "assets"
LEVELS = 10  # of a token's colour; tokens.js has the same number


def asset(name: str) -> str:
    """The text of a file of the page."""
    return (ASSETS / name).read_text(encoding="utf-8")


def _level_css() -> str:
    """Colours of the tokens: one rule a level and state of the switches, so that a switch is one class."""
    rules = []
    for n in range(1, LEVELS + 1):
        states = (
            f".full:not(.peaks) .e{n}",
            f".top-p:not(.peaks) .p{n}",
            f".full.peaks .f.e{n}",
            f".top-p.peaks .k.p{n}",
        )
        mix = f"color-mix(in srgb, var(--heat) {100 * n // LEVELS}%, transparent)"
        rules.append(f"{', '.join(states)} {{ background: {mix}; }}")
    chosen = ".full.peaks .f, .top-p.peaks .k"
    edge = "box-shadow: inset 0 -2px var(--peak), inset 1px 0 var(--card)"
    rules.append(f"{chosen} {{ color: var(--ink); font-weight: 600; {edge}; }}")
    return "\n".join(rules) + "\n"


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


def document(title: str, body: str, data: Mapping[str, Any], scripts: Sequence[str]) -> str:
    """The whole page.

    Args:
        title: plain text.
        body: markup of `<main>`.
        data: name -> value that the scripts read as JSON.
        scripts: names of the assets to run, in their order.

    Its Content-Security-Policy lets nothing run but these scripts, by their hash, and nothing be fetched.
    """
    style = THEME_CSS + CHART_CSS + asset("page.css") + _level_css()
    script = "".join(map(asset, scripts))
    policy = "; ".join(
        (
            "default-src 'none'",
            f"style-src {_hash(style)}",
            f"script-src {_hash(script)}",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
    blocks = "".join(
        f'<script type="application/json" id="data-{escape(key)}">{json_text(value)}</script>\n'
        for key, value in data.items()
    )
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{escape(policy, quote=False)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)} · siren-megatron</title>
<style>{style}</style></head>
<body><main>
{body}
</main>
<div id="tip"></div><p id="said" class="hidden" role="status"></p>
{blocks}<script>{script}</script>
</body></html>
"""


def json_text(value: Any) -> str:
    """JSON in ASCII that cannot end its `<script>` element, nor open a comment in it."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def sections_html(sections: Sequence[tuple[str, Sequence[Chart]]]) -> str:
    """The charts as cards under their headings."""
    body, index = [], 0
    for title, charts in sections:
        cards = []
        for chart in charts:
            attributes = f'data-chart="{index}" tabindex="0" '
            cards.append(f'<div class="card">{render(chart, attributes)}</div>')
            index += 1
        body.append(f'<section><h3>{escape(title)}</h3><div class="grid">{"".join(cards)}</div></section>')
    return "".join(body)


def curves_data(sections: Sequence[tuple[str, Sequence[Chart]]]) -> list[dict[str, Any]]:
    """`hover_data` of all the charts, in the order of their numbers in `sections_html`."""
    return hover_data([chart for _, charts in sections for chart in charts])


def table(
    heads: Sequence[str], rows: Sequence[Sequence[Any]], *, classes: str = "", caption: str = ""
) -> str:
    """A table in a card; the first cell of a row is its heading. All of it plain text.

    Args:
        heads: column headings; none = no heading row.
        rows: cells; the first names its row.
        classes: "numbers" sets the cells to the right.
        caption: for screen readers.
    """
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    lines = []
    for first, *cells in rows:
        rest = "".join(f'<td class="value-cell">{escape(str(cell))}</td>' for cell in cells)
        lines.append(f'<tr><th scope="row">{escape(str(first))}</th>{rest}</tr>')
    return (
        f'<div class="card wide"><table class="{classes}">'
        + (f'<caption class="hidden">{escape(caption)}</caption>' if caption else "")
        + (f"<thead><tr>{head}</tr></thead>" if heads else "")
        + f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def pairs_table(pairs: Mapping[str, Any]) -> str:
    """Names and values."""
    return table((), list(pairs.items()), classes="pairs")


def navigation(targets: Mapping[str, str]) -> str:
    """Links to parts of the page: id -> text."""
    links = "".join(f'<a href="#{key}">{escape(text)}</a>' for key, text in targets.items())
    return f'<nav aria-label="Parts of the report">{links}</nav>'
