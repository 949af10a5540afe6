"""Peak memory of a training step against vocabulary, sequence length and micro-batch: logits kept, or fused.

    python benchmarks/memory.py

Each cell is a fresh process that does one step of warm-up and one that is measured, with --fused-linear off,
on and auto. "logits" is their size for one micro-batch's response tokens, "states" that of weights, gradients
and optimizer, which every cell holds.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from training import Work, sides, step_seconds

BASE = Work("base", hidden=256, layers=4, vocab=32_000, responses=8, tokens=256)
MICRO_BATCH = 4
SWEEPS = {
    "vocabulary": [("vocab", value) for value in (8_000, 32_000, 128_000)],
    "response tokens": [("tokens", value) for value in (128, 512, 1024)],
    "micro-batch": [("micro_batch_size", value) for value in (1, 2, 8)],
}


def cell(name: str, value: int, fused: str) -> Work:
    options = {"micro_batch_size": MICRO_BATCH, "fused_linear": fused}
    if name in options:
        return replace(BASE, name=fused, options={**options, name: value})
    return replace(BASE, name=fused, options=options, **{name: value})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    args = parser.parse_args()
    print("| | logits MiB | states MiB | kept MiB | fused MiB | auto MiB | kept s | fused s | auto s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for title in args.sweeps:
        for name, value in SWEEPS[title]:
            peaks, seconds = [], []
            for fused in ("off", "on", "auto"):
                work = cell(name, value, fused)
                with sides([work]) as (side,):
                    side.turn()
                    seconds.append(step_seconds(side.turn()))
                    peaks.append(side.turn(memory=True).peak_bytes / 2**20)
            rows = work.options["micro_batch_size"] * work.tokens
            logits = rows * work.vocab * 4 / 2**20
            layer = work.hidden**2 * 12  # queries, keys, values, output: 3 h^2; gate, up and down: 9 h^2
            states = 16 * (work.vocab * work.hidden + work.layers * layer) / 2**20
            cells = "".join(f" {number:.0f} |" for number in (logits, states, *peaks))
            cells += "".join(f" {number:.2f} |" for number in seconds)
            print(f"| {title} {value:,} |{cells}", flush=True)


if __name__ == "__main__":
    main()
