#!/usr/bin/env python3
"""Is SIREN more than GRPO sampled at a higher temperature? Measured on the experiment's trained policies.

  python examples/experiments/countdown/temperatures.py --setting full      # after run.py, with its options

A policy of more entropy finds more and errs more, and so does any policy at a higher temperature. So GRPO's
and SIREN's policies are sampled at several temperatures, and SIREN's pass@k is compared with GRPO's at the
temperature that gives GRPO the same avg (between two temperatures linearly). Writes temperatures.md and
temperatures.svg into --results.

Legend: S = seeds, P = prompts, n = responses to each of them.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[2]), str(HERE)]

from analyse import row, rule, show, show_difference  # noqa: E402
from bootstrap import bootstrap  # noqa: E402
from matrix import BASELINE, SIREN  # noqa: E402
from policies import START, Policies, load, parse_policies  # noqa: E402

from siren_megatron.charts import Chart, Series, figure  # noqa: E402
from siren_megatron.evaluation.passk import majority_at_k, pass_at_k  # noqa: E402
from siren_megatron.evaluation.results import write_text  # noqa: E402
from siren_megatron.rewards.countdown import END_OF_TEXT  # noqa: E402
from siren_megatron.toy_model import sample  # noqa: E402

TEMPERATURES = (0.6, 0.8, 1.0, 1.2, 1.4)
METHODS = (BASELINE, SIREN, "siren-0.5")

Values = dict[str, np.ndarray]
"""Metric -> one number a seed and prompt [S, P]."""


def measure(policies: Policies, directory: Path, temperature: float) -> dict[str, list[float]]:
    """avg, maj, pass@k and distinct right responses of each prompt, of one policy."""
    model, tokenizer = load(directory)
    task, n = policies.task, policies.samples
    prompts = [prompt for prompt in policies.prompts for _ in range(n)]
    tokens = sample(model, tokenizer, task, prompts, seed=0, temperature=temperature)
    texts = [_finished(text) for text in tokenizer.batch_decode(tokens)]
    found: dict[str, list[float]] = {}
    for start, prompt in zip(range(0, len(prompts), n), policies.prompts, strict=True):
        instance = task.parse_instance(prompt)
        counts = Counter(texts[start : start + n])
        groups = [(size, task.verify(text, instance)) for text, size in counts.items()]
        right = sum(size for size, correct in groups if correct)
        for name, value in {
            "avg": right / n,
            f"maj@{n}": majority_at_k(groups, n),
            "distinct correct": sum(correct for _, correct in groups),
            f"pass@{n // 2}": pass_at_k(n, right, n // 2),
        }.items():
            found.setdefault(name, []).append(value)
    return found


def _finished(text: str) -> str:
    """A response up to its end of sequence; one without is no right response, whatever it says."""
    response, end, _ = text.partition(END_OF_TEXT)
    return response if end else f"{response} ..."


def at_equal_avg(values: Values, baseline: Mapping[float, Values]) -> tuple[float, Values] | None:
    """The baseline at the temperature that gives it the mean avg of `values`: the temperature and its values.

    Between two temperatures everything is linear. None where `values` lie outside of what they span.
    """
    wanted = values["avg"].mean()
    for low, high in zip(sorted(baseline), sorted(baseline)[1:], strict=False):
        ends = baseline[low]["avg"].mean(), baseline[high]["avg"].mean()
        if min(ends) <= wanted <= max(ends) and ends[0] != ends[1]:
            share = (wanted - ends[0]) / (ends[1] - ends[0])
            mixed = {
                name: (1 - share) * baseline[low][name] + share * baseline[high][name] for name in values
            }
            return low + share * (high - low), mixed
    return None


def table(measured: Mapping[str, Mapping[float, Values]]) -> str:
    """Markdown: a row for each method and temperature, then the comparisons at equal avg."""
    names = list(next(iter(measured[BASELINE].values())))
    head = ["method", "seeds", "temperature", *names]
    lines = [row(head), rule(head)]
    for method, by_temperature in measured.items():
        for temperature, values in by_temperature.items():
            cells = [show(bootstrap(values[name])) for name in names]
            lines.append(row([method, str(len(values["avg"])), f"{temperature:g}", *cells]))
    head = ["method", "temperature", f"{BASELINE} at", *names[1:]]
    lines += ["", f"## Difference to {BASELINE} at the temperature of equal avg", "", row(head), rule(head)]
    for method, by_temperature in measured.items():
        for temperature, values in by_temperature.items():
            if method in (START, BASELINE) or (equal := at_equal_avg(values, measured[BASELINE])) is None:
                continue
            cells = [show_difference(values[name] - equal[1][name]) for name in names[1:]]
            lines.append(row([method, f"{temperature:g}", f"{equal[0]:.2f}", *cells]))
    lines += ["", "[low, high]: 95% bootstrap over prompts and seeds. Bold: the interval does not hold 0."]
    return "\n".join(lines) + "\n"


def chart(measured: Mapping[str, Mapping[float, Values]]) -> str:
    """pass@k over avg, a point for each temperature, of the trained policies."""
    name = list(next(iter(measured[BASELINE].values())))[-1]
    series = []
    for method, by_temperature in measured.items():
        if method == START:
            continue
        points = sorted((float(v["avg"].mean()), float(v[name].mean())) for v in by_temperature.values())
        series.append(Series(method, [x for x, _ in points], [y for _, y in points]))
    title = f"{name} over avg, temperatures {TEMPERATURES[0]:g} to {TEMPERATURES[-1]:g}"
    return figure([Chart(title, tuple(series), x_label="avg")], columns=1)


def main(argv: Sequence[str] | None = None) -> int:
    policies = parse_policies(__doc__, argv, samples=64, methods=METHODS)
    if BASELINE not in policies.directories:
        print(f"temperatures.py: error: no policy of {BASELINE}", file=sys.stderr)
        return 2
    seeds = set.intersection(*(set(of) for of in policies.directories.values()))
    sampled = {START: [policies.start]} | {
        method: [of[seed] for seed in sorted(seeds)] for method, of in policies.directories.items()
    }
    measured: dict[str, dict[float, Values]] = {}
    for method, directories in sampled.items():
        for temperature in TEMPERATURES:
            runs = [measure(policies, directory, temperature) for directory in directories]
            measured.setdefault(method, {})[temperature] = {
                name: np.array([run[name] for run in runs]) for name in runs[0]
            }
            print(f"{method} at temperature {temperature:g}: {len(runs)} policies", flush=True)
    print(write_text(policies.results / "temperatures.md", table(measured)))
    print(write_text(policies.results / "temperatures.svg", chart(measured)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
