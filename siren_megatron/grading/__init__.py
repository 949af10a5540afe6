"""Grading: the final answer of a response, and whether it is the right one. math-verify has the last word.

The one grader of the program: the reward ``math``, `tools/evaluate.py` and the evaluation during training.
Model text is data here: it is searched and parsed by grammars, never evaluated as code. It may still be made
to take long, so it is graded in the processes of :class:`siren_megatron.rewards.pool.RewardPool`.
"""

from siren_megatron.grading.equivalence import equivalent
from siren_megatron.grading.extraction import extract_final_answer, kind_of

MAX_BARE_CHARS = 60
"""Length of a response that may be an answer as a whole."""

__all__ = ["equivalent", "extract_final_answer", "grade", "kind_of", "same_answer"]


def grade(response: str, answer: str) -> float:
    """1 when the response's final answer is mathematically the ``answer``, else 0.

    Args:
        response: its final answer is found by :func:`extract_final_answer`.
        answer: the gold answer: a number, LaTeX with or without dollar signs, a choice's letter, words.
    """
    candidate = extract_final_answer(response, kind_of(answer))
    if candidate is not None and equivalent(candidate, answer):
        return 1.0
    # A response that is nothing but its answer, of a form that extraction would take apart: "July 4th, 1776".
    whole = response.strip().rstrip(".")
    is_bare = "\n" not in whole and len(whole) <= MAX_BARE_CHARS and whole != candidate
    return float(is_bare and equivalent(whole, answer))


def same_answer(first: str, second: str) -> float:
    """1 when two extracted answers are the same, without any rounding: how answers are grouped for maj@k."""
    return float(equivalent(first, second, strict=True) or equivalent(second, first, strict=True))
