#!/usr/bin/env python3
"""Draw the curves of one or more runs as an SVG file that follows the viewer's light or dark scheme.

  python tools/plot_run.py runs/siren-cpu/metrics.jsonl --output run.svg
  python tools/plot_run.py runs/a/metrics.jsonl runs/b/metrics.jsonl --labels GRPO SIREN --output both.svg

Faint: each step; bold: the mean of the last few steps, where a run has 20 or more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from siren_megatron.charts import Chart, Series, figure  # noqa: E402
from siren_megatron.metrics import read_metrics  # noqa: E402

TITLES = {
    "reward": "Mean reward",
    "siren/entropy_masked": "Masked entropy (nats)",
    "entropy": "Entropy (nats)",
    "response_length": "Response length (tokens)",
}
ANCHOR = "siren/entropy_anchor"


def draw_runs(
    runs: Sequence[tuple[str, list[dict]]], metrics: Sequence[str] = tuple(TITLES), columns: int = 2
) -> str:
    """An SVG document with one chart a metric and one curve a run.

    Args:
        runs: (label, rows as `read_metrics` returns them) of each run.
        metrics: the metrics to draw; one that no run has is left out. With a single run, the anchor stands
            beside the masked entropy.
        columns: charts side by side.

    Raises:
        ValueError: no run has any of the metrics.
    """

    def curve(label: str, rows: list[dict], metric: str, **style: bool) -> Series:
        points = [(row["step"], row[metric]) for row in rows if metric in row]
        return Series(label, [step for step, _ in points], [value for _, value in points], **style)

    charts = []
    for metric in metrics:
        series = [curve(label, rows, metric, smooth=True) for label, rows in runs]
        if len(runs) == 1 and metric == "siren/entropy_masked":
            series = [curve("masked", runs[0][1], metric, smooth=True)]
            series.append(curve("anchor", runs[0][1], ANCHOR, dashed=True))
        series = [one for one in series if one.values]
        if series:
            charts.append(Chart(TITLES.get(metric, metric), tuple(series)))
    if not charts:
        raise ValueError(f"none of {', '.join(metrics)} is in the given runs")
    return figure(charts, columns=min(columns, len(charts)))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("runs", nargs="+", metavar="METRICS.jsonl", type=Path, help="metrics of a run")
    parser.add_argument("--output", required=True, type=Path, help="SVG file to write")
    parser.add_argument("--labels", nargs="+", help="name of each run; default: its directory's name")
    parser.add_argument("--metrics", nargs="+", default=list(TITLES), help="default: %(default)s")
    parser.add_argument("--columns", type=int, default=2, help="charts side by side; default: %(default)s")
    args = parser.parse_args(argv)
    labels = args.labels or [path.absolute().parent.name for path in args.runs]
    try:
        if len(labels) != len(args.runs):
            raise ValueError(f"--labels has {len(labels)} names for {len(args.runs)} runs")
        if args.output.suffix != ".svg":
            raise ValueError(f"--output {args.output}: must end in .svg")
        if args.columns < 1:
            raise ValueError(f"--columns must be at least 1, got {args.columns}")
        runs = [(label, read_metrics(path)) for label, path in zip(labels, args.runs, strict=True)]
        svg = draw_runs(runs, args.metrics, args.columns)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(svg, encoding="utf-8")
    except (OSError, ValueError) as error:
        print(f"plot_run.py: error: {error}", file=sys.stderr)
        return 2
    print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
