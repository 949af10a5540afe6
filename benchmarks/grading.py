#!/usr/bin/env python3
"""How fast the grader is, and how often it agrees with people: 10,000 pairs, hanging ones among them.

    python benchmarks/grading.py --output benchmarks/results/grading

The pairs: every response of tests/data's tables against its own answer and against answers of other rows, all
different, so that no cache helps more than within one table; and texts on which a computer algebra system
hangs. Graded by the reward `math` in worker processes, as in training. Agreement is that of the tables'
verdicts, written by hand; math-verify alone, on the same texts, stands beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from importlib import metadata
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from siren_megatron.evaluation.results import write_text  # noqa: E402
from siren_megatron.rewards.functions import RewardPool  # noqa: E402

TABLES = ("grading", "grading_held_out", "grading_held_out_2", "grading_held_out_3")
HANGING = (
    r"\boxed{9^{9^{9^{9^{9^9}}}}}",
    r"\boxed{\int_0^1 \int_0^1 \int_0^1 e^{xyz\sin(xyz)} dx dy dz}",
    r"\boxed{\sum_{n=1}^{10^{9}} \frac{1}{n^3+n+1}}",
    r"\boxed{(x+1)^{99999}(x-1)^{99999}}",
    r"\boxed{\prod_{n=1}^{10^{7}} \left(1+\frac{x}{n}\right)}",
    r"\boxed{\lim_{x\to 0} \frac{\sin^{50} x - \tan^{50} x}{x^{150}}}",
    r"\boxed{" + r"\frac{1}{1+" * 28 + "x" + "}" * 28 + "}",
    r"\boxed{\int \frac{\sqrt{\tan x}\, e^{x^2}}{\ln(1+\sin x)} dx}",
    r"\boxed{100000!!}",
    r"\boxed{" + "(" * 28 + "x" + "+1)^{7}" * 28 + "}",
)


def read_tables() -> dict[str, list[dict]]:
    tables = {}
    for name in TABLES:
        path = REPOSITORY / "tests" / "data" / f"{name}.jsonl"
        if path.is_file():
            tables[name] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return tables


def make_pairs(rows: list[dict], count: int, num_hanging: int, seed: int = 0) -> list[tuple[str, str]]:
    """`count` different pairs in random order, `num_hanging` of them from HANGING."""
    pairs = {(row["response"], row["answer"]): None for row in rows}
    shift = 1
    while len(pairs) < count - num_hanging:
        pairs |= {
            (row["response"], rows[(index + shift) % len(rows)]["answer"]): None
            for index, row in enumerate(rows)
        }
        shift += 1
    golds = ["x^2-1", "42", r"\frac{1}{2}", r"\int_0^1 f(x) dx", r"\sum_{n=1}^{\infty} \frac{1}{n^2}"]
    hanging = [(HANGING[i % len(HANGING)], golds[i // len(HANGING) % len(golds)]) for i in range(num_hanging)]
    mixed = list(pairs)[: count - num_hanging] + hanging
    random.Random(seed).shuffle(mixed)
    return mixed


def time_grading(pairs: list[tuple[str, str]], workers: int, limit: float) -> dict:
    started = time.perf_counter()
    with RewardPool("math", num_workers=workers, time_limit_s=limit) as pool:
        ready = time.perf_counter()
        result = pool.score(pairs)
        done = time.perf_counter()
    return {
        "pairs": len(pairs),
        "start_s": ready - started,
        "grading_s": done - ready,
        "gradings_per_s": len(pairs) / (done - ready),
        "right": sum(result.rewards),
        "timeouts": result.num_timeouts,
        "errors": result.num_errors,
    }


def agreement(rows: list[dict], verdicts: list[bool]) -> dict:
    wrong_true = sum(v and not r["correct"] for r, v in zip(rows, verdicts, strict=True))
    wrong_false = sum(not v and r["correct"] for r, v in zip(rows, verdicts, strict=True))
    total = len(rows)
    return {
        "pairs": total,
        "agreement": 1 - (wrong_true + wrong_false) / total,
        "wrongly_right": wrong_true,
        "wrongly_wrong": wrong_false,
    }


def grade_with_math_verify(response: str, answer: str) -> float:
    """math-verify as its documentation uses it. Its parser of plain text evaluates code: tables only."""
    from math_verify import parse, verify

    gold = parse(f"${answer}$", parsing_timeout=None)
    return float(verify(gold, parse(response, parsing_timeout=None), timeout_seconds=None))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=10_000)
    parser.add_argument("--hanging", type=int, default=50, help="pairs of them that hang a computer algebra")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--time-limit", type=float, default=5.0, help="seconds a pair, as --reward-time-limit"
    )
    parser.add_argument(
        "--peer-pairs", type=int, default=1000, help="pairs that math-verify alone is timed on"
    )
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    options = parser.parse_args()
    tables = read_tables()
    rows = [row for table in tables.values() for row in table]
    pairs = make_pairs(rows, options.pairs, options.hanging)
    plain = make_pairs(rows, options.pairs, 0)[: options.peer_pairs]
    results = {
        "hardware": f"{os.cpu_count()} CPU cores, AMD EPYC, no GPU",
        "date": time.strftime("%Y-%m-%d"),
        "versions": {name: metadata.version(name) for name in ("math-verify", "sympy")},
        "options": {
            "workers": options.workers,
            "time_limit_s": options.time_limit,
            "hanging": options.hanging,
        },
        "all": time_grading(pairs, options.workers, options.time_limit),
        "without_hanging": time_grading(
            make_pairs(rows, options.pairs, 0), options.workers, options.time_limit
        ),
        "agreement": {},
    }
    peer = f"{Path(__file__).resolve()}:grade_with_math_verify"
    with RewardPool(peer, num_workers=options.workers, time_limit_s=options.time_limit) as pool:
        pool.score(plain[:50])  # imports
        started = time.perf_counter()
        pool.score(plain)
        results["math_verify_alone"] = {
            "pairs": len(plain),
            "gradings_per_s": len(plain) / (time.perf_counter() - started),
        }
        for name, table in tables.items():
            texts = [(row["response"], row["answer"]) for row in table]
            alone = [reward == 1 for reward in pool.score(texts).rewards]
            with RewardPool("math", num_workers=options.workers) as ours:
                verdicts = [reward == 1 for reward in ours.score(texts).rewards]
            results["agreement"][name] = {
                "siren_megatron": agreement(table, verdicts),
                "math_verify_alone": agreement(table, alone),
            }
    print(json.dumps(results, indent=2))
    if options.output is not None:
        write_text(options.output.with_suffix(".json"), json.dumps(results, indent=2) + "\n")
        write_text(options.output.with_suffix(".md"), markdown(results))


def markdown(results: dict) -> str:
    every, alone = results["all"], results["math_verify_alone"]
    lines = [
        "# Grading: speed and agreement",
        "",
        f"{results['hardware']}; {results['date']}; math-verify {results['versions']['math-verify']}, "
        f"sympy {results['versions']['sympy']}; {results['options']['workers']} workers, time limit "
        f"{results['options']['time_limit_s']:g} s.",
        "",
        "| | pairs | seconds | gradings/s | time-outs |",
        "|---|---|---|---|---|",
    ]
    for label, row in (
        (f"with {results['options']['hanging']} hanging pairs", every),
        ("without", results["without_hanging"]),
    ):
        lines.append(
            f"| {label} | {row['pairs']} | {row['grading_s']:.1f} | {row['gradings_per_s']:.0f} "
            f"| {row['timeouts']} |"
        )
    lines += [
        f"| math-verify for every pair, none hanging | {alone['pairs']} "
        f"| {alone['pairs'] / alone['gradings_per_s']:.1f} | {alone['gradings_per_s']:.0f} | |",
        "",
        "Agreement with the tables' verdicts, written by hand; what disagreed at first was mended since",
        "(docs/evaluation.md):",
        "",
        "| table | pairs | this grader | wrongly right | wrongly wrong | math-verify alone |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in results["agreement"].items():
        ours, theirs = row["siren_megatron"], row["math_verify_alone"]
        lines.append(
            f"| {name} | {ours['pairs']} | {ours['agreement']:.1%} | {ours['wrongly_right']} "
            f"| {ours['wrongly_wrong']} | {theirs['agreement']:.1%} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
