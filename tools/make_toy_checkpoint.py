#!/usr/bin/env python3
"""Build a small checkpoint in the Hugging Face format, for a first run and for tests on a CPU.

  countdown  a Qwen2 model warmed up on the Countdown task, with its RL and held-out prompts
  rewrite    the same on the task of rewriting strings of letters
  text       a randomly initialised Qwen2 model with a byte-level BPE tokenizer trained on a JSONL file

The same arguments build the same checkpoint, to the bit, on one machine. The checkpoint appears under its
final name only when it is complete, and a complete one built with the same arguments is reused.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from siren_megatron.data.prompts import data_fingerprint, read_jsonl_field  # noqa: E402
from siren_megatron.rewards import countdown, rewrite  # noqa: E402

RECIPE_FILE = "toy_checkpoint.json"
RECIPE_VERSION = 3
REWRITE_STEPS = 600  # of the warm-up: avg@32 about 0.2 and pass@32 above 0.95, so that there is much to learn
TASKS = {"countdown": countdown, "rewrite": rewrite}


def build_countdown_checkpoint(output: str | os.PathLike[str], **options: Any) -> dict[str, Any]:
    """:func:`build_task_checkpoint` for Countdown."""
    return build_task_checkpoint("countdown", output, **options)


def build_task_checkpoint(
    task_name: str,
    output: str | os.PathLike[str],
    *,
    seed: int = 1234,
    steps: int = 1100,
    batch_size: int = 128,
    learning_rate: float = 2e-3,
    noise: float = 0.01,
    hidden_size: int = 64,
    num_layers: int = 3,
    num_attention_heads: int = 2,
    num_key_value_heads: int = 2,
    vocab_size: int = 1024,
    tie_word_embeddings: bool = False,
    num_eval_prompts: int = 256,
    num_eval_samples: int = 32,
    num_threads: int = 2,
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Warm a small Qwen2 model up on a task and save it with its prompts.

    Writes the model and the tokenizer to ``output``, the RL prompts to ``output/prompts/train.jsonl`` and
    the held-out ones, which neither the warm-up nor the RL prompts contain, to ``output/prompts/eval.jsonl``.

    Args:
        task_name: a key of TASKS.
        output: directory to create.
        seed: of the initial weights, the split, the batches and the evaluation's samples.
        steps, batch_size, learning_rate: of the warm-up (AdamW, constant rate after 50 linear steps).
        noise: share of the training targets replaced by uniform tokens of the whole vocabulary, so that the
            model has a tail as a language model's.
        num_eval_prompts: held-out instances (Countdown has 3,341 in all, rewrite 38,640).
        num_eval_samples: responses sampled per held-out prompt to measure the result (temperature 1).
        num_threads: of the computation; it decides the last bits, so it does not follow the machine.
        overwrite: rebuild an existing directory.
        quiet: print nothing and show no progress bar.

    Returns:
        The recipe as saved in ``toy_checkpoint.json``; ``recipe["results"]`` has ``avg@k`` and ``pass@k``.

    Raises:
        ValueError: an argument is out of range, or ``output`` exists and was built otherwise.
    """
    arguments, task = _recipe_arguments(locals()), TASKS[task_name]
    if min(steps, batch_size, num_eval_samples, num_threads) < 1:
        raise ValueError("--steps, --batch-size, --num-eval-samples and --num-threads must be at least 1")
    if not 0 <= noise < 1:
        raise ValueError(f"--noise must be in [0, 1), got {noise}")
    instances = task.enumerate_instances()
    if not 1 <= num_eval_prompts < len(instances):
        raise ValueError(f"--num-eval-prompts must be in 1-{len(instances) - 1}, got {num_eval_prompts}")

    def build(directory: Path) -> dict[str, float]:
        from siren_megatron import toy_model

        random.Random(seed).shuffle(instances)
        held_out, training = instances[:num_eval_prompts], instances[num_eval_prompts:]
        _write_prompts(directory / "prompts" / "eval.jsonl", task, held_out)
        _write_prompts(directory / "prompts" / "train.jsonl", task, training)
        tokenizer = toy_model.task_tokenizer(task, vocab_size)
        model = toy_model.new_model(
            tokenizer,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_attention_heads=num_attention_heads,
            num_key_value_heads=num_key_value_heads,
            tie_word_embeddings=tie_word_embeddings,
            max_position_embeddings=64,
            seed=seed,
        )
        with toy_model.fixed_threads(num_threads):
            loss = toy_model.warm_up(
                model,
                tokenizer,
                task,
                training,
                steps=steps,
                batch_size=batch_size,
                learning_rate=learning_rate,
                noise=noise,
                seed=seed,
                quiet=quiet,
            )
            results = toy_model.evaluate(
                model, tokenizer, task, held_out, num_samples=num_eval_samples, seed=seed
            )
        toy_model.save_checkpoint(model, tokenizer, directory)
        return {"loss": loss, **results}

    return _build_once(Path(output), {"task": task_name, **arguments}, build, overwrite, quiet)


def build_text_checkpoint(
    text_data: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    text_key: str = "question",
    vocab_size: int = 2048,
    hidden_size: int = 64,
    num_layers: int = 4,
    num_attention_heads: int = 2,
    num_key_value_heads: int = 2,
    tie_word_embeddings: bool = False,
    max_position_embeddings: int = 2048,
    seed: int = 1234,
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Train a byte-level BPE tokenizer on a JSONL file and save it with a randomly initialised Qwen2 model.

    Args:
        text_data: JSONL file whose field ``text_key`` the tokenizer is trained on.
        vocab_size: of the model. The tokenizer gets as many tokens when the text yields that many merges.
        (the others as in :func:`build_task_checkpoint`)

    Returns:
        The recipe as saved in ``toy_checkpoint.json``; ``recipe["results"]`` has the number of tokens.

    Raises:
        ValueError: an argument is out of range, the text cannot be read, or ``output`` was built otherwise.
    """
    arguments = _recipe_arguments(locals())
    texts = read_jsonl_field(text_data, text_key, flag="--text-data")
    arguments["text_fingerprint"] = data_fingerprint(texts)

    def build(directory: Path) -> dict[str, float]:
        from siren_megatron import toy_model

        tokenizer = toy_model.text_tokenizer(texts, vocab_size)
        model = toy_model.new_model(
            tokenizer,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_attention_heads=num_attention_heads,
            num_key_value_heads=num_key_value_heads,
            tie_word_embeddings=tie_word_embeddings,
            max_position_embeddings=max_position_embeddings,
            seed=seed,
        )
        toy_model.save_checkpoint(model, tokenizer, directory)
        return {"num_tokens": len(tokenizer)}

    return _build_once(Path(output), {"task": "text", **arguments}, build, overwrite, quiet)


def _recipe_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """What decides the bits of the result."""
    return {
        k: v
        for k, v in arguments.items()
        if k not in ("text_data", "task_name", "output", "overwrite", "quiet")
    }


def _build_once(
    output: Path,
    recipe: dict[str, Any],
    build: Callable[[Path], dict[str, float]],
    overwrite: bool,
    quiet: bool,
) -> dict[str, Any]:
    """Reuse ``output`` when it was built by the same recipe; else build beside it and rename."""
    recipe = {"version": RECIPE_VERSION, **recipe}
    saved = _read_recipe(output)
    if output.exists() and not saved and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not a checkpoint of this tool: give another --output")
    if saved and not overwrite:
        differing = [key for key in recipe if key != "version" and saved.get(key, recipe[key]) != recipe[key]]
        if not differing and saved.get("version") == RECIPE_VERSION:
            if not quiet:
                print(f"{output}: already built with these arguments, reused (--overwrite rebuilds it)")
            return saved
        if differing:  # else an older version of this tool built it, and it is built anew
            raise ValueError(
                f"{output} exists and was built otherwise ({', '.join(differing)}): "
                "give --overwrite or another --output"
            )

    output.parent.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        recipe["results"] = build(directory)
        (directory / RECIPE_FILE).write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
        directory.chmod(0o755)
        if output.exists():
            shutil.rmtree(output)
        directory.rename(output)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    if not quiet:
        results = ", ".join(f"{name} {value:.4g}" for name, value in recipe["results"].items())
        print(f"{output}: built ({results})")
    return recipe


def _read_recipe(output: Path) -> dict[str, Any]:
    try:
        saved = json.loads((output / RECIPE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return saved if isinstance(saved, dict) else {}


def _write_prompts(path: Path, task: ModuleType, instances: list[Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for instance in instances:
            text = task.render_prompt(instance)
            file.write(json.dumps({"problem": text, "answer": text}) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tasks = parser.add_subparsers(dest="task", required=True)

    def add(name: str, help_text: str) -> argparse.ArgumentParser:
        task = tasks.add_parser(name, help=help_text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        task.add_argument("--output", required=True, metavar="DIR", help="directory to create")
        task.add_argument("--seed", type=int, default=1234, help="of everything that is random")
        task.add_argument("--hidden-size", type=int, default=64)
        task.add_argument("--num-attention-heads", type=int, default=2, help="heads of at least 32")
        task.add_argument("--num-key-value-heads", type=int, default=2)
        task.add_argument("--tie-word-embeddings", action="store_true", help="one matrix for both ends")
        task.add_argument("--overwrite", action="store_true", help="rebuild an existing checkpoint")
        task.add_argument("--quiet", action="store_true", help="print nothing but errors")
        return task

    for name, text in (("countdown", "the Countdown task"), ("rewrite", "rewriting strings of letters")):
        task = add(name, f"warmed up on {text}, with its prompts")
        used, steps, counted = (108, 1100, "3,341") if name == "countdown" else (16, REWRITE_STEPS, "38,640")
        task.add_argument("--num-layers", type=int, default=3)
        task.add_argument("--vocab-size", type=int, default=1024, help=f"the task itself uses {used} tokens")
        task.add_argument("--steps", type=int, default=steps, help="steps of the supervised warm-up")
        task.add_argument("--batch-size", type=int, default=128, help="sequences per warm-up step")
        task.add_argument("--learning-rate", type=float, default=2e-3, help="of the warm-up's AdamW")
        task.add_argument("--noise", type=float, default=0.01, help="share of targets replaced by any token")
        task.add_argument("--num-eval-prompts", type=int, default=256, help=f"held out of the {counted}")
        task.add_argument("--num-eval-samples", type=int, default=32, help="responses per held-out prompt")
        task.add_argument(
            "--num-threads", type=int, default=2, help="of the computation; decides the last bits"
        )

    task = add("text", "random weights, tokenizer trained on a JSONL file")
    task.add_argument(
        "--text-data", required=True, metavar="FILE", help="JSONL file, e.g. GSM8K's train.jsonl"
    )
    task.add_argument("--text-key", default="question", help="field that the tokenizer is trained on")
    task.add_argument("--num-layers", type=int, default=4)
    task.add_argument("--vocab-size", type=int, default=2048)
    task.add_argument("--max-position-embeddings", type=int, default=2048, help="tokens")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns the exit code (2 for a wrong argument, with one line on stderr)."""
    options = vars(_parser().parse_args(argv))
    task = options.pop("task")
    try:
        build_text_checkpoint(**options) if task == "text" else build_task_checkpoint(task, **options)
    except (ValueError, OSError) as error:
        print(f"make_toy_checkpoint: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
