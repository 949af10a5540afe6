"""Tokenizers: Hugging Face directories and SentencePiece `.model` files, never downloaded.

Importing this module needs the standard library only; transformers or sentencepiece is loaded when called.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

SENTENCEPIECE_SUFFIX = ".model"
SENTENCEPIECE_NAME = "tokenizer.model"
_HUGGING_FACE_NAMES = ("tokenizer.json", "tokenizer_config.json")
_TOKENIZER_NAMES = (
    *_HUGGING_FACE_NAMES,
    SENTENCEPIECE_NAME,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def sentencepiece_file(path: Path) -> Path | None:
    """The SentencePiece model that ``path`` stands for, or None where it is a Hugging Face tokenizer's."""
    if path.suffix == SENTENCEPIECE_SUFFIX and not path.is_dir():
        return path
    if not (path / SENTENCEPIECE_NAME).is_file() or any((path / n).exists() for n in _HUGGING_FACE_NAMES):
        return None
    return path / SENTENCEPIECE_NAME


def check_tokenizer_path(path: Path, *, flag: str = "--tokenizer") -> None:
    """See that a tokenizer may be there, without loading it.

    Raises:
        ValueError: the path is neither a directory nor a SentencePiece ``.model`` file.
    """
    if path.is_dir():
        return
    if not path.exists():
        raise ValueError(f"{flag} {path}: no such directory or file")
    if path.suffix != SENTENCEPIECE_SUFFIX:
        raise ValueError(f"{flag} {path}: neither a directory nor a SentencePiece .model file")


def load_tokenizer(path: str | os.PathLike[str], *, flag: str = "--hf-checkpoint"):
    """The tokenizer of a checkpoint directory, or a SentencePiece ``.model`` file.

    A directory with ``tokenizer.model`` but no ``tokenizer.json`` and no ``tokenizer_config.json`` gives
    a :class:`SentencePieceTokenizer`, as such a file does; every other directory is transformers' to load.

    Args:
        path: the directory or file.
        flag: the option that named it, for the messages.

    Raises:
        ValueError: there is no tokenizer that loads, or it has no end of sequence.
    """
    path = Path(path)
    if (model := sentencepiece_file(path)) is not None:
        return SentencePieceTokenizer(model, flag=flag)
    if not path.is_dir():
        raise ValueError(f"{flag} {path}: no such directory")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # transformers 5 rebuilds some tokenizers from the class of the model's type and drops the splitting
    # rules of tokenizer.json: other token ids, silently. The plain class takes the file as it is.
    loader = PreTrainedTokenizerFast if (path / "tokenizer.json").is_file() else AutoTokenizer
    try:
        tokenizer = loader.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain ones, others what damaged JSON leads to
        message = " ".join(str(error).split())[:300]
        raise ValueError(f"{flag} {path}: no tokenizer loads from it: {message}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{flag} {path}: its tokenizer has no end-of-sequence token")
    return tokenizer


class SentencePieceTokenizer:
    """A SentencePiece model with the part of a Hugging Face tokenizer's interface that a run uses.

    Args:
        path: the ``.model`` file.
        flag: the option that named it, for the messages.

    Attributes:
        eos_token_id, bos_token_id: end and begin of sequence; the latter None where the model has none.
        chat_template: None, as such a file holds none.

    Raises:
        ValueError: no SentencePiece model loads from the file, or it has no end of sequence.
    """

    chat_template = None

    def __init__(self, path: str | os.PathLike[str], *, flag: str = "--tokenizer") -> None:
        from sentencepiece import SentencePieceProcessor

        self._model = SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(Path(path).read_bytes())
        except OSError as error:
            raise ValueError(f"{flag} {path}: {error.strerror or error}") from error
        except RuntimeError as error:
            message = " ".join(str(error).split())[:300]
            raise ValueError(f"{flag} {path}: not a SentencePiece model: {message}") from error
        if self._model.eos_id() < 0:
            raise ValueError(f"{flag} {path}: its tokenizer has no end-of-sequence token")
        self.eos_token_id: int = self._model.eos_id()
        self.bos_token_id: int | None = self._model.bos_id() if self._model.bos_id() >= 0 else None

    def __len__(self) -> int:
        return self._model.get_piece_size()

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """As a Hugging Face tokenizer answers: the ids under "input_ids"."""
        return {"input_ids": self.encode(text, add_special_tokens=add_special_tokens)}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids, after the begin of sequence where the model has one and special tokens are asked for."""
        begin = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        return [*begin, *self._model.encode(text)]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of token ids.

        Args:
            ids: those beyond the tokenizer (a model's embedding may be padded) count as unknown.
            skip_special_tokens: leave control tokens out, as begin and end of sequence; the unknown token
                stays visible, so that no answer is read out of what is left.
        """
        known = [i if 0 <= i < len(self) else self._model.unk_id() for i in map(int, ids)]
        texts = []
        for is_control, run in groupby(known, self._model.is_control):
            if not is_control:
                texts.append(self._model.decode(list(run)))
            elif not skip_special_tokens:
                texts += [self._model.id_to_piece(i) for i in run]
        return "".join(texts)


def replace_tokenizer_files(source: Path, target: Path) -> None:
    """Put the tokenizer of ``source`` in the place of the one of an exported checkpoint.

    Args:
        source: a directory or a SentencePiece ``.model`` file, as :func:`load_tokenizer` takes it.
        target: the checkpoint's directory.
    """
    for name in _TOKENIZER_NAMES:
        (target / name).unlink(missing_ok=True)
    if (model := sentencepiece_file(source)) is not None:
        shutil.copy(model, target / SENTENCEPIECE_NAME)
        return
    for name in _TOKENIZER_NAMES:
        if (source / name).is_file():
            shutil.copy(source / name, target / name)
