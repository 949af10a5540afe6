"""Samples with verdicts: grading the responses of problems, and grouping those that give the same answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from siren_megatron.grading import extract_final_answer, kind_of
from siren_megatron.grading.groups import grouping_key, undecided_pairs
from siren_megatron.rewards.pool import RewardPool

SAME_ANSWER = "siren_megatron.grading:same_answer"
BATCH_PAIRS = 512  # graded between two calls of the progress


@dataclass(frozen=True)
class Problem:
    """The samples of one problem, not yet graded.

    Args:
        problem: its text; "" where it is not known.
        answer: the gold answer.
        responses: the texts.
        lengths: tokens of each response; None where nobody counted.
        truncated: whether each response was cut at the token budget; None where it is not known.
    """

    problem: str
    answer: str
    responses: tuple[str, ...]
    lengths: tuple[int, ...] | None = None
    truncated: tuple[bool, ...] | None = None


@dataclass(frozen=True)
class GradedProblem:
    """One problem's verdicts.

    Args:
        sample: what was graded.
        correct: verdict of each response.
        answers: extracted answer of each response, None where there is none.
        groups: number of the group of equal answers that each response is in; those without an answer are
            alone in theirs.
    """

    sample: Problem
    correct: tuple[bool, ...]
    answers: tuple[str | None, ...]
    groups: tuple[int, ...]

    @property
    def clusters(self) -> list[tuple[int, bool]]:
        """(number of responses, whether right) of each distinct answer, for maj@k."""
        members: dict[int, list[bool]] = {}
        for group, right in zip(self.groups, self.correct, strict=True):
            members.setdefault(group, []).append(right)
        # Every response of a group has the same verdict: right ones are grouped apart from wrong ones.
        return [(len(verdicts), verdicts[0]) for verdicts in members.values()]

    @property
    def num_distinct(self) -> int:
        """Distinct answers; responses without an answer count for none."""
        return len({g for g, a in zip(self.groups, self.answers, strict=True) if a is not None})

    @property
    def num_distinct_correct(self) -> int:
        """Distinct right answers: 1 where all right ones are equal, more where a task has several."""
        return len({g for g, right in zip(self.groups, self.correct, strict=True) if right})


@dataclass
class Grader:
    """Grades problems in worker processes. A context manager.

    Args:
        reward: name of the reward, as RewardPool takes it; a reward of at least 0.5 is a right response.
        num_workers: processes.
        time_limit_s: seconds for one response; past it, it is wrong.
        pool: grade in this pool instead (it is not closed).

    Attributes:
        num_timeouts, num_errors, first_error: of all grading so far.
    """

    reward: str
    num_workers: int = 2
    time_limit_s: float = 5.0
    pool: RewardPool | None = None
    num_timeouts: int = 0
    num_errors: int = 0
    first_error: str | None = None
    _own: list[RewardPool] = field(default_factory=list)
    _grouping: RewardPool | None = None

    def __enter__(self) -> Grader:
        if self.pool is None:
            self.pool = self._start(self.reward)
        return self

    def __exit__(self, *_: object) -> None:
        while self._own:
            self._own.pop().close()

    def _start(self, reward: str) -> RewardPool:
        pool = RewardPool(reward, num_workers=self.num_workers, time_limit_s=self.time_limit_s)
        self._own.append(pool)
        return pool

    def grade(
        self, problems: Sequence[Problem], on_done: Callable[[int], None] | None = None
    ) -> list[GradedProblem]:
        """Verdicts and groups of all responses.

        Args:
            problems: in any number.
            on_done: told how many responses were graded since its last call.
        """
        verdicts = self._verdicts(problems, on_done)
        answers = [self._answers(problem) for problem in problems]
        return self._grouped(problems, verdicts, answers)

    def _verdicts(
        self, problems: Sequence[Problem], on_done: Callable[[int], None] | None
    ) -> list[tuple[bool, ...]]:
        pairs = [(response, problem.answer) for problem in problems for response in problem.responses]
        # All are submitted at once: a pair that hangs keeps one worker only.
        pending = [self.pool.submit(pairs[i : i + BATCH_PAIRS]) for i in range(0, len(pairs), BATCH_PAIRS)]
        rewards: list[float] = []
        for submission in pending:
            result = submission.result()
            rewards += result.rewards
            self.num_timeouts += result.num_timeouts
            self.num_errors += result.num_errors
            self.first_error = self.first_error or result.first_error
            if on_done is not None:
                on_done(len(result.rewards))
        verdicts, start = [], 0
        for problem in problems:
            end = start + len(problem.responses)
            verdicts.append(tuple(reward >= 0.5 for reward in rewards[start:end]))
            start = end
        return verdicts

    def _answers(self, problem: Problem) -> tuple[str | None, ...]:
        if self.reward != "math":
            return tuple(response.strip() or None for response in problem.responses)
        kind = kind_of(problem.answer)
        answers = (extract_final_answer(response[-50_000:], kind) for response in problem.responses)
        return tuple(answer.strip() or None if answer is not None else None for answer in answers)

    def _grouped(
        self,
        problems: Sequence[Problem],
        verdicts: Sequence[tuple[bool, ...]],
        answers: Sequence[tuple[str | None, ...]],
    ) -> list[GradedProblem]:
        """Put equal answers into one group.

        With the reward math the right ones are one group, as all equal the gold answer; wrong ones are
        grouped by spelling and exact value, and what these leave open is asked of the grader.
        """
        is_math = self.reward == "math"
        keys: list[list[str]] = []
        asked: list[tuple[int, str, str]] = []  # problem, two keys
        texts: list[dict[str, str]] = []  # key -> an answer, by problem
        for number, (right, found) in enumerate(zip(verdicts, answers, strict=True)):
            row = []
            for index, (correct, answer) in enumerate(zip(right, found, strict=True)):
                if correct and is_math:
                    row.append("right")
                elif answer is None:
                    row.append(f"none {index}")
                else:
                    key = grouping_key(answer) if is_math else answer
                    row.append(f"{'right' if correct else 'wrong'} {key}")
            keys.append(row)
            texts.append({key: a for key, a in zip(row, found, strict=True) if key.startswith("wrong ")})
            if is_math:
                asked += [(number, a, b) for a, b in undecided_pairs(texts[-1])]
        equal = self._same(asked, texts)
        graded = []
        for number, problem in enumerate(problems):
            names = _merged(keys[number], equal.get(number, []))
            groups = {name: index for index, name in enumerate(dict.fromkeys(names))}
            graded.append(
                GradedProblem(problem, verdicts[number], answers[number], tuple(groups[n] for n in names))
            )
        return graded

    def _same(
        self, asked: Sequence[tuple[int, str, str]], texts: Sequence[dict[str, str]]
    ) -> dict[int, list[tuple[str, str]]]:
        """Which of the asked pairs of keys are the same answer, by problem."""
        if not asked:
            return {}
        if self._grouping is None:
            self._grouping = self._start(SAME_ANSWER)
        result = self._grouping.score([(texts[n][a], texts[n][b]) for n, a, b in asked])
        equal: dict[int, list[tuple[str, str]]] = {}
        for (number, a, b), same in zip(asked, result.rewards, strict=True):
            if same:
                equal.setdefault(number, []).append((a, b))
        return equal


def _merged(keys: Sequence[str], equal: Sequence[tuple[str, str]]) -> list[str]:
    """Keys with each replaced by the first that it is equal to, over chains of pairs."""
    parent = {key: key for key in keys}

    def root(key: str) -> str:
        while parent[key] != key:
            key = parent[key]
        return key

    for a, b in equal:
        parent[root(b)] = root(a)
    return [root(key) for key in keys]


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; NaN without values."""
    return math.fsum(values) / len(values) if values else math.nan
