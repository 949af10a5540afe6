"""Evaluation during training: benchmarks every --eval-interval steps and at the end, by the run's own server.

Rank 0 does the work; the other ranks wait at the next collective, as they do during a rollout.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from siren_megatron.config import Config
from siren_megatron.evaluation.evaluate import Sampling, evaluate_benchmark, load_benchmarks, write_graded
from siren_megatron.evaluation.graded import Grader
from siren_megatron.evaluation.passk import ks_to_show
from siren_megatron.evaluation.results import Summary, write_text
from siren_megatron.rewards.pool import RewardPool

EVAL_FILE = "eval.jsonl"
LAST_DIRECTORY = "eval_last"
"""Holds `<benchmark>_graded.jsonl` of `--eval-last-data`, as `tools/evaluate.py` writes it."""


class TrainingEvaluation:
    """The benchmarks of a run. Tokenised once; sampled with the same seed at every evaluation.

    Args:
        config: the run's options.
        tokenizer: the run's.
        rewards: the run's pool: responses are graded as in training; a reward of at least 0.5 is right.

    Raises:
        ValueError: a benchmark cannot be used with this model.
    """

    def __init__(self, config: Config, tokenizer: Any, rewards: RewardPool) -> None:
        options, data = config.evaluation, config.data
        self._config, self._tokenizer = config, tokenizer
        max_tokens = options.eval_max_response_length or config.rollout.rollout_max_response_length
        load = partial(
            load_benchmarks,
            tokenizer=tokenizer,
            max_prompt_length=config.train.seq_length - max_tokens,
            prompt_key=data.prompt_key,
            answer_key=data.prompt_answer_key,
            system_prompt=data.prompt_system,
            apply_chat_template=data.prompt_chat_template,
            template=data.template_text,
        )
        self._benchmarks = load(options.eval_data or (), flag="--eval-data")
        self._last_benchmarks = load(options.eval_last_data or (), flag="--eval-last-data")
        self._sampling = Sampling(
            options.eval_num_samples,
            options.eval_temperature,
            options.eval_top_p,
            max_tokens,
            config.train.seed,
        )
        last_samples = options.eval_last_num_samples or options.eval_num_samples
        self._last_sampling = replace(self._sampling, num_samples=last_samples)
        self._grader = Grader(
            data.reward_name,
            num_workers=data.reward_num_workers,
            time_limit_s=data.reward_time_limit,
            pool=rewards,
        )
        self._path = config.run.save / EVAL_FILE
        self._latest: tuple[int, dict[str, float]] = (-1, {})

    def is_due(self, step: int) -> bool:
        """Whether the policy of this step is to be evaluated, and was not before an interruption."""
        due = self._in_between(step) or (self._is_last(step) and self._last_benchmarks)
        return bool(due) and all(row["step"] != step for row in self._rows())

    def _in_between(self, step: int) -> bool:
        options = self._config.evaluation
        if step == 0:
            return options.eval_at_start
        interval = options.eval_interval
        return bool(interval) and (step % interval == 0 or self._is_last(step))

    def _is_last(self, step: int) -> bool:
        return step == self._config.train.num_steps

    def _rows(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        text = self._path.read_text(encoding="utf-8")
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def run(self, step: int, client: Any, say: Callable[[str], None]) -> None:
        """Evaluate the policy that the server holds; eval.jsonl gets a row, with all metrics and intervals.

        Args:
            step: of the policy. Rows of later steps, of a run that is resumed here, are dropped.
            client: the run's RolloutService.
            say: prints a line.

        Raises:
            RolloutError: as the service.
        """
        row: dict[str, Any] = {"step": step}
        metrics: dict[str, float] = {}
        due = [(one, self._sampling, None) for one in self._benchmarks if self._in_between(step)]
        if self._is_last(step):
            for one in self._last_benchmarks:
                path = self._config.run.save / LAST_DIRECTORY / f"{one.name}_graded.jsonl"
                due.append((replace(one, name=f"{one.name}-last"), self._last_sampling, path))
        for benchmark, sampling, path in due:
            summary, graded = evaluate_benchmark(benchmark, client, self._tokenizer, sampling, self._grader)
            row[benchmark.name] = {
                name: {"value": e.value, "low": e.low, "high": e.high} for name, e in summary.metrics.items()
            }
            metrics |= shown_metrics(summary)
            shown = [f"{name} {summary.metrics[name]}" for name in headline(summary)]
            say(f"step {step}: eval {benchmark.name}  {'  '.join(shown)}")
            if path is not None:
                path.parent.mkdir(exist_ok=True)
                say(f"graded responses: {write_graded(path, graded)}")
        rows = [earlier for earlier in self._rows() if earlier["step"] < step]
        write_text(self._path, "".join(json.dumps(one) + "\n" for one in [*rows, row]))
        self._latest = (step, metrics)

    def metrics_of(self, step: int) -> dict[str, float]:
        """`eval/<benchmark>/<metric>` where this step was just evaluated, else nothing.

        avg, maj, pass@k of powers of two, length, truncation and diversity; eval.jsonl has the rest.
        """
        return self._latest[1] if self._latest[0] == step else {}

    def close(self) -> None:
        """End the processes that grouped answers, if there were any."""
        self._grader.__exit__()


def headline(summary: Summary) -> list[str]:
    """The metrics of a printed line."""
    n = summary.num_samples
    return list(dict.fromkeys([f"avg@{n}", f"maj@{n}", f"pass@{n}"]))


def shown_metrics(summary: Summary) -> dict[str, float]:
    """The metrics of a curve in the report: names without blanks, pass@k and maj@k of few k."""
    n = summary.num_samples
    wanted = {f"avg@{n}", f"maj@{n}", *(f"pass@{k}" for k in ks_to_show(n)[1:])}
    names = [name for name in summary.metrics if name in wanted or "@" not in name]
    plain = {name: re.sub(r"\W+", "_", name).strip("_") if "@" not in name else name for name in names}
    return {f"eval/{summary.name}/{plain[name]}": summary.metrics[name].value for name in names}
