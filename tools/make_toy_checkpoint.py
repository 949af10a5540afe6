#!/usr/bin/env python3
"""Build a small checkpoint in the Hugging Face format, for a first run and for tests on a CPU.

  countdown  a Qwen2 model warmed up on the Countdown task, with its RL and held-out prompts
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
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from siren_megatron import countdown  # noqa: E402

RECIPE_FILE = "toy_checkpoint.json"
RECIPE_VERSION = 1
END_OF_TEXT = countdown.END_OF_TEXT
IM_START, IM_END = "<|im_start|>", "<|im_end|>"
CHATML_TEMPLATE = (
    "{%- if messages[0]['role'] == 'system' %}"
    "{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}"
    "{%- else %}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
    "{%- endif %}"
    "{%- for message in messages %}"
    "{%- if message.role != 'system' or not loop.first %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- endif %}"
)


def build_countdown_checkpoint(
    output: str | os.PathLike[str],
    *,
    seed: int = 1234,
    steps: int = 1000,
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
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Warm a small Qwen2 model up on Countdown and save it with its prompts.

    Writes the model and the tokenizer to ``output``, the RL prompts to ``output/prompts/train.jsonl`` and
    the held-out ones, which neither the warm-up nor the RL prompts contain, to ``output/prompts/eval.jsonl``.

    Args:
        output: directory to create.
        seed: of the initial weights, the split, the batches and the evaluation's samples.
        steps, batch_size, learning_rate: of the warm-up (AdamW, constant rate after 50 linear steps).
        noise: share of the training targets replaced by uniform tokens of the whole vocabulary, so that the
            model has a tail as a language model's.
        num_eval_prompts: held-out instances of the 3,341.
        num_eval_samples: responses sampled per held-out prompt to measure the result (temperature 1).
        overwrite: rebuild an existing directory.
        quiet: print nothing and show no progress bar.

    Returns:
        The recipe as saved in ``toy_checkpoint.json``; ``recipe["results"]`` has ``avg@k`` and ``pass@k``.

    Raises:
        ValueError: an argument is out of range, or ``output`` exists and was built otherwise.
    """
    arguments = {key: value for key, value in locals().items() if key not in ("output", "overwrite", "quiet")}
    _check_model_arguments(hidden_size, num_layers, num_attention_heads, num_key_value_heads)
    if steps < 1 or batch_size < 1 or num_eval_samples < 1:
        raise ValueError("--steps, --batch-size and --num-eval-samples must be at least 1")
    if not 0 <= noise < 1:
        raise ValueError(f"--noise must be in [0, 1), got {noise}")
    if vocab_size <= len(countdown.VOCABULARY):
        raise ValueError(f"--vocab-size must be above {len(countdown.VOCABULARY)}, got {vocab_size}")
    instances = countdown.enumerate_instances()
    if not 1 <= num_eval_prompts < len(instances):
        raise ValueError(f"--num-eval-prompts must be in 1-{len(instances) - 1}, got {num_eval_prompts}")

    def build(directory: Path) -> dict[str, float]:
        random.Random(seed).shuffle(instances)
        held_out, training = instances[:num_eval_prompts], instances[num_eval_prompts:]
        _write_prompts(directory / "prompts" / "eval.jsonl", held_out)
        _write_prompts(directory / "prompts" / "train.jsonl", training)

        tokenizer = _countdown_tokenizer(vocab_size)
        model = _new_model(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_attention_heads=num_attention_heads,
            num_key_value_heads=num_key_value_heads,
            tie_word_embeddings=tie_word_embeddings,
            max_position_embeddings=64,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            seed=seed,
        )
        loss = _warm_up(model, tokenizer, training, steps, batch_size, learning_rate, noise, seed, quiet)
        results = {"loss": loss, **_evaluate(model, tokenizer, held_out, num_eval_samples, seed)}
        _save(model, tokenizer, directory)
        return results

    return _build_once(Path(output), {"task": "countdown", **arguments}, build, overwrite, quiet)


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
        (the others as in :func:`build_countdown_checkpoint`)

    Returns:
        The recipe as saved in ``toy_checkpoint.json``; ``recipe["results"]`` has the number of tokens.

    Raises:
        ValueError: an argument is out of range, the text cannot be read, or ``output`` was built otherwise.
    """
    arguments = {
        key: value
        for key, value in locals().items()
        if key not in ("text_data", "output", "overwrite", "quiet")
    }
    _check_model_arguments(hidden_size, num_layers, num_attention_heads, num_key_value_heads)
    if vocab_size < 256 + 3:
        raise ValueError(f"--vocab-size must be at least 259 (the bytes and three markers), got {vocab_size}")
    texts = _read_texts(Path(text_data), text_key)
    # Imported here: the tool's --help and its errors should not wait for anything heavy.
    from siren_megatron.prompts import data_fingerprint

    arguments["text_fingerprint"] = data_fingerprint(texts)

    def build(directory: Path) -> dict[str, float]:
        tokenizer = _text_tokenizer(texts, vocab_size, max_position_embeddings)
        model = _new_model(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_attention_heads=num_attention_heads,
            num_key_value_heads=num_key_value_heads,
            tie_word_embeddings=tie_word_embeddings,
            max_position_embeddings=max_position_embeddings,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            seed=seed,
        )
        _save(model, tokenizer, directory)
        return {"num_tokens": len(tokenizer)}

    return _build_once(Path(output), {"task": "text", **arguments}, build, overwrite, quiet)


def _check_model_arguments(hidden: int, layers: int, heads: int, kv_heads: int) -> None:
    if min(hidden, layers, heads, kv_heads) < 1:
        raise ValueError("--hidden-size, --num-layers and both numbers of heads must be at least 1")
    if hidden % heads or (hidden // heads) % 2:
        raise ValueError(f"--hidden-size {hidden} must be an even multiple of --num-attention-heads {heads}")
    if hidden // heads < 32:
        raise ValueError(
            f"--hidden-size {hidden} / --num-attention-heads {heads} gives heads of {hidden // heads}: "
            "vLLM's CPU attention takes 32 and up"
        )
    if heads % kv_heads:
        raise ValueError(f"--num-key-value-heads {kv_heads} must divide --num-attention-heads {heads}")


def _build_once(
    output: Path,
    recipe: dict[str, Any],
    build: Callable[[Path], dict[str, float]],
    overwrite: bool,
    quiet: bool,
) -> dict[str, Any]:
    """Reuse ``output`` when it was built by the same recipe; else build beside it and rename."""
    recipe = {"version": RECIPE_VERSION, **recipe}
    if output.exists() and not overwrite:
        saved = _read_recipe(output)
        differing = [key for key in recipe if saved.get(key) != recipe[key]]
        if not differing:
            if not quiet:
                print(f"{output}: already built with these arguments, reused (--overwrite rebuilds it)")
            return saved
        what = f"built otherwise ({', '.join(differing)})" if saved else "not a checkpoint of this tool"
        raise ValueError(f"{output} exists and is {what}: give --overwrite or another --output")
    if output.exists() and not _read_recipe(output) and any(output.iterdir()):
        raise ValueError(f"{output} is not a checkpoint of this tool: not overwritten, remove it yourself")

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


def _write_prompts(path: Path, instances: list[countdown.Instance]) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for instance in instances:
            text = countdown.render_prompt(instance)
            file.write(json.dumps({"problem": text, "answer": text}) + "\n")


def _read_texts(path: Path, key: str) -> list[str]:
    from siren_megatron.prompts import read_jsonl_field

    return read_jsonl_field(path, key, flag="--text-data")


def _countdown_tokenizer(vocab_size: int):
    """One token per word. The words that the task doesn't use stay visible when decoded, so that a response
    with one of them among right steps is graded as wrong."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = [*countdown.VOCABULARY, "<unk>"]
    words += [f"<unused{n}>" for n in range(vocab_size - len(words))]
    tokenizer = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=64,
        clean_up_tokenization_spaces=False,
    )


def _text_tokenizer(texts: list[str], vocab_size: int, max_length: int):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, IM_START, IM_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[IM_START],
        chat_template=CHATML_TEMPLATE,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def _new_model(
    *,
    vocab_size: int,
    hidden_size: int,
    num_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    tie_word_embeddings: bool,
    max_position_embeddings: int,
    eos_token_id: int,
    pad_token_id: int,
    seed: int,
):
    """A randomly initialised fp32 Qwen2ForCausalLM; torch's global generator is seeded."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=tie_word_embeddings,
        rope_theta=10000.0,
        eos_token_id=eos_token_id,
        bos_token_id=None,
        pad_token_id=pad_token_id,
        dtype="float32",
    )
    return Qwen2ForCausalLM(config)


def _warm_up(
    model,
    tokenizer,
    instances: list[countdown.Instance],
    steps: int,
    batch_size: int,
    learning_rate: float,
    noise: float,
    seed: int,
    quiet: bool,
) -> float:
    """Supervised training on right responses drawn at random; returns the mean loss of the last 50 steps."""
    import torch
    import torch.nn.functional as F
    from tqdm import tqdm

    def encode(text: str) -> list[int]:
        return tokenizer.convert_tokens_to_ids(text.split())

    sequences, first, count = [], [], []
    for instance in instances:
        solutions = countdown.solve(instance)
        first.append(len(sequences))
        count.append(len(solutions))
        prompt = countdown.render_prompt(instance)
        sequences += [encode(f"{prompt} {solution} {END_OF_TEXT}") for solution in solutions]
    sequences, first, count = torch.tensor(sequences), torch.tensor(first), torch.tensor(count)

    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50))
    model.train()
    losses: list[float] = []
    bar = tqdm(range(steps), desc="warm-up", unit="step", disable=quiet, dynamic_ncols=True)
    for _ in bar:
        # An instance, then one of its solutions: instances with many solutions don't dominate.
        chosen = torch.randint(len(first), (batch_size,), generator=generator)
        offset = (torch.rand(batch_size, generator=generator) * count[chosen]).long()
        batch = sequences[first[chosen] + offset]  # [batch, prompt + response + 1]
        targets = batch[:, countdown.PROMPT_WORDS :].clone()  # [batch, response + 1]
        replaced = torch.rand(targets.shape, generator=generator) < noise
        uniform = torch.randint(model.config.vocab_size, targets.shape, generator=generator)
        targets[replaced] = uniform[replaced]
        logits = model(batch[:, :-1], use_cache=False, logits_to_keep=targets.shape[1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    return sum(losses[-50:]) / len(losses[-50:])


def _evaluate(
    model, tokenizer, instances: list[countdown.Instance], num_samples: int, seed: int
) -> dict[str, float]:
    """avg@k and pass@k of ``num_samples`` responses per instance at temperature 1."""
    import torch

    prompts = [countdown.render_prompt(instance) for instance in instances for _ in range(num_samples)]
    sequences = torch.tensor([tokenizer.convert_tokens_to_ids(prompt.split()) for prompt in prompts])
    generator = torch.Generator().manual_seed(seed)
    model.eval()
    finished = []
    with torch.no_grad():
        for rows in sequences.split(2048):
            for _ in range(countdown.RESPONSE_WORDS + 1):
                logits = model(rows, use_cache=False, logits_to_keep=1).logits[:, -1]
                sampled = torch.multinomial(logits.softmax(-1), 1, generator=generator)
                rows = torch.cat((rows, sampled), dim=1)
            finished.append(rows[:, countdown.PROMPT_WORDS :])
    right = []
    for response, instance in zip(
        torch.cat(finished).tolist(), (i for i in instances for _ in range(num_samples)), strict=True
    ):
        ended = response[-1] == tokenizer.eos_token_id
        right.append(ended and countdown.verify(tokenizer.decode(response), instance))
    per_instance = torch.tensor(right).view(len(instances), num_samples)
    return {
        f"avg@{num_samples}": per_instance.double().mean().item(),
        f"pass@{num_samples}": per_instance.any(1).double().mean().item(),
    }


def _save(model, tokenizer, directory: Path) -> None:
    model.generation_config.do_sample = True
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


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

    task = add("countdown", "warmed up on the Countdown task, with its prompts")
    task.add_argument("--num-layers", type=int, default=3)
    task.add_argument("--vocab-size", type=int, default=1024, help="the task itself uses 106 tokens")
    task.add_argument("--steps", type=int, default=1000, help="steps of the supervised warm-up")
    task.add_argument("--batch-size", type=int, default=128, help="sequences per warm-up step")
    task.add_argument("--learning-rate", type=float, default=2e-3, help="of the warm-up's AdamW")
    task.add_argument("--noise", type=float, default=0.01, help="share of targets replaced by uniform tokens")
    task.add_argument("--num-eval-prompts", type=int, default=256, help="held out of the 3,341 instances")
    task.add_argument("--num-eval-samples", type=int, default=32, help="responses per held-out prompt")

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
    build = {"countdown": build_countdown_checkpoint, "text": build_text_checkpoint}[options.pop("task")]
    try:
        build(**options)
    except (ValueError, OSError) as error:
        print(f"make_toy_checkpoint: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
