"""Prompt files: JSONL and Parquet (the latter with pyarrow), read record by record and checked.

Every message is one line that names the option, the file and its line (JSONL) or row (Parquet).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

PROMPT_KEYS = ("problem", "question", "prompt")
ANSWER_KEYS = ("answer", "solution", "ground_truth", "label")
PROMPT_DATA_FLAG = "--prompt-data"
PARQUET_SUFFIX = ".parquet"
PARQUET_BATCH_ROWS = 1024

_GSM8K_MARK = "####"
_THOUSANDS_COMMA = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


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
        ValueError: the file cannot be read or has no records, or one of its lines or rows is wrong: no JSON
            object, a field that is missing, empty or not text, no answer after GSM8K's ``####``.
    """
    return sum(1 for _ in read_records(path, prompt_key, answer_key, flag))


def read_jsonl_field(path: str | os.PathLike[str], key: str, *, flag: str) -> list[str]:
    """One text field of every record; raises ValueError as :func:`validate_prompt_file` does."""
    texts = [_text_field(record, key, where) for record, where in _read_file(path, flag, {key})]
    if not texts:
        raise ValueError(f"{flag} {path}: no records in it")
    return texts


def final_answer(answer: str) -> str:
    """What follows the last ``####`` of a GSM8K answer, without thousands' commas; else the text itself."""
    if _GSM8K_MARK in answer:
        answer = _THOUSANDS_COMMA.sub("", answer.rpartition(_GSM8K_MARK)[2])
    return answer.strip()


def read_records(
    path: str | os.PathLike[str], prompt_key: str | None, answer_key: str | None, flag: str
) -> Iterator[tuple[str, str, str]]:
    """("flag path, line n", problem, final answer) of every record.

    Raises:
        ValueError: as :func:`validate_prompt_file`, also for a file without records.
    """
    empty = True
    columns = {*([prompt_key] if prompt_key else PROMPT_KEYS), *([answer_key] if answer_key else ANSWER_KEYS)}
    for record, where in _read_file(path, flag, columns):
        empty = False
        prompt_key = prompt_key or _detect_key(record, PROMPT_KEYS, where)
        answer_key = answer_key or _detect_key(record, ANSWER_KEYS, where)
        problem = _text_field(record, prompt_key, where)
        answer = final_answer(_text_field(record, answer_key, where, allow_integer=True))
        if not answer:
            raise ValueError(f"{where}: field {answer_key!r} has no final answer")
        yield where, problem, answer
    if empty:
        raise ValueError(f"{flag} {path}: no records in it")


def _read_file(
    path: str | os.PathLike[str], flag: str, columns: Collection[str]
) -> Iterator[tuple[dict[str, Any], str]]:
    """(record, "flag path, line n") of every record; of a Parquet file the named columns only."""
    try:
        file = open(path, "rb")
    except OSError as error:
        raise ValueError(f"{flag} {path}: {error.strerror or error}") from error
    with file:
        if Path(path).suffix.lower() == PARQUET_SUFFIX:
            yield from _read_parquet(file, f"{flag} {path}", columns)
        else:
            yield from _read_jsonl(file, f"{flag} {path}")


def _read_jsonl(file: BinaryIO, name: str) -> Iterator[tuple[dict[str, Any], str]]:
    for number, line in enumerate(file, start=1):
        where = f"{name}, line {number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if not text.strip():
                continue
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON: {_one_line(error)}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{where}: not a JSON object but {type(record).__name__}")
        yield record, where


def _read_parquet(
    file: BinaryIO, name: str, columns: Collection[str]
) -> Iterator[tuple[dict[str, Any], str]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(f"{name}: a Parquet file needs pyarrow (pip install pyarrow): {error}") from error
    number = 0
    try:
        table = parquet.ParquetFile(file)
        present = [column for column in table.schema_arrow.names if column in columns]
        for batch in table.iter_batches(PARQUET_BATCH_ROWS, columns=present, use_threads=False):
            # A batch without columns still has its rows: each is a record without fields.
            for record in batch.to_pylist() if present else [{}] * batch.num_rows:
                number += 1
                yield record, f"{name}, row {number}"
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        where = f" after row {number}" if number else ""
        raise ValueError(f"{name}: not a Parquet file that can be read{where}: {_one_line(error)}") from error


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
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where}: field {key!r} holds half a character (a lone surrogate)") from None
    return value


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
