"""Options of evaluations: those of `tools/evaluate.py` and of the evaluation during training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from siren_megatron.data.prompt_files import validate_prompt_file
from siren_megatron.options import option


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Evaluation during training. Its files are rendered and graded as `--prompt-data` is."""

    eval_interval: int = option(0, "steps between evaluations, the last step's included; 0 = none", minimum=0)
    eval_data: tuple[Path, ...] | None = option(
        None, "JSONL or .parquet benchmark file(s)", type=Path, several=True
    )
    eval_num_samples: int = option(16, "responses of one problem", minimum=1)
    eval_temperature: float = option(0.6, "sampling temperature; 0 = greedy", minimum=0)
    eval_top_p: float = option(0.7, "nucleus of the sampling distribution", above=0, maximum=1)
    eval_max_response_length: int = option(
        0, "most tokens of a response; 0 = --rollout-max-response-length", minimum=0
    )
    eval_at_start: bool = option(False, "evaluate the initial policy as well, as step 0 of eval.jsonl")
    eval_last_data: tuple[Path, ...] | None = option(
        None,
        "JSONL or .parquet benchmark file(s) for the policy of the last step; graded responses are kept",
        type=Path,
        several=True,
    )
    eval_last_num_samples: int = option(
        0, "responses of one problem of --eval-last-data; 0 = --eval-num-samples", minimum=0
    )

    def __post_init__(self):
        for name in ("eval_data", "eval_last_data"):
            paths = getattr(self, name)
            if paths is not None:
                paths = (paths,) if isinstance(paths, str | Path) else paths
                object.__setattr__(self, name, tuple(Path(path) for path in paths))


def check_evaluation(
    options: EvaluationOptions, *, prompt_key: str | None, answer_key: str | None, seq_length: int
) -> None:
    """Refuse evaluation options that are wrong; the files are read.

    Raises:
        ValueError: one line that names the option.
    """
    if options.eval_data is None:
        for name, wanted in (("interval", options.eval_interval), ("at-start", options.eval_at_start)):
            if wanted:
                raise ValueError(f"--eval-{name} needs --eval-data")
    elif not options.eval_interval and not options.eval_at_start:
        raise ValueError("--eval-data needs --eval-interval or --eval-at-start")
    if options.eval_last_data is None and options.eval_last_num_samples:
        raise ValueError("--eval-last-num-samples needs --eval-last-data")
    if options.eval_data is None and options.eval_last_data is None:
        return
    for name in ("--eval-num-samples", "--eval-last-num-samples"):
        num_samples = getattr(options, name.strip("-").replace("-", "_"))
        check_sampling(options.eval_temperature, num_samples, "--eval-temperature", name)
    if options.eval_max_response_length >= seq_length:
        raise ValueError(
            f"--eval-max-response-length {options.eval_max_response_length} leaves no room for a prompt in "
            f"--seq-length {seq_length}"
        )
    check_benchmarks(options.eval_data or (), "--eval-data", prompt_key, answer_key)
    check_benchmarks(options.eval_last_data or (), "--eval-last-data", prompt_key, answer_key)


def check_sampling(
    temperature: float, num_samples: int, temperature_flag: str, num_samples_flag: str
) -> None:
    """Greedy decoding gives one response only; raises ValueError, which names the options."""
    if temperature == 0 and num_samples > 1:
        raise ValueError(f"{temperature_flag} 0 is greedy: all of {num_samples_flag} {num_samples} are equal")


def check_benchmarks(
    paths: Sequence[Path], flag: str, prompt_key: str | None = None, answer_key: str | None = None
) -> None:
    """Read every file.

    Raises:
        ValueError: one of them is wrong, or two have the same name, under which results are kept.
    """
    names: dict[str, Path] = {}
    for path in paths:
        if path.stem in names:
            raise ValueError(f"{flag}: {names[path.stem]} and {path} have the same name {path.stem}")
        names[path.stem] = path
        validate_prompt_file(path, prompt_key=prompt_key, answer_key=answer_key, flag=flag)
