"""The policies that run.py trained, for the scripts that sample from them again."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from matrix import SETTINGS, TASKS
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM
from transformers.utils import logging

from siren_megatron.rewards import countdown, rewrite

REPOSITORY = Path(__file__).resolve().parents[3]
START = "before training"
"""The checkpoint that every run began from, in the tables."""


@dataclass(frozen=True)
class Policies:
    """What a finished experiment left.

    Args:
        task: the module of its reward.
        start: the checkpoint that every run began from.
        directories: method -> seed -> Hugging Face checkpoint after training.
        prompts: the setting's held-out prompts.
        results: where tables and figures go.
        samples: responses to each prompt.
    """

    task: ModuleType
    start: Path
    directories: dict[str, dict[int, Path]]
    prompts: list[str]
    results: Path
    samples: int


def parse_policies(
    description: str | None, argv: Sequence[str] | None, *, samples: int, wanted: Callable[[str], bool]
) -> Policies:
    """The options of run.py that say which experiment, and `--samples`.

    Args:
        samples: its default.
        wanted: whether a method is looked at.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--setting", choices=SETTINGS, default="quick", help="default: %(default)s")
    parser.add_argument("--task", choices=TASKS, default=TASKS[0], help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="of run.py; default: runs/experiments/TASK-SETTING")
    parser.add_argument("--results", type=Path, help="default: OUTPUT/results")
    parser.add_argument("--checkpoint", type=Path, help="default: runs/toy-TASK")
    parser.add_argument("--samples", type=int, default=samples, help="to each prompt; default: %(default)s")
    args = parser.parse_args(argv)
    output = args.output or REPOSITORY / "runs" / "experiments" / f"{args.task}-{args.setting}"
    start = args.checkpoint or REPOSITORY / "runs" / f"toy-{args.task}"
    setting = SETTINGS[args.setting]
    held_out = start / "prompts" / f"eval-{setting.eval_prompts}.jsonl"
    found = {}
    for method in filter(wanted, setting.methods):
        paths = output.glob(f"runs/{method}/seed*/train/hf")
        seeds = {int(path.parents[1].name.removeprefix("seed")): path for path in paths}
        if seeds:
            found[method] = dict(sorted(seeds.items()))
    if args.samples < 1:
        parser.error(f"--samples must be at least 1, got {args.samples}")
    if not held_out.exists() or not found:
        parser.error(f"no policy of run.py under {output}, or no prompts at {held_out}")
    results = args.results or output / "results"
    results.mkdir(parents=True, exist_ok=True)
    return Policies(
        task={"countdown": countdown, "rewrite": rewrite}[args.task],
        start=start,
        directories=found,
        prompts=[json.loads(line)["problem"] for line in held_out.read_text().splitlines()],
        results=results,
        samples=args.samples,
    )


def load(directory: Path) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerFast]:
    """A policy in fp32, in evaluation mode, and its tokenizer."""
    logging.disable_progress_bar()  # one for a file of a megabyte
    model = Qwen2ForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return model, PreTrainedTokenizerFast.from_pretrained(directory)
