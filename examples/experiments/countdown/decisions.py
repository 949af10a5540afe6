#!/usr/bin/env python3
"""Do SIREN's masks choose where decisions are made? Measured on the experiment's trained policies.

  python examples/experiments/countdown/decisions.py --setting full      # after run.py, with its options

Both tasks are small enough to know every well-formed response: right for some target. A token is
legal where a well-formed response goes on with it. A position is a decision where several tokens are legal
(which number, which operator, which move), and forced where only one is (an equals sign, a result). Responses
are sampled at temperature 1 and counted up to their first illegal token. Writes decisions.md into --results.

Legend: B = responses, P = tokens of a prompt, R = tokens of a response, V = vocabulary.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import permutations
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[2]), str(HERE)]

from analyse import row, rule  # noqa: E402
from policies import START, load, parse_policies  # noqa: E402

from siren_megatron.config import option_defaults  # noqa: E402
from siren_megatron.evaluation.results import write_text  # noqa: E402
from siren_megatron.rewards import countdown  # noqa: E402
from siren_megatron.siren import peak_entropy_mask  # noqa: E402
from siren_megatron.toy_model import sample  # noqa: E402
from siren_megatron.vocab_parallel import top_p_mask, vocab_parallel_token_stats  # noqa: E402

TOP_P, QUANTILE = (option_defaults()[name] for name in ("entropy_top_p", "siren_peak_quantile"))
COLUMNS = {
    "selected": "positions selected",
    "precision": "of them decisions",
    "recall": "decisions selected",
    "entropy_decision": "entropy at decisions",
    "entropy_forced": "at forced tokens",
    "nucleus": "tokens in the nucleus",
    "nucleus_legal": "of its mass legal",
    "illegal_entropy": "entropy from illegal tokens",
    "illegal_entropy_nucleus": "the same in the nucleus",
}


@cache
def legal_words(task: ModuleType, instance) -> Mapping[tuple[str, ...], set[str]]:
    """Words of a response so far -> the words with which a well-formed response goes on."""
    if task is countdown:
        targets = range(countdown.MIN_TARGET, countdown.MAX_TARGET + 1)
    else:
        targets = ("".join(letters) for letters in permutations(instance.source))
    legal: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for target in targets:
        for response in task.solve(replace(instance, target=target)):
            words = tuple(f" {word}" for word in response.split())
            for length, word in enumerate((*words, countdown.END_OF_TEXT)):
                legal[words[:length]].add(word)
    return legal


def legal_tokens(
    task: ModuleType, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], responses: Tensor
) -> Tensor:
    """The legal tokens of each position [B, R, V], bool; none from a response's first illegal token on."""
    legal = torch.zeros(*responses.shape, len(tokenizer), dtype=torch.bool)
    for b, (prompt, response) in enumerate(zip(prompts, responses.tolist(), strict=True)):
        tree = legal_words(task, task.parse_instance(prompt))
        words: tuple[str, ...] = ()
        for position, token in enumerate(response):
            choices = tree.get(words)
            if choices is None:
                break
            legal[b, position, tokenizer.convert_tokens_to_ids(sorted(choices))] = True
            words = (*words, tokenizer.convert_ids_to_tokens(token))
    return legal


@torch.no_grad()
def measure(logits: Tensor, legal: Tensor) -> dict[str, float]:
    """What the masks chose. Means over the positions that are counted; NaN where there is nothing to count.

    Args:
        logits: [B, R, V] before each token of the responses.
        legal: [B, R, V] bool, from `legal_tokens`.

    Returns:
        selected: share of positions under the peak mask; precision: share of these that are decisions, and
        recall: share of the decisions that are selected; chance: share of decisions among all positions;
        entropy_decision, entropy_forced: nats; nucleus: tokens; nucleus_legal: share of the nucleus's mass;
        illegal_entropy: share of the entropy -sum p log p that illegal tokens contribute, and
        illegal_entropy_nucleus: the same of the entropy within the nucleus.
    """
    nothing = torch.zeros(logits.shape[:2], dtype=torch.int64)
    stats = vocab_parallel_token_stats(logits, nothing, top_p=TOP_P)
    nucleus = top_p_mask(logits, top_p=TOP_P)
    counted = legal.any(-1)
    decision = legal.sum(-1) > 1
    selected = peak_entropy_mask(stats.top_p_entropy, counted, QUANTILE)
    probs = logits.double().softmax(-1)
    inside = torch.where(nucleus, probs, 0.0)
    inside = inside / inside.sum(-1, keepdim=True)

    def illegal_share(p: Tensor) -> float:
        parts = -torch.xlogy(p, p)[counted]
        return (parts[~legal[counted]].sum() / parts.sum()).item()

    def mean(values: Tensor, where: Tensor) -> float:
        return values[where].double().mean().item()

    return {
        "selected": mean(selected, counted),
        "chance": mean(decision, counted),
        "precision": mean(decision, selected),
        "recall": mean(selected, decision),
        "entropy_decision": mean(stats.entropy, decision),
        "entropy_forced": mean(stats.entropy, counted & ~decision),
        "nucleus": mean(nucleus.sum(-1), counted),
        "nucleus_legal": mean((inside * legal).sum(-1), counted),
        "illegal_entropy": illegal_share(probs),
        "illegal_entropy_nucleus": illegal_share(inside),
    }


def measure_policy(directory: Path, task: ModuleType, prompts: Sequence[str]) -> dict[str, float]:
    """Sample a response to each prompt from the policy in `directory` and measure its masks there."""
    model, tokenizer = load(directory)
    responses = sample(model, tokenizer, task, prompts, seed=0)
    tokens = torch.cat([torch.tensor(tokenizer(list(prompts))["input_ids"]), responses], dim=1)
    with torch.no_grad():
        logits = model(tokens).logits[:, -responses.shape[1] - 1 : -1]
    return measure(logits, legal_tokens(task, tokenizer, prompts, responses))


def table(measured: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Markdown: method -> the measurements of its seeds, their means in a row."""
    chance = np.mean([m["chance"] for m in measured[START]])
    head = ["method", "seeds", *COLUMNS.values()]
    lines = [row(head), rule(head)]
    for method, runs in measured.items():
        means = [np.mean([run[name] for run in runs]) for name in COLUMNS]
        cells = ["" if np.isnan(mean) else f"{mean:.3f}" for mean in means]
        lines.append(row([method, "" if method == START else str(len(runs)), *cells]))
    lines += [
        "",
        f"Before training, {chance:.3f} of all positions are decisions. Entropies in nats, of the whole",
        f"vocabulary. Nucleus: top-p mask at {TOP_P:g}; selected: peak mask at quantile {QUANTILE:g}.",
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    policies = parse_policies(__doc__, argv, samples=4)
    prompts = [prompt for prompt in policies.prompts for _ in range(policies.samples)]
    measured = {START: [measure_policy(policies.start, policies.task, prompts)]}
    for method, directories in policies.directories.items():
        measured[method] = [measure_policy(path, policies.task, prompts) for path in directories.values()]
        print(f"{method}, seeds {sorted(directories)}", flush=True)
    print(write_text(policies.results / "decisions.md", table(measured)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
