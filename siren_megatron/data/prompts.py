"""Data sets of prompts: files read, checked, rendered and tokenised.

Importing this module needs the standard library only, so that a wrong file is refused before anything heavy
starts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from siren_megatron.data.cursor import MixtureCursor, PromptCursor, make_cursor
from siren_megatron.data.prompt_files import (
    ANSWER_KEYS,
    PROMPT_DATA_FLAG,
    PROMPT_KEYS,
    final_answer,
    read_jsonl_field,
    read_records,
    validate_prompt_file,
)
from siren_megatron.data.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from siren_megatron.data.options import DataOptions

__all__ = [
    "ANSWER_KEYS",
    "PROMPT_DATA_FLAG",
    "PROMPT_KEYS",
    "PROMPT_FIELD",
    "MixtureCursor",
    "Prompt",
    "PromptCursor",
    "PromptDataset",
    "data_fingerprint",
    "final_answer",
    "join_datasets",
    "load_data_tokenizer",
    "load_dataset",
    "load_prompts",
    "load_tokenizer",
    "make_cursor",
    "read_jsonl_field",
    "validate_prompt_file",
]

PROMPT_FIELD = "{prompt}"
"""What a plain template holds in the problem's place; other braces are text."""


@dataclass(frozen=True)
class Prompt:
    """One prompt, ready for the rollout.

    Args:
        index: position in :attr:`PromptDataset.prompts`.
        token_ids: the prompt's tokens, never empty and at most ``max_prompt_length``.
        text: the text that was tokenised, the chat template included.
        answer: what the reward compares the response with.
    """

    index: int
    token_ids: tuple[int, ...]
    text: str
    answer: str


@dataclass(frozen=True)
class PromptDataset:
    """The prompts of a file in its order, or of several files end to end.

    Args:
        prompts: those that are short enough.
        num_skipped_too_long: how many were left out for their length.
        sizes: prompts of each file, where they are several.
    """

    prompts: tuple[Prompt, ...]
    num_skipped_too_long: int
    sizes: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.prompts)

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with any prompt or answer: keep it to check a resume."""
        return data_fingerprint(part for prompt in self.prompts for part in (prompt.text, prompt.answer))


def load_prompts(
    path: str | os.PathLike[str],
    tokenizer: Any,
    *,
    prompt_key: str | None = None,
    answer_key: str | None = None,
    system_prompt: str | None = None,
    apply_chat_template: bool | None = None,
    template: str | None = None,
    max_prompt_length: int,
    flag: str = PROMPT_DATA_FLAG,
) -> PromptDataset:
    """Read a JSONL or Parquet file and tokenise its prompts.

    Args:
        path: JSONL, one object a line with blank lines passed over, or a file that ends with ``.parquet``.
        tokenizer: as from :func:`load_tokenizer`.
        prompt_key: field of the problem; None takes the first of PROMPT_KEYS that the first record has.
        answer_key: field of the answer; None takes the first of ANSWER_KEYS. Where the answer has ``####``
            (GSM8K), what follows the last one counts, without thousands' commas.
        system_prompt: the chat's system message; None leaves it to the template.
        apply_chat_template: True, False, or None for "when the tokenizer has a template".
        template: plain text in which the problem takes the place of each ``{prompt}``; no chat template is
            applied then.
        max_prompt_length: tokens; longer prompts are left out and counted.
        flag: the option that named the file, for the messages.

    Raises:
        ValueError: the file or one of its lines is wrong (naming both), the template is missing or
            contradicts another argument, or every prompt is too long.
    """
    if template is not None:
        if PROMPT_FIELD not in template:
            raise ValueError(f"--prompt-template {template!r} holds no {PROMPT_FIELD}")
        if system_prompt is not None or apply_chat_template:
            raise ValueError("--prompt-template takes no --prompt-system and no --prompt-chat-template")
        apply_chat_template = False
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if apply_chat_template is None:
        apply_chat_template = has_template
    if apply_chat_template and not has_template:
        raise ValueError(
            "--prompt-chat-template: the chat template was asked for, but the tokenizer has none"
        )
    if system_prompt is not None and not apply_chat_template:
        raise ValueError("--prompt-system: a system prompt needs a chat template, and none is applied")

    prompts: list[Prompt] = []
    num_skipped = 0
    for where, problem, answer in read_records(path, prompt_key, answer_key, flag):
        text = problem if template is None else template.replace(PROMPT_FIELD, problem)
        if apply_chat_template:
            messages = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
            messages.append({"role": "user", "content": problem})
            try:
                text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            except Exception as error:  # a template is a program: it may fail in any way
                why = " ".join(str(error).split())[:300]
                raise ValueError(f"{where}: the tokenizer's chat template fails on it: {why}") from error
        # A template writes its own special tokens: adding the tokenizer's would double them.
        token_ids = tuple(tokenizer(text, add_special_tokens=not apply_chat_template)["input_ids"])
        if not token_ids:
            raise ValueError(f"{where}: the prompt has no tokens")
        if len(token_ids) > max_prompt_length:
            num_skipped += 1
            continue
        prompts.append(Prompt(len(prompts), token_ids, text, answer))
    if not prompts:
        raise ValueError(
            f"{flag} {path}: all {num_skipped} prompts are longer than {max_prompt_length} tokens"
        )
    return PromptDataset(tuple(prompts), num_skipped, (len(prompts),))


def load_data_tokenizer(data: DataOptions, hf_checkpoint: Path) -> Any:
    """The tokenizer of `--tokenizer`, else of the checkpoint; raises ValueError as :func:`load_tokenizer`."""
    if data.tokenizer is not None:
        return load_tokenizer(data.tokenizer, flag="--tokenizer")
    return load_tokenizer(hf_checkpoint)


def load_dataset(
    data: DataOptions, tokenizer: Any, *, max_prompt_length: int, vocab_size: int
) -> PromptDataset:
    """Every file of `--prompt-data`, tokenised and end to end.

    Args:
        data: the run's options.
        tokenizer: as from :func:`load_tokenizer`.
        max_prompt_length: tokens; longer prompts are left out and counted.
        vocab_size: rows of the model's embedding.

    Raises:
        ValueError: as :func:`load_prompts`, or the tokenizer is of a larger vocabulary than the model.
    """
    dataset = join_datasets(
        [
            load_prompts(
                path,
                tokenizer,
                prompt_key=data.prompt_key,
                answer_key=data.prompt_answer_key,
                system_prompt=data.prompt_system,
                apply_chat_template=data.prompt_chat_template,
                template=data.template_text,
                max_prompt_length=max_prompt_length,
            )
            for path in data.prompt_data
        ]
    )
    largest = max(tokenizer.eos_token_id, *(max(prompt.token_ids) for prompt in dataset.prompts))
    if largest >= vocab_size:
        flag = "--hf-checkpoint" if data.tokenizer is None else f"--tokenizer {data.tokenizer}"
        raise ValueError(
            f"{flag}: the tokenizer gives token {largest}, but the model's vocab_size is {vocab_size}"
        )
    return dataset


def join_datasets(datasets: Sequence[PromptDataset]) -> PromptDataset:
    """Data sets end to end: the prompts get the positions that :func:`make_cursor` of ``sizes`` gives."""
    prompts = (prompt for dataset in datasets for prompt in dataset.prompts)
    return PromptDataset(
        tuple(dataclasses.replace(prompt, index=n) for n, prompt in enumerate(prompts)),
        sum(dataset.num_skipped_too_long for dataset in datasets),
        tuple(len(dataset) for dataset in datasets),
    )


def data_fingerprint(texts: Iterable[str]) -> str:
    """16 hexadecimal digits of the SHA-256 of a sequence of texts, their number and borders included."""
    digest = hashlib.sha256()
    for text in texts:
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()[:16]
