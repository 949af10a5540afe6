#!/usr/bin/env python3
"""Evaluate a checkpoint or a running vLLM on benchmarks, or grade samples that are there already.

  tools/evaluate.py --checkpoint DIR --data aime24.jsonl amc23.jsonl --output results
  tools/evaluate.py --server http://host:8000 --tokenizer DIR --data aime24.jsonl --output results
  tools/evaluate.py --from-samples samples.jsonl --output results

avg@k, maj@k, pass@k, lengths and diversity, with bootstrap intervals: on the terminal and in --output. An
interrupted evaluation goes on where it stopped when it is started again with the same options. An error is
one line; exit code 2 for a wrong option or file, 1 when the evaluation fails.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from siren_megatron.evaluation.command import check_options, run  # noqa: E402


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(message)


def build_parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(
        prog="evaluate.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    source = parser.add_argument_group("what is evaluated: one of").add_mutually_exclusive_group(
        required=True
    )
    source.add_argument(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="a Hugging Face checkpoint, a Megatron checkpoint, or a run's directory (its newest checkpoint)",
    )
    source.add_argument(
        "--server", metavar="URL", help="a running vLLM, http://host:port; its key in VLLM_API_KEY"
    )
    source.add_argument(
        "--from-samples",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="JSONL with problem, answer and responses: they are graded, no model is loaded",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory of the results")
    parser.add_argument("--overwrite", action="store_true", help="throw away the samples in --output")
    parser.add_argument("--check", action="store_true", help="check the options and end")

    group = parser.add_argument_group("benchmarks")
    group.add_argument(
        "--data", type=Path, nargs="+", metavar="FILE", help="JSONL or .parquet files of problems and answers"
    )
    group.add_argument("--prompt-key", help="field of the problem (default: problem, question or prompt)")
    group.add_argument("--prompt-answer-key", help="field of the answer (default: answer or solution)")
    group.add_argument("--prompt-system", help="system message of the chat template")
    group.add_argument("--prompt-template", help="plain text instead of a chat template, with {prompt} in it")
    group.add_argument(
        "--prompt-chat-template",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="apply the tokenizer's chat template (default: where it has one)",
    )

    group = parser.add_argument_group("sampling")
    group.add_argument("--num-samples", type=int, default=16, help="responses of a problem (default: 16)")
    group.add_argument("--temperature", type=float, default=0.6, help="0 = greedy (default: 0.6)")
    group.add_argument("--top-p", type=float, default=0.7, help="nucleus (default: 0.7)")
    group.add_argument("--max-tokens", type=int, default=3072, help="budget of a response (default: 3072)")
    group.add_argument("--seed", type=int, default=0, help="of the samples and the bootstrap (default: 0)")

    group = parser.add_argument_group("grading")
    group.add_argument(
        "--reward", choices=REWARD_NAMES, help="what says that a response is right (default: math)"
    )
    group.add_argument("--reward-function", metavar="PATH.py:NAME", help="own reward: right from 0.5 on")
    group.add_argument("--grading-workers", type=int, default=2, help="processes (default: 2)")
    group.add_argument(
        "--grading-time-limit", type=float, default=5.0, help="seconds for one response (default: 5)"
    )

    group = parser.add_argument_group("model and server")
    group.add_argument("--tokenizer", type=Path, help="tokenizer directory or .model file")
    group.add_argument(
        "--config-from",
        type=Path,
        metavar="DIR",
        help="Hugging Face checkpoint with the configuration and tokenizer of a Megatron checkpoint",
    )
    group.add_argument("--bf16", action="store_true", help="serve in bfloat16 (default: float32)")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    group.add_argument("--tensor-parallel-size", type=int, default=1, help="GPUs of the server (default: 1)")
    group.add_argument("--kv-cache-mb", type=int, default=256, help="KV cache on a CPU, MiB (default: 256)")
    group.add_argument(
        "--gpu-memory-utilization", type=float, default=0.9, help="share of a GPU's memory (default: 0.9)"
    )
    group.add_argument("--max-in-flight", type=int, default=64, help="problems asked at a time (default: 64)")
    group.add_argument(
        "--request-timeout", type=float, default=3600.0, help="seconds for a problem (default: 3600)"
    )
    return parser


REWARD_NAMES = ("countdown", "exact", "math", "rewrite")


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns the exit code."""
    try:
        options = build_parser().parse_args(argv)
        check_options(options)
        return 0 if options.check else run(options)
    except ValueError as error:
        print(f"evaluate.py: error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, OSError) as error:
        print(f"evaluate.py: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("evaluate.py: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
