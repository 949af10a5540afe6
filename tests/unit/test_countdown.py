"""The Countdown task against its rules, written a second time by brute force."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from siren_megatron.rewards.countdown import (
    END_OF_TEXT,
    VOCABULARY,
    Instance,
    enumerate_instances,
    parse_instance,
    render_prompt,
    solve,
    verify,
)

INSTANCES = enumerate_instances()
OPERATIONS = {"+": lambda x, y: x + y, "-": lambda x, y: x - y, "×": lambda x, y: x * y}


def test_there_are_3341_distinct_instances():
    assert len(INSTANCES) == len(set(INSTANCES)) == 3341
    assert Instance((1, 1, 1), 1) in INSTANCES
    assert Instance((1, 1, 1), 4) not in INSTANCES


def test_solutions_are_those_of_brute_force():
    # Every response that could be written for one triple, checked by the rules alone.
    instance = Instance((2, 3, 3), 12)
    right = set()
    for a, b, c in itertools.permutations(instance.numbers):
        for first, second in itertools.product(OPERATIONS, repeat=2):
            x = OPERATIONS[first](a, b)
            for left, other in ((x, c), (c, x)):
                z = OPERATIONS[second](left, other)
                if 0 <= x <= 99 and z == instance.target:
                    right.add(f"{a} {first} {b} = {x} {left} {second} {other} = {z}")
    assert set(solve(instance)) == right
    assert "2 × 3 = 6 6 + 3 = 9" not in right


def test_every_solution_verifies_for_its_own_target_only():
    for instance in INSTANCES[::7]:
        for response in solve(instance):
            assert verify(response, instance)
            assert not verify(response, Instance(instance.numbers, instance.target % 60 + 1))


def test_solutions_are_made_of_the_vocabulary():
    tokens = set(VOCABULARY)
    assert len(tokens) == len(VOCABULARY) == 108
    for instance in INSTANCES[::11]:
        for response in solve(instance):
            words = response.split(" ")
            assert len(words) == 10 and all(f" {word}" in tokens for word in words)


@pytest.mark.parametrize(
    "response",
    [
        "12 - 5 = 7 7 × 2 = 14",
        " 12 - 5 = 7 7 × 2 = 14",
        "12 - 5 = 7 7 × 2 = 14" + END_OF_TEXT,
        "12 - 5 = 7 7 × 2 = 14 " + END_OF_TEXT + "\n",
        "12 - 5 = 7 2 × 7 = 14",
    ],
)
def test_right_responses(response):
    assert verify(response, Instance((2, 5, 12), 14))


@pytest.mark.parametrize(
    ("response", "why"),
    [
        ("", "empty"),
        ("12 - 5 = 7", "one step"),
        ("12 - 5 = 7 7 × 2 = 14 1", "a word too many"),
        ("12 - 5 = 7 7 × 2 = 14 <unused3>", "an unused token"),
        ("12 - 5 = 8 8 × 2 = 16", "wrong arithmetic"),
        ("12 - 5 = 8 7 × 2 = 14", "wrong first result"),
        ("7 × 2 = 14 12 - 5 = 7", "a number that is not there"),
        ("12 + 2 = 14 14 + 0 = 14", "a number that is not there"),
        ("12 + 2 = 14 12 + 2 = 14", "a number twice, the result unused"),
        ("2 + 12 = 14 5 - 5 = 0", "a number twice"),
        ("12 - 5 = 7 7 + 2 = 9", "another target"),
        ("5 - 12 = -7 2 × 7 = 14", "a negative result"),
        ("12 - 5 : 7 7 × 2 = 14", "no equals sign"),
        ("12 ÷ 5 = 7 7 × 2 = 14", "an unknown operator"),
        ("12 * 5 = 7 7 × 2 = 14", "an unknown operator"),
        ("012 - 5 = 7 7 × 2 = 14", "a number in another spelling"),
        ("１２ - 5 = 7 7 × 2 = 14", "digits of another script"),
        ("12 - 5 = 7 7 × 2 = 14" * 100_000, "megabytes"),
    ],
)
def test_wrong_responses(response, why):
    assert not verify(response, Instance((2, 5, 12), 14)), why


@given(st.text(max_size=60) | st.lists(st.sampled_from(VOCABULARY), max_size=12).map("".join))
def test_no_text_verifies_that_is_not_a_solution(text):
    instance = Instance((2, 5, 12), 14)
    normalised = " ".join(text.strip().removesuffix(END_OF_TEXT).split())
    assert verify(text, instance) == (normalised in solve(instance))


def test_prompts_name_their_instance():
    assert render_prompt(Instance((2, 5, 12), 36)) == "Make 36 from 2 5 12:"
    prompts = [render_prompt(instance) for instance in INSTANCES]
    assert len(set(prompts)) == len(INSTANCES)
    assert [parse_instance(prompt) for prompt in prompts] == INSTANCES
    assert parse_instance("Make 36 from 12 2 5:") == Instance((2, 5, 12), 36)


@pytest.mark.parametrize(
    "text",
    ["", "Make 36 from 2 5:", "Make 61 from 2 5 12:", "Make 36 from 0 5 12:", "Make 36 from 2 5 13:", "14"],
)
def test_other_texts_are_no_instance(text):
    with pytest.raises(ValueError, match="not a Countdown instance"):
        parse_instance(text)
