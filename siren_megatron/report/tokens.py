"""The report's part about single tokens: what SIREN's two masks select."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from siren_megatron.charts import format_value
from siren_megatron.report.records import TOP_TOKENS

SELECTION_HTML = """
<section id="selection" class="full" hidden><h2>What SIREN selects</h2>
<p>The <b>top-p mask</b> leaves only the likeliest tokens of the vocabulary in the entropy; the <b>peak
mask</b> leaves only the positions of a response where that entropy is above the response's quantile. Switch
them on and off: with both on, what is coloured is what SIREN regularises. All of it is of the policy that
sampled the responses, before the step's update.</p>
<div class="controls card" role="group" aria-label="What to show">
<label>Step <select id="record"></select></label>
<label class="switch"><input type="checkbox" role="switch" id="top-p" checked>
<span>Top-p mask <span class="muted" id="p0"></span></span></label>
<label class="switch"><input type="checkbox" role="switch" id="peak" checked>
<span>Peak mask <span class="muted" id="quantile"></span></span></label>
<span class="scale muted">0 <span></span> {scale} nats</span>
</div>
<p id="summary" role="status" aria-live="polite"></p>
<h3 id="by-position">Entropy by position</h3>
<div class="card" id="positions"></div>
<details><summary>The same as a table</summary>
<div class="card wide"><table class="numbers" id="positions-table"></table></div></details>
<div id="often"></div>
<h3 id="responses-title">Prompts and responses, token by token</h3>
<p>Point at a token, or reach a response with the tab key and go through it with the arrow keys: its
entropies, its nucleus and the likeliest tokens there.</p>
<div id="responses"></div>
</section>
<noscript><p>The responses token by token need JavaScript; everything else is here without it.</p></noscript>
"""


def selection(records: Sequence[tuple[str, Mapping[str, Any]]], first: int = 0) -> tuple[str, dict[str, Any]]:
    """The section and its data; nothing of both where there are no records.

    Args:
        records: (how the step is named in the list, record of tokens.jsonl).
        first: which one is shown first.
    """
    if not records:
        return "", {}
    scale = color_scale([record for _, record in records])
    data: dict[str, Any] = {
        "records": {
            "scale": scale,
            "top_tokens": TOP_TOKENS,
            "first": first,
            "list": [name for name, _ in records],
        }
    }
    data.update((f"record-{index}", record) for index, (_, record) in enumerate(records))
    return SELECTION_HTML.format(scale=format_value(scale)), data


def color_scale(records: Sequence[Mapping[str, Any]]) -> float:
    """Entropy of the strongest colour, in nats: the same for all steps, so that a collapse can be seen.

    The 99th percentile of the recorded entropies, with two digits; 0.1 at least.
    """
    values = sorted(
        value
        for record in records
        for prompt in record["prompts"]
        for response in prompt["responses"]
        for value in response["entropy"]
        if value is not None
    )
    if not values:
        return 0.1
    return float(f"{max(0.1, values[math.ceil(0.99 * len(values)) - 1]):.2g}")
