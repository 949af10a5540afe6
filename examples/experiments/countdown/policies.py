"""The policies that run.py trained, for the scripts that sample from them again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from experiment import Experiment, new_parser
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM
from transformers.utils import logging

from siren_megatron.rewards import countdown, rewrite

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
    description: str | None, argv: Sequence[str] | None, *, samples: int, methods: Sequence[str] | None = None
) -> Policies:
    """The options that say which experiment, and `--samples`.

    Args:
        samples: its default.
        methods: the ones that are looked at; None = all of the setting.
    """
    parser = new_parser(description)
    parser.add_argument("--samples", type=int, default=samples, help="to each prompt; default: %(default)s")
    args = parser.parse_args(argv)
    experiment = Experiment.of(args)
    held_out = experiment.prompts("eval", experiment.setting.eval_prompts)
    found = {}
    for method in experiment.setting.methods:
        if methods is not None and method not in methods:
            continue
        seeds = range(1, experiment.setting.seeds + 1)
        paths = {seed: experiment.run(method, seed) / "train" / "hf" for seed in seeds}
        if trained := {seed: path for seed, path in paths.items() if path.is_dir()}:
            found[method] = trained
    if args.samples < 1:
        parser.error(f"--samples must be at least 1, got {args.samples}")
    if not held_out.exists() or not found:
        parser.error(f"no policy of run.py under {experiment.output}, or no prompts at {held_out}")
    experiment.results.mkdir(parents=True, exist_ok=True)
    return Policies(
        task={"countdown": countdown, "rewrite": rewrite}[args.task],
        start=experiment.checkpoint,
        directories=found,
        prompts=[json.loads(line)["problem"] for line in held_out.read_text().splitlines()],
        results=experiment.results,
        samples=args.samples,
    )


def load(directory: Path) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerFast]:
    """A policy in fp32, in evaluation mode, and its tokenizer."""
    logging.disable_progress_bar()  # one for a file of a megabyte
    model = Qwen2ForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return model, PreTrainedTokenizerFast.from_pretrained(directory)
