"""Prompts that take the place of dropped ones."""

from __future__ import annotations

import pytest

from siren_megatron.rollout.client import RolloutError
from siren_megatron.rollout.redraw import MAX_REDRAWS, sample_with_redraws


def run(slow, prompts):
    """Prompts are numbers here; those in `slow` are dropped. Returns (result, calls of sample, drawn)."""
    calls, stock, drawn = [], iter(range(100, 200)), []

    def sample(prompts, redraw):
        calls.append((list(prompts), redraw))
        return [[] if prompt in slow else [f"response to {prompt}"] for prompt in prompts]

    def draw(count):
        new = [next(stock) for _ in range(count)]
        drawn.extend(new)
        return new

    return sample_with_redraws(prompts, sample=sample, draw=draw), calls, drawn


def test_nothing_is_drawn_where_nothing_was_dropped():
    (prompts, groups), calls, drawn = run(set(), [1, 2])
    assert (prompts, groups) == ([1, 2], [["response to 1"], ["response to 2"]])
    assert calls == [([1, 2], 0)] and drawn == []


def test_the_next_prompts_of_the_data_stand_in_the_dropped_ones_places():
    (prompts, groups), calls, drawn = run({2, 4, 101}, [1, 2, 3, 4])
    assert prompts == [1, 100, 3, 102]
    assert groups == [[f"response to {prompt}"] for prompt in prompts]
    assert calls == [([1, 2, 3, 4], 0), ([100, 101], 1), ([102], 2)]
    assert drawn == [100, 101, 102]


def test_a_limit_too_short_for_all_ends_in_one_line_that_names_it():
    with pytest.raises(
        RolloutError, match="1 prompt.s. were dropped .*raise --rollout-request-timeout"
    ) as caught:
        run({2, *range(100, 200)}, [1, 2])
    assert "\n" not in str(caught.value)


def test_it_is_not_tried_for_ever():
    calls = []

    def sample(prompts, redraw):
        calls.append(redraw)
        return [[] for _ in prompts]

    with pytest.raises(RolloutError):
        sample_with_redraws([1], sample=sample, draw=lambda count: [5] * count)
    assert calls == list(range(MAX_REDRAWS + 1))
