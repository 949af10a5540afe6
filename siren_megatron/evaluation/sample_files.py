"""JSONL files of samples: written a problem at a time, resumed after an interruption, read for grading."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from siren_megatron.data.prompt_files import PROMPT_KEYS, final_answer
from siren_megatron.evaluation.graded import Problem

SAMPLES_FLAG = "--from-samples"


def read_samples(path: Path, *, flag: str = SAMPLES_FLAG) -> list[Problem]:
    """The problems of a JSONL file with `problem`, `answer` and `responses` (a list of texts) in each record.

    `lengths` (tokens of each response) and `truncated` (booleans) are read where they are. An answer may be a
    number, or a list of texts (all of them are wanted then); of a GSM8K answer what follows ``####`` counts.

    Args:
        path: the file; blank lines are passed over.
        flag: the option that named it, for the messages.

    Raises:
        ValueError: the file cannot be read, is empty, or one of its lines is wrong; one line that names it.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ValueError(f"{flag} {path}: {error.strerror or error}") from error
    problems = []
    for number, line in enumerate(lines, start=1):
        where = f"{flag} {path}, line {number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if not text.strip():
                continue
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON: {' '.join(str(error).split())[:200]}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{where}: not a JSON object but {type(record).__name__}")
        problems.append(_problem(record, where))
    if not problems:
        raise ValueError(f"{flag} {path}: no records in it")
    return problems


def _problem(record: Mapping[str, Any], where: str) -> Problem:
    if "answer" not in record:
        raise ValueError(f"{where}: no field 'answer'")
    responses = record.get("responses")
    if not isinstance(responses, list) or not all(isinstance(text, str) for text in responses):
        raise ValueError(f"{where}: field 'responses' is not a list of texts")
    text = next((record[key] for key in PROMPT_KEYS if isinstance(record.get(key), str)), "")
    extras = {}
    for key, kind in (("lengths", int), ("truncated", bool)):
        values = record.get(key)
        if values is None:
            continue
        if not isinstance(values, list) or [type(v) for v in values] != [kind] * len(responses):
            raise ValueError(f"{where}: field {key!r} is not a list of one {kind.__name__} a response")
        extras[key] = tuple(values)
    return Problem(text, _answer(record["answer"], where), tuple(responses), **extras)


def _answer(value: Any, where: str) -> str:
    if isinstance(value, list) and value:
        value = ", ".join(_answer(item, where) for item in value)
    if isinstance(value, bool):
        value = "True" if value else "False"
    elif isinstance(value, int | float):
        value = repr(value)
    if not isinstance(value, str):
        raise ValueError(f"{where}: field 'answer' is not text but {type(value).__name__}")
    return final_answer(value)


class SampleWriter:
    """Appends a line a problem as it is sampled; what an earlier, interrupted run wrote is kept.

    Args:
        path: the JSONL file.
        prompts: (prompt text, answer) of every problem, in the benchmark's order.
        num_samples: responses of a problem.

    Attributes:
        done: index of the problem -> its record, those found in the file included.

    Raises:
        ValueError: the file holds samples of other problems.
    """

    def __init__(self, path: Path, prompts: Sequence[tuple[str, str]], num_samples: int) -> None:
        self.path, self.prompts, self.num_samples = path, prompts, num_samples
        self.done: dict[int, dict[str, Any]] = {}
        if path.exists():
            self._read()
        # Drops a torn last line, which the next append would otherwise join.
        temporary = path.with_name(f".{path.name}.tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(_line(record) for record in self.done.values())
        os.replace(temporary, path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)

    def _read(self) -> None:
        text = self.path.read_text(encoding="utf-8")
        for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), start=1):
            try:
                record = json.loads(line)
                index = record["index"]
                known = (record["problem"], record["answer"]) == tuple(self.prompts[index])
                if not known or len(record["responses"]) != self.num_samples:
                    raise ValueError("it is of another problem")
            except (ValueError, KeyError, TypeError, IndexError) as error:
                raise ValueError(
                    f"--output: {self.path}, line {number} is not a sample of this evaluation ({error}): "
                    "give --overwrite or another --output"
                ) from error
            self.done[index] = record

    def write(
        self, index: int, responses: Sequence[str], lengths: Sequence[int], truncated: Sequence[bool]
    ) -> None:
        """Append the responses of a problem."""
        problem, answer = self.prompts[index]
        record = {
            "index": index,
            "problem": problem,
            "answer": answer,
            "responses": list(responses),
            "lengths": list(lengths),
            "truncated": list(truncated),
        }
        self.done[index] = record
        self._file.write(_line(record))
        self._file.flush()

    def problems(self) -> list[Problem]:
        """What is there, in the benchmark's order."""
        records = [self.done[index] for index in sorted(self.done)]
        return [
            Problem(
                record["problem"],
                record["answer"],
                tuple(record["responses"]),
                tuple(record["lengths"]),
                tuple(record["truncated"]),
            )
            for record in records
        ]

    def close(self) -> None:
        self._file.close()


def _line(record: Mapping[str, Any]) -> str:
    # As ASCII: lone surrogates are no UTF-8.
    return json.dumps(record) + "\n"
