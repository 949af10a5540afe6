#!/usr/bin/env python3
"""Draw the report of a run anew, or several runs in one page: curves, last metrics, options that differ.

  python tools/report.py runs/siren-cpu                               # runs/siren-cpu/report.html
  python tools/report.py runs/grpo runs/siren --output both.html
  python tools/report.py runs/a runs/b --labels GRPO SIREN --output both.html

A RUN is the --save directory of a run. The page is one file that needs no network.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from siren_megatron.metrics import read_metrics  # noqa: E402
from siren_megatron.report import (  # noqa: E402
    RECORD_NAME,
    read_records,
    read_run,
    read_timelines,
    render_report,
    write_text,
)
from siren_megatron.report.comparison import MAX_RUNS, Run, render_comparison  # noqa: E402
from siren_megatron.report.records import MAX_BYTES  # noqa: E402


def one_report(directory: Path) -> str:
    """The page of one run, from its files alone. Raises FileNotFoundError, ValueError."""
    rows, run = read_metrics(directory / "metrics.jsonl"), read_run(directory)
    return render_report(
        rows,
        config=run.get("config", {}),
        status=run.get("status", "unknown"),
        paths={"run": str(directory.absolute()), "metrics": str(directory.absolute() / "metrics.jsonl")},
        num_steps=run.get("num_steps", rows[-1]["step"] if rows else 0),
        records=read_records(directory / RECORD_NAME),
        timelines=read_timelines(directory),
        found_versions=run.get("versions", {}),
    )


def comparison(directories: Sequence[Path], labels: Sequence[str]) -> str:
    """The page of several runs. Raises FileNotFoundError, ValueError."""
    runs = []
    for directory, label in zip(directories, labels, strict=True):
        rows, run = read_metrics(directory / "metrics.jsonl"), read_run(directory)
        records = read_records(directory / RECORD_NAME, MAX_BYTES // len(directories))
        runs.append(Run(label, rows, run.get("config", {}), run.get("status"), records))
    return render_comparison(runs)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", type=Path, help=f"directory of a run; 1 to {MAX_RUNS}"
    )
    parser.add_argument("--output", type=Path, help="file to write; default for one run: RUN/report.html")
    parser.add_argument("--labels", nargs="+", help="name of each run; default: its directory's name")
    args = parser.parse_args(argv)
    several = len(args.runs) > 1
    labels = args.labels or [path.absolute().name for path in args.runs]
    output = args.output or args.runs[0] / "report.html"
    try:
        if len(labels) != len(args.runs):
            raise ValueError(f"--labels has {len(labels)} names for {len(args.runs)} runs")
        if args.labels and not several:
            raise ValueError("--labels needs several runs")
        if several and args.output is None:
            raise ValueError("--output is needed with several runs")
        if output.suffix != ".html":
            raise ValueError(f"--output {output}: must end in .html")
        for path in args.runs:
            if not (path / "metrics.jsonl").is_file():
                raise ValueError(f"{path}: not the directory of a run (no metrics.jsonl in it)")
        text = comparison(args.runs, labels) if several else one_report(args.runs[0])
        output.parent.mkdir(parents=True, exist_ok=True)
        write_text(output, text)
    except (OSError, ValueError) as error:
        print(f"report.py: error: {error}", file=sys.stderr)
        return 2
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
