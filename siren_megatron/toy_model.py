"""Small Qwen2 models in the Hugging Face format: tokenizers, random weights and a task's warm-up.

A task is a module of the shape of :mod:`siren_megatron.rewards.countdown`; ``rewards.rewrite`` is another.

`tools/make_toy_checkpoint.py` builds checkpoints of these; the program reads them as any other checkpoint.
Legend: B = sequences of a batch, P = tokens of a prompt (Countdown: 7), R = of a response with its end (11).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
from transformers.utils import logging

from siren_megatron.rewards.countdown import END_OF_TEXT

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
# Qwen2.5-Math's, without tools.
CHATML_TEMPLATE = (
    "{%- if messages[0]['role'] == 'system' %}"
    "{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}"
    "{%- else %}"
    "{{- '<|im_start|>system\\nPlease reason step by step, and put your final answer within "
    "\\\\boxed{}.<|im_end|>\\n' }}"
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
WARM_UP_LINEAR_STEPS = 50


@contextmanager
def fixed_threads(num_threads: int) -> Iterator[None]:
    """Compute with so many threads whatever the machine has: the order of sums decides the last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def task_tokenizer(task: ModuleType, vocab_size: int) -> PreTrainedTokenizerFast:
    """One token per word of the task, the bytes for any other text, and unused tokens up to ``vocab_size``.

    No token but the end of sequence is special: an unused one stays visible when a response is decoded, so
    that it makes the response wrong instead of vanishing from it.

    Raises:
        ValueError: ``vocab_size`` has no room for the task's tokens and the bytes.
    """
    bytes_alphabet = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(task.VOCABULARY))
    tokens = [*task.VOCABULARY, *bytes_alphabet]
    if vocab_size < len(tokens):
        raise ValueError(f"--vocab-size must be at least {len(tokens)}, got {vocab_size}")
    tokens += [f" <unused{n}>" for n in range(vocab_size - len(tokens))]
    tokenizer = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, []))
    _split_like_qwen2(tokenizer)
    # The splitting takes numbers apart into digits; added tokens are found before it.
    words = [word for word in task.VOCABULARY if word != END_OF_TEXT]
    tokenizer.add_tokens([AddedToken(word, normalized=False, special=False) for word in words])
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False, special=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def text_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on ``texts``, with Qwen2.5's special tokens and ChatML template.

    Raises:
        ValueError: ``vocab_size`` has no room for the bytes and the three special tokens.
    """
    special_tokens = [END_OF_TEXT, IM_START, IM_END]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet) + len(special_tokens):
        raise ValueError(
            f"--vocab-size must be at least {len(alphabet) + len(special_tokens)}, got {vocab_size}"
        )
    tokenizer = Tokenizer(models.BPE())
    _split_like_qwen2(tokenizer)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        additional_special_tokens=[IM_START],
        chat_template=CHATML_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def new_model(
    tokenizer: PreTrainedTokenizerFast,
    *,
    vocab_size: int,
    hidden_size: int,
    num_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    tie_word_embeddings: bool,
    max_position_embeddings: int,
    seed: int,
) -> Qwen2ForCausalLM:
    """A randomly initialised fp32 model (it seeds torch's global generator).

    Raises:
        ValueError: the sizes do not fit each other, or heads are too small for vLLM's CPU attention.
    """
    if min(hidden_size, num_layers, num_attention_heads, num_key_value_heads, max_position_embeddings) < 1:
        raise ValueError("the hidden size and the numbers of layers, heads and positions must be at least 1")
    head_size, remainder = divmod(hidden_size, num_attention_heads)
    if remainder or head_size < 32 or head_size % 2:
        raise ValueError(
            f"--hidden-size {hidden_size} over --num-attention-heads {num_attention_heads} must give heads "
            "of an even size of at least 32 (vLLM's CPU attention takes no smaller ones)"
        )
    if num_attention_heads % num_key_value_heads:
        raise ValueError(
            f"--num-key-value-heads {num_key_value_heads} must divide "
            f"--num-attention-heads {num_attention_heads}"
        )
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=tie_word_embeddings,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(config)
    model.generation_config.do_sample = True
    return model


def warm_up(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    task: ModuleType,
    instances: Sequence[Any],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    noise: float,
    seed: int,
    quiet: bool,
) -> float:
    """Train on right responses drawn at random, in place; returns the mean loss of the last 50 steps.

    Args:
        task, instances: what to train on.
        learning_rate: of AdamW, reached linearly over the first 50 steps and constant from there.
        noise: share of the targets replaced by uniform tokens of the whole vocabulary.
    """
    texts, first, count = [], [], []
    for instance in instances:
        solutions = task.solve(instance)
        first.append(len(texts))
        count.append(len(solutions))
        prompt = task.render_prompt(instance)
        texts += [f"{prompt} {solution}{END_OF_TEXT}" for solution in solutions]
    sequences = torch.tensor(tokenizer(texts)["input_ids"])  # [texts, P + R]
    first, count = torch.tensor(first), torch.tensor(count)

    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARM_UP_LINEAR_STEPS)
    )
    model.train()
    losses: list[float] = []
    interval = 0.2 if sys.stderr.isatty() else 10.0  # seconds; a log file needs few lines
    bar = tqdm(range(steps), "warm-up", unit="step", disable=quiet, mininterval=interval, dynamic_ncols=True)
    for _ in bar:
        # An instance, then one of its solutions: instances with many solutions don't dominate.
        chosen = torch.randint(len(first), (batch_size,), generator=generator)
        offset = (torch.rand(batch_size, generator=generator) * count[chosen]).long()
        batch = sequences[first[chosen] + offset]  # [B, P + R]
        targets = batch[:, task.PROMPT_TOKENS :].clone()  # [B, R]
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


@torch.no_grad()
def sample(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    task: ModuleType,
    prompts: Sequence[str],
    *,
    seed: int,
    temperature: float = 1.0,
) -> Tensor:
    """A response to each prompt, as token ids [B, R]; none is cut at an end of sequence."""
    generator = torch.Generator().manual_seed(seed)
    model.eval()
    responses = []
    for tokens in torch.tensor(tokenizer(prompts)["input_ids"]).split(2048):  # [B, P]
        sampled, cache = [], None
        for _ in range(task.RESPONSE_WORDS + 1):
            outputs = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = outputs.past_key_values
            probs = (outputs.logits[:, -1] / temperature).softmax(-1)
            tokens = torch.multinomial(probs, 1, generator=generator)
            sampled.append(tokens)
        responses.append(torch.cat(sampled, dim=1))
    return torch.cat(responses)


def evaluate(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    task: ModuleType,
    instances: Sequence[Any],
    *,
    num_samples: int,
    seed: int,
) -> dict[str, float]:
    """avg@k and pass@k of ``num_samples`` responses per instance at temperature 1."""
    prompts = [task.render_prompt(instance) for instance in instances for _ in range(num_samples)]
    responses = sample(model, tokenizer, task, prompts, seed=seed).tolist()
    right = torch.tensor(
        [
            response[-1] == tokenizer.eos_token_id
            and task.verify(tokenizer.decode(response), instances[n // num_samples])
            for n, response in enumerate(responses)
        ]
    ).view(len(instances), num_samples)
    return {
        f"avg@{num_samples}": right.double().mean().item(),
        f"pass@{num_samples}": right.any(1).double().mean().item(),
    }


def save_checkpoint(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write config.json, model.safetensors, generation_config.json and the tokenizer's files."""
    tokenizer.model_max_length = model.config.max_position_embeddings
    bars_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # one for a file of a megabyte
    try:
        model.save_pretrained(directory)
    finally:
        if bars_shown:
            logging.enable_progress_bar()
    tokenizer.save_pretrained(directory)
    # safetensors leaves its file readable by the owner alone, whatever the umask.
    umask = os.umask(0)
    os.umask(umask)
    for path in directory.glob("*.safetensors"):
        path.chmod(0o666 & ~umask)


def _split_like_qwen2(tokenizer: Tokenizer) -> None:
    """Give a pipeline the parts of transformers' Qwen2Tokenizer: AutoTokenizer rebuilds that class around the
    vocabulary of any Qwen2 checkpoint, whatever else its tokenizer.json says."""
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
