"""Data sets of prompts: JSONL files read, checked, rendered and tokenised; a cursor that resumes exactly.

Only :func:`load_tokenizer` imports more than the standard library, so that a wrong file is refused before
anything heavy starts.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROMPT_KEYS = ("problem", "question", "prompt")
ANSWER_KEYS = ("answer", "solution", "ground_truth", "label")
PROMPT_DATA_FLAG = "--prompt-data"

_GSM8K_MARK = "####"
_THOUSANDS_COMMA = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


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
    """The prompts of a file in its order, and how many of it were left out for their length."""

    prompts: tuple[Prompt, ...]
    num_skipped_too_long: int

    def __len__(self) -> int:
        return len(self.prompts)

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with any prompt or answer: keep it to check a resume."""
        return data_fingerprint(part for prompt in self.prompts for part in (prompt.text, prompt.answer))


def load_tokenizer(path: str | os.PathLike[str]):
    """The tokenizer of a Hugging Face checkpoint directory (never downloaded).

    Raises:
        ValueError: the directory has no tokenizer that transformers can load, or it has no end of sequence.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"--hf-checkpoint {path}: no such directory")
    # transformers 5 rebuilds some tokenizers from the class of the model's type and drops the splitting
    # rules of tokenizer.json: other token ids, silently. The plain class takes the file as it is.
    loader = PreTrainedTokenizerFast if (path / "tokenizer.json").is_file() else AutoTokenizer
    try:
        tokenizer = loader.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"--hf-checkpoint {path}: no tokenizer loads from it: {_one_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"--hf-checkpoint {path}: its tokenizer has no end-of-sequence token")
    return tokenizer


def load_prompts(
    path: str | os.PathLike[str],
    tokenizer: Any,
    *,
    prompt_key: str | None = None,
    answer_key: str | None = None,
    system_prompt: str | None = None,
    apply_chat_template: bool | None = None,
    max_prompt_length: int,
    flag: str = PROMPT_DATA_FLAG,
) -> PromptDataset:
    """Read a JSONL file and tokenise its prompts.

    Args:
        path: one JSON object a line; blank lines are passed over.
        tokenizer: as from :func:`load_tokenizer`.
        prompt_key: field of the problem; None takes the first of PROMPT_KEYS that the first record has.
        answer_key: field of the answer; None takes the first of ANSWER_KEYS. Where the answer has ``####``
            (GSM8K), what follows the last one counts, without thousands' commas.
        system_prompt: the chat's system message; None leaves it to the template.
        apply_chat_template: True, False, or None for "when the tokenizer has a template".
        max_prompt_length: tokens; longer prompts are left out and counted.
        flag: the option that named the file, for the messages.

    Raises:
        ValueError: the file or one of its lines is wrong (naming both), the template is missing, or every
            prompt is too long.
    """
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if apply_chat_template is None:
        apply_chat_template = has_template
    if apply_chat_template and not has_template:
        raise ValueError("the chat template was asked for, but the tokenizer has none")
    if system_prompt is not None and not apply_chat_template:
        raise ValueError("a system prompt needs a chat template, and none is applied")

    prompts: list[Prompt] = []
    num_skipped = 0
    for number, problem, answer in _read_records(path, prompt_key, answer_key, flag):
        text = problem
        if apply_chat_template:
            messages = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
            messages.append({"role": "user", "content": problem})
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        # A template writes its own special tokens: adding the tokenizer's would double them.
        token_ids = tuple(tokenizer(text, add_special_tokens=not apply_chat_template)["input_ids"])
        if not token_ids:
            raise ValueError(f"{flag} {path}, line {number}: the prompt has no tokens")
        if len(token_ids) > max_prompt_length:
            num_skipped += 1
            continue
        prompts.append(Prompt(len(prompts), token_ids, text, answer))
    if not prompts:
        raise ValueError(
            f"{flag} {path}: all {num_skipped} prompts are longer than {max_prompt_length} tokens"
        )
    return PromptDataset(tuple(prompts), num_skipped)


def validate_prompt_file(
    path: str | os.PathLike[str],
    *,
    prompt_key: str | None = None,
    answer_key: str | None = None,
    flag: str = PROMPT_DATA_FLAG,
) -> int:
    """Check a prompt file without a tokenizer, in a second or so per 100,000 lines.

    Returns:
        The number of records.

    Raises:
        ValueError: as :func:`load_prompts`, for the file and its lines.
    """
    return sum(1 for _ in _read_records(path, prompt_key, answer_key, flag))


def read_jsonl_field(path: str | os.PathLike[str], key: str, *, flag: str) -> list[str]:
    """One text field of every record of a JSONL file; raises ValueError as :func:`load_prompts` does."""
    texts = [_text_field(record, key, where) for record, where, _ in _read_jsonl(path, flag)]
    if not texts:
        raise ValueError(f"{flag} {path}: no records in it")
    return texts


def final_answer(answer: str) -> str:
    """What follows the last ``####`` of a GSM8K answer, without thousands' commas; else the text itself."""
    if _GSM8K_MARK in answer:
        answer = _THOUSANDS_COMMA.sub("", answer.rpartition(_GSM8K_MARK)[2])
    return answer.strip()


def data_fingerprint(texts: Iterable[str]) -> str:
    """16 hexadecimal digits of the SHA-256 of a sequence of texts, their number and borders included."""
    digest = hashlib.sha256()
    for text in texts:
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()[:16]


class PromptCursor:
    """Endless epochs over ``num_prompts`` prompts; each epoch is a permutation of its own.

    The order depends on the seed and the epoch alone: not on how many prompts are taken at a time.

    Args:
        num_prompts: size of the data set.
        seed: of the permutations.
        shuffle: False takes every epoch in the file's order.
    """

    def __init__(self, num_prompts: int, *, seed: int, shuffle: bool = True) -> None:
        if num_prompts < 1:
            raise ValueError(f"a cursor needs at least one prompt, got {num_prompts}")
        self.num_prompts = num_prompts
        self._seed = seed
        self._shuffle = shuffle
        self._start_epoch(0, 0)

    @property
    def epoch(self) -> int:
        """Epoch of the next prompt, from 0."""
        return self._epoch + (self._position == self.num_prompts)

    def next(self, n: int) -> list[int]:
        """The next ``n`` positions in the data set, going on into the next epoch where one ends."""
        taken: list[int] = []
        while len(taken) < n:
            if self._position == self.num_prompts:
                self._start_epoch(self._epoch + 1, 0)
            part = self._order[self._position : self._position + n - len(taken)]
            self._position += len(part)
            taken += part
        return taken

    def state_dict(self) -> dict[str, int | bool]:
        """Everything needed to go on from here, as plain numbers."""
        return {
            "num_prompts": self.num_prompts,
            "seed": self._seed,
            "shuffle": self._shuffle,
            "epoch": self._epoch,
            "position": self._position,
        }

    def load_state_dict(self, state: dict[str, int | bool]) -> None:
        """Go on where ``state`` was taken; its seed and shuffling replace this cursor's.

        Raises:
            ValueError: the state is of a data set of another size, or not a cursor's state.
        """
        if set(state) != set(self.state_dict()):
            raise ValueError(f"not the state of a prompt cursor: its keys are {sorted(state)}")
        if state["num_prompts"] != self.num_prompts:
            raise ValueError(
                f"the checkpoint's cursor goes over {state['num_prompts']} prompts, "
                f"but the prompt data now has {self.num_prompts}"
            )
        if not (0 <= state["position"] <= self.num_prompts and state["epoch"] >= 0):
            raise ValueError(f"not the state of a prompt cursor: {state}")
        self._seed, self._shuffle = int(state["seed"]), bool(state["shuffle"])
        self._start_epoch(int(state["epoch"]), int(state["position"]))

    def _start_epoch(self, epoch: int, position: int) -> None:
        self._epoch, self._position = epoch, position
        self._order = list(range(self.num_prompts))
        if self._shuffle:
            # A text seed goes through SHA-512: neighbouring seeds and epochs share nothing.
            random.Random(f"{self._seed}:{epoch}").shuffle(self._order)


def _read_records(
    path: str | os.PathLike[str], prompt_key: str | None, answer_key: str | None, flag: str
) -> Iterator[tuple[int, str, str]]:
    """(line number, problem, final answer) of every record; raises ValueError, also for an empty file."""
    empty = True
    for record, where, number in _read_jsonl(path, flag):
        empty = False
        prompt_key = prompt_key or _detect_key(record, PROMPT_KEYS, where)
        answer_key = answer_key or _detect_key(record, ANSWER_KEYS, where)
        problem = _text_field(record, prompt_key, where)
        answer = final_answer(_text_field(record, answer_key, where, allow_integer=True))
        if not answer:
            raise ValueError(f"{where}: field {answer_key!r} has no final answer")
        yield number, problem, answer
    if empty:
        raise ValueError(f"{flag} {path}: no records in it")


def _read_jsonl(path: str | os.PathLike[str], flag: str) -> Iterator[tuple[dict[str, Any], str, int]]:
    """(record, "flag path, line n", n) of every line that is not blank."""
    try:
        file = open(path, "rb")
    except OSError as error:
        raise ValueError(f"{flag} {path}: {error.strerror or error}") from error
    with file:
        for number, line in enumerate(file, start=1):
            where = f"{flag} {path}, line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if not text.strip():
                    continue
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: not JSON: {_one_line(error)}") from error
            if not isinstance(record, dict):
                raise ValueError(f"{where}: not a JSON object but {type(record).__name__}")
            yield record, where, number


def _detect_key(record: dict[str, Any], keys: Sequence[str], where: str) -> str:
    for key in keys:
        if key in record:
            return key
    raise ValueError(f"{where}: none of the fields {', '.join(keys)} is there")


def _text_field(record: dict[str, Any], key: str, where: str, *, allow_integer: bool = False) -> str:
    if key not in record:
        raise ValueError(f"{where}: no field {key!r}")
    value = record[key]
    if allow_integer and isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise ValueError(f"{where}: field {key!r} is not text but {type(value).__name__}")
    if not value.strip():
        raise ValueError(f"{where}: field {key!r} is empty")
    return value


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
