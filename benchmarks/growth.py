"""How a training step's time and memory grow with tokens, vocabulary and ranks, beside the expected law.

    python benchmarks/growth.py --figure docs/figures/growth.svg

tokens x1 to x16: time is a constant plus a slope, memory flat (micro-batches stay the same). Vocabulary: both
are lines whose slope is the output head's. Ranks 1 to 4 (tensor-parallel, a thread each): time falls as the
cores allow, memory of all ranks is the states once and each process's own libraries.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from pathlib import Path

from training import Work, sides, step_seconds

from siren_megatron.charts import Chart, Series, figure

BASE = Work("base", hidden=256, layers=4, vocab=16_000, responses=4, options={"micro_batch_size": 4})
SWEEPS = {
    "tokens": [(4 * k * 144, replace(BASE, name=f"x{k}", responses=4 * k)) for k in (1, 2, 4, 8, 16)],
    "vocabulary": [
        (vocab, replace(BASE, name=f"V={vocab}", vocab=vocab)) for vocab in (1_000, 16_000, 64_000, 256_000)
    ],
    "ranks": [
        (
            ranks,
            replace(
                BASE,
                name=f"TP={ranks}",
                hidden=512,
                ranks=ranks,
                threads=1,
                options={**BASE.options, "tensor_model_parallel_size": ranks},
            ),
        )
        for ranks in (1, 2, 4)
    ],
}


def flops(work: Work) -> float:
    """Of the step's matrix products: forward in the log-prob pass; forward and twice that in the update."""
    layer = 12 * work.hidden**2 * work.layers * work.total_tokens
    head = work.hidden * work.vocab * work.responses * work.tokens
    return 4 * 2.0 * (layer + head)


def expected(sweep: str, works: list[Work], seconds: list[float], cores: int) -> list[float]:
    """The law: a constant for each step and the products' operations at one speed; tensor ranks share them.

    Both numbers are least squares of the measured seconds; of ranks the first one is the law's scale.
    """
    if sweep == "ranks":
        return [seconds[0] / min(work.ranks, cores) for work in works]
    x, n = [flops(work) for work in works], len(works)
    mean_x, mean_y = sum(x) / n, sum(seconds) / n
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, seconds, strict=True))
    slope /= sum((a - mean_x) ** 2 for a in x)
    return [mean_y + slope * (a - mean_x) for a in x]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cores", type=int, default=2, help="of this machine, for the law of ranks")
    parser.add_argument("--figure", type=Path, help="write the curves here as SVG")
    args = parser.parse_args()
    charts = []
    for sweep in args.sweeps:
        values, works = zip(*SWEEPS[sweep], strict=True)
        seconds, peaks = [], []
        for work in works:
            with sides([work]) as (side,):
                side.turn()
                turns = [side.turn() for _ in range(args.rounds)]
                peaks.append(side.turn(memory=True).peak_bytes / 2**30)
            seconds.append(statistics.median(map(step_seconds, turns)))
        law = expected(sweep, list(works), seconds, args.cores)
        print(f"\n| {sweep} | GFLOP | s | expected s | measured / expected | peak GiB |")
        print("|---|---|---|---|---|---|")
        for value, work, time, wanted, peak in zip(values, works, seconds, law, peaks, strict=True):
            print(
                f"| {value:,} | {flops(work) / 1e9:.0f} | {time:.2f} | {wanted:.2f} | {time / wanted:.2f} |"
                f" {peak:.2f} |",
                flush=True,
            )
        charts.append(
            Chart(
                f"Seconds against {sweep}",
                (Series("measured", values, seconds), Series("expected", values, law, dashed=True)),
            )
        )
        charts.append(Chart(f"Peak GiB against {sweep}", (Series("peak GiB", values, peaks),)))
    if args.figure:
        # The charts' axis is named for training steps.
        args.figure.write_text(figure(charts).replace(">step<", "><"))


if __name__ == "__main__":
    main()
