"""A run of an evaluation: benchmarks are sampled with vLLM, graded and summarised.

Samples are written as they come, so that an interrupted evaluation asks only for what is missing. Neither
torch nor Megatron is imported here; vLLM runs in its own process.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from siren_megatron.data.prompts import PromptDataset, load_prompts
from siren_megatron.evaluation.graded import GradedProblem, Grader, Problem
from siren_megatron.evaluation.results import Summary, summarise, write_text
from siren_megatron.evaluation.sample_files import SampleWriter

SETTINGS_FILE = "settings.json"
SAMPLES_DIRECTORY = "samples"


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn.

    Args:
        num_samples: responses of a problem.
        temperature: of the softmax; 0 is greedy.
        top_p: nucleus, in (0, 1].
        max_tokens: token budget of a response.
        seed: of all of them.
    """

    num_samples: int
    temperature: float
    top_p: float
    max_tokens: int
    seed: int


@dataclass(frozen=True)
class Benchmark:
    """A named set of problems, tokenised."""

    name: str
    dataset: PromptDataset


def load_benchmarks(
    paths: Sequence[Path], tokenizer: Any, *, max_prompt_length: int, flag: str, **rendering: Any
) -> list[Benchmark]:
    """Tokenise benchmark files; a file's name without its ending is the benchmark's.

    Args:
        rendering: as :func:`siren_megatron.data.prompts.load_prompts` takes it.

    Raises:
        ValueError: as load_prompts; also a problem that is too long, as its result would silently be missing.
    """
    benchmarks = []
    for path in paths:
        dataset = load_prompts(path, tokenizer, max_prompt_length=max_prompt_length, flag=flag, **rendering)
        if dataset.num_skipped_too_long:
            raise ValueError(
                f"{flag} {path}: {dataset.num_skipped_too_long} problem(s) are longer than "
                f"{max_prompt_length} tokens, what the context leaves beside a response"
            )
        benchmarks.append(Benchmark(path.stem, dataset))
    return benchmarks


def sample_benchmark(
    benchmark: Benchmark,
    client: Any,
    tokenizer: Any,
    sampling: Sampling,
    *,
    writer: SampleWriter | None = None,
    on_problem: Callable[[int], None] | None = None,
) -> list[Problem]:
    """Responses to every problem of a benchmark.

    Args:
        client: a RolloutClient.
        tokenizer: decodes the responses; its end of sequence ends them.
        writer: has the problems that are done, and takes the others as they come.
        on_problem: told the number of responses of each problem that is done, at once.

    Raises:
        RolloutError: as the client.
    """
    prompts = benchmark.dataset.prompts
    missing = [index for index in range(len(prompts)) if writer is None or index not in writer.done]
    found: dict[int, Problem] = {}

    def take(position: int, samples: Sequence[Any]) -> None:
        index = missing[position]
        responses = tuple(tokenizer.decode(s.response_ids, skip_special_tokens=True) for s in samples)
        lengths = tuple(len(s.response_ids) for s in samples)
        truncated = tuple(s.finish_reason == "length" for s in samples)
        prompt = prompts[index]
        if writer is None:
            found[index] = Problem(prompt.text, prompt.answer, responses, lengths, truncated)
        else:
            writer.write(index, responses, lengths, truncated)
        if on_problem is not None:
            on_problem(len(samples))

    if missing:
        client.generate(
            [prompts[index].token_ids for index in missing],
            num_samples=sampling.num_samples,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            stop_token_ids=[tokenizer.eos_token_id],
            stream_ids=missing,
            logprobs=False,
            on_group=take,
        )
    return writer.problems() if writer is not None else [found[index] for index in range(len(prompts))]


def evaluate_benchmark(
    benchmark: Benchmark,
    client: Any,
    tokenizer: Any,
    sampling: Sampling,
    grader: Grader,
    **sampled: Any,
) -> tuple[Summary, list[GradedProblem]]:
    """Sample, grade and summarise one benchmark; `sampled` goes to :func:`sample_benchmark`."""
    problems = sample_benchmark(benchmark, client, tokenizer, sampling, **sampled)
    graded = grader.grade(problems)
    return summarise(benchmark.name, graded, seed=sampling.seed), graded


def prepare_output(directory: Path, settings: Mapping[str, Any], *, overwrite: bool) -> bool:
    """The output directory with settings.json; whether an evaluation of the same settings is resumed.

    Args:
        directory: made where it is missing.
        settings: everything that decides the samples: other ones are another evaluation.
        overwrite: throw an earlier evaluation's samples away.

    Raises:
        ValueError: it holds an evaluation with other settings, or something else; the message names the first
            that differs.
    """
    path = directory / SETTINGS_FILE
    text = json.dumps(settings, indent=2, default=str) + "\n"
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"--output {directory} is not a directory")
    if path.exists() and not overwrite:
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"--output {directory}: {SETTINGS_FILE} cannot be read: {error}") from error
        wanted = json.loads(text)
        for key in {**before, **wanted}:
            if before.get(key) != wanted.get(key):
                raise ValueError(
                    f"--output {directory} holds an evaluation with {key} {before.get(key)!r}, not "
                    f"{wanted.get(key)!r}: give --overwrite or another --output"
                )
        return True
    if directory.is_dir() and any(directory.iterdir()) and not path.exists():
        raise ValueError(f"--output {directory} exists and holds no evaluation: give another --output")
    if overwrite:
        shutil.rmtree(directory / SAMPLES_DIRECTORY, ignore_errors=True)
    (directory / SAMPLES_DIRECTORY).mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    return False


def write_graded(path: Path, graded: Sequence[GradedProblem]) -> Path:
    """A JSONL row a problem, in order: problem, answer, responses, `correct`, the extracted `answers`."""
    rows = [
        {
            "problem": problem.sample.problem,
            "answer": problem.sample.answer,
            "correct": list(problem.correct),
            "answers": list(problem.answers),
            "groups": list(problem.groups),
            "responses": list(problem.sample.responses),
        }
        for problem in graded
    ]
    return write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
