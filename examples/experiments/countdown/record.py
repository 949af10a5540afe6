"""What the analysis needs of one finished run, in one small file: a few numbers a prompt, and the curves.

Legend: P = held-out prompts, n = responses to each of them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from siren_megatron.evaluation.passk import ks_to_show, majority_at_k, pass_at_k
from siren_megatron.evaluation.results import write_text
from siren_megatron.metrics import read_metrics

MAJORITY_K = 32
CURVES = ("reward", "entropy", "siren/entropy_masked", "response_length")
"""Recorded at every step; evaluations (`eval/...`) wherever they were made."""


def path_of(results: Path, method: str, seed: int) -> Path:
    """Where a run's record lies; a run is finished when it is there."""
    return results / "records" / f"{method}-seed{seed}.json"


def write_record(path: Path, *, graded: Path, metrics: Path, about: dict[str, Any]) -> None:
    """Make a run's record.

    Args:
        graded: JSONL of the final evaluation, a row a prompt.
        metrics: metrics.jsonl of the training.
        about: what else is worth keeping: options, versions, hardware.
    """
    correct, distinct, majority = [], [], []
    for line in graded.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        verdicts = dict(zip(row["groups"], row["correct"], strict=True))  # of a group all are alike
        sizes = Counter(row["groups"])
        clusters = [(size, verdicts[group]) for group, size in sizes.items()]
        n = len(row["correct"])
        correct.append(sum(row["correct"]))
        distinct.append(sum(verdicts.values()))
        majority.append(round(majority_at_k(clusters, min(n, MAJORITY_K)), 5))
    curves: dict[str, list[list[float]]] = {}
    for row in read_metrics(metrics):
        for name, value in row.items():
            # The last evaluation is `graded`, prompt by prompt.
            evaluated = name.startswith("eval/") and "-last/" not in name
            if (name in CURVES or evaluated) and isinstance(value, int | float):
                curves.setdefault(name, []).append([row["step"], float(f"{value:.5g}")])
    record = {
        **about,
        "samples": n,
        "correct": correct,
        "distinct_correct": distinct,
        f"maj@{MAJORITY_K}": majority,
        "curves": curves,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(record, separators=(",", ":")) + "\n")


def per_prompt(record: dict[str, Any]) -> dict[str, np.ndarray]:
    """Metric -> one number a prompt [P], of a record.

    avg is the share of right responses, maj the expected vote of MAJORITY_K of them (of all, where there are
    fewer), pass@k Chen et al.'s estimator, distinct correct the number of different right responses.
    """
    n, correct = record["samples"], record["correct"]
    values: dict[str, Sequence[float]] = {
        "avg": [c / n for c in correct],
        f"maj@{MAJORITY_K}": record[f"maj@{MAJORITY_K}"],
    }
    values |= {f"pass@{k}": [pass_at_k(n, c, k) for c in correct] for k in ks_to_show(n)[1:]}
    values["distinct correct"] = record["distinct_correct"]
    return {name: np.array(column, dtype=float) for name, column in values.items()}
