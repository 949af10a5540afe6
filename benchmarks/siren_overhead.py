"""What SIREN costs over GRPO in the trainer: time and memory with and without the entropy term.

    python benchmarks/siren_overhead.py                    # a vocabulary of 151,936, three model sizes

Both trainers live side by side and take turns; medians of the rounds' ratios, so that what else happens on
the machine happens to both. "Without" is --entropy-method none with --entropy-top-p 1: no nucleus is looked
for anywhere. Slow rows are those of the update whose nucleus is too large for the fast path. Exit code 0
where SIREN costs at most 3% of the step's time and 5% of its peak memory, at every size.
"""

from __future__ import annotations

import argparse
import statistics

from training import Work, sides, step_seconds

TIME_GOAL, MEMORY_GOAL = 3.0, 5.0
SIZES = {"small": (256, 4), "medium": (512, 8), "large": (896, 12)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--responses", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--logit-std",
        type=float,
        default=6.0,
        help="of the random policies; 1 = flat distributions, a nucleus of most of the vocabulary",
    )
    args = parser.parse_args()
    print(
        f"{'hidden x layers':18}{'entropy':>9}{'slow rows':>11}{'GRPO s':>9}{'SIREN s':>9}{'time':>9}"
        f"{'GRPO GiB':>10}{'memory':>9}"
    )
    costs = []
    for size in args.sizes:
        hidden, layers = SIZES[size]
        shared = dict(hidden=hidden, layers=layers, vocab=args.vocab, logit_std=args.logit_std)
        shared |= dict(responses=args.responses, tokens=args.tokens)
        micro = {"micro_batch_size": args.micro_batch_size}
        without = Work("GRPO", **shared, options={"entropy_method": "none", "entropy_top_p": 1.0, **micro})
        with_siren = Work("SIREN", **shared, options=micro)
        with sides([without, with_siren]) as (grpo, siren):
            grpo.turn(), siren.turn()  # warm-up; Adam makes its states
            pairs = []
            for number in range(args.rounds):
                # Who goes first takes turns, too.
                first, second = (grpo, siren) if number % 2 == 0 else (siren, grpo)
                one, other = first.turn(), second.turn()
                pairs.append((one, other) if number % 2 == 0 else (other, one))
            peaks = [max(side.turn(memory=True).peak_bytes for _ in range(3)) for side in (grpo, siren)]
        seconds = [[step_seconds(turn) for turn in pair] for pair in pairs]
        time_percent = 100 * statistics.median(b / a - 1 for a, b in seconds)
        memory_percent = 100 * (peaks[1] / peaks[0] - 1)
        costs.append((time_percent, memory_percent))
        report = pairs[-1][1].report
        medians = [statistics.median(pair[side] for pair in seconds) for side in (0, 1)]
        print(
            f"{f'{hidden} x {layers}':18}{report['entropy']:9.2f}{report['fallback_rows']:11.0f}"
            f"{medians[0]:9.2f}{medians[1]:9.2f}{time_percent:8.1f}%"
            f"{peaks[0] / 2**30:10.2f}{memory_percent:8.1f}%",
            flush=True,
        )
    worst_time, worst_memory = max(t for t, _ in costs), max(m for _, m in costs)
    print(f"siren_overhead_percent={worst_time:.1f} siren_memory_percent={worst_memory:.1f}")
    return 0 if worst_time <= TIME_GOAL and worst_memory <= MEMORY_GOAL else 1


if __name__ == "__main__":
    raise SystemExit(main())
