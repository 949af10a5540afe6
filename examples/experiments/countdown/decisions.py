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

import argparse
import json
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
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[2]
sys.path[:0] = [str(REPOSITORY), str(HERE)]

from matrix import SETTINGS, TASKS  # noqa: E402

from siren_megatron.evaluation.results import write_text  # noqa: E402
from siren_megatron.rewards import countdown, rewrite  # noqa: E402
from siren_megatron.siren import peak_entropy_mask  # noqa: E402
from siren_megatron.toy_model import sample  # noqa: E402
from siren_megatron.vocab_parallel import top_p_mask, vocab_parallel_token_stats  # noqa: E402

TOP_P, QUANTILE = 0.8, 0.8
"""Of the masks, SIREN's defaults."""
START = "before training"
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
    for row, (prompt, response) in enumerate(zip(prompts, responses.tolist(), strict=True)):
        tree = legal_words(task, task.parse_instance(prompt))
        words: tuple[str, ...] = ()
        for position, token in enumerate(response):
            choices = tree.get(words)
            if choices is None:
                break
            legal[row, position, tokenizer.convert_tokens_to_ids(sorted(choices))] = True
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


def measure_policy(directory: Path, task: ModuleType, prompts: Sequence[str], seed: int) -> dict[str, float]:
    """Sample a response to each prompt from the policy in `directory` and measure its masks there."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    model = Qwen2ForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    responses = sample(model, tokenizer, task, prompts, seed=seed)
    tokens = torch.cat([torch.tensor(tokenizer(list(prompts))["input_ids"]), responses], dim=1)
    with torch.no_grad():
        logits = model(tokens).logits[:, -responses.shape[1] - 1 : -1]
    return measure(logits, legal_tokens(task, tokenizer, prompts, responses))


def table(measured: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Markdown: method -> the measurements of its seeds, their means in a row."""
    chance = np.mean([m["chance"] for m in measured[START]])
    head = ["method", "seeds", *COLUMNS.values()]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for method, runs in measured.items():
        cells = [f"{np.mean([run[name] for run in runs]):.3f}" for name in COLUMNS]
        lines.append("| " + " | ".join([method, "" if method == START else str(len(runs)), *cells]) + " |")
    lines += [
        "",
        f"Before training, {chance:.3f} of all positions are decisions. Entropies in nats, of the whole",
        f"vocabulary. Nucleus: top-p mask at {TOP_P:g}; selected: peak mask at quantile {QUANTILE:g}.",
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--setting", choices=SETTINGS, default="quick", help="default: %(default)s")
    parser.add_argument("--task", choices=TASKS, default=TASKS[0], help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="of run.py; default: runs/experiments/TASK-SETTING")
    parser.add_argument("--results", type=Path, help="default: OUTPUT/results")
    parser.add_argument("--checkpoint", type=Path, help="default: runs/toy-TASK")
    parser.add_argument(
        "--samples", type=int, default=8, help="responses to each prompt; default: %(default)s"
    )
    args = parser.parse_args(argv)
    setting, task = SETTINGS[args.setting], {"countdown": countdown, "rewrite": rewrite}[args.task]
    output = args.output or REPOSITORY / "runs" / "experiments" / f"{args.task}-{args.setting}"
    checkpoint = args.checkpoint or REPOSITORY / "runs" / f"toy-{args.task}"
    held_out = checkpoint / "prompts" / f"eval-{setting.eval_prompts}.jsonl"
    policies = {method: sorted(output.glob(f"runs/{method}/seed*/train/hf")) for method in setting.methods}
    if args.samples < 1:
        parser.error(f"--samples must be at least 1, got {args.samples}")
    if not held_out.exists() or not any(policies.values()):
        parser.error(f"no policy of run.py under {output}, or no prompts at {held_out}")
    instances = [json.loads(line)["problem"] for line in held_out.read_text().splitlines()]
    prompts = [prompt for prompt in instances for _ in range(args.samples)]
    measured = {START: [measure_policy(checkpoint, task, prompts, 0)]}
    for method, directories in policies.items():
        for directory in directories:
            measured.setdefault(method, []).append(measure_policy(directory, task, prompts, 0))
            print(directory, flush=True)
    print(write_text((args.results or output / "results") / "decisions.md", table(measured)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
