"""The rewriting task against a search of its own, and its verifier against every kind of mistake."""

from __future__ import annotations

import random
from collections import Counter
from itertools import product

import pytest

from siren_megatron.rewards import rewrite
from siren_megatron.rewards.functions import REWARDS
from siren_megatron.rewards.rewrite import Instance

# a c b d: swap -> c a b d, and so on, by hand
SWAPS = "swap c a b d cross c b a d mirror d a b c"


def test_moves_by_hand():
    assert rewrite.verify(SWAPS, Instance("acbd", "dabc"))
    assert rewrite.MOVES["rotate"]("abcd") == "bcda"


def apply(move, s):
    """The moves written as permutations of positions, independently of the module."""
    order = {"swap": (1, 0, 2, 3), "cross": (0, 2, 1, 3), "rotate": (1, 2, 3, 0), "mirror": (3, 2, 1, 0)}[
        move
    ]
    return "".join(s[i] for i in order)


def test_all_solutions_are_those_of_a_search():
    instances = rewrite.enumerate_instances()
    assert len(instances) == len(set(instances)) == 38640
    for instance in random.Random(0).sample(instances, 300):
        expected = set()
        for moves in product(rewrite.MOVES, repeat=3):
            string, words = instance.source, []
            for move in moves:
                string = apply(move, string)
                words += [move, *string]
            if string == instance.target:
                expected.add(" ".join(words))
        assert set(rewrite.solve(instance)) == expected
        assert 1 <= len(expected) <= 7
        assert all(rewrite.verify(response, instance) for response in expected)
        assert rewrite.parse_instance(rewrite.render_prompt(instance)) == instance
    assert rewrite.solve(Instance("abcd", "efgh")) == ()


def test_any_changed_word_makes_a_response_wrong():
    instance = Instance("acbd", "dabc")
    words = SWAPS.split()
    assert len(words) == rewrite.RESPONSE_WORDS
    vocabulary = [token.strip() for token in rewrite.VOCABULARY if token != rewrite.END_OF_TEXT]
    verdicts = Counter()
    for position, word in product(range(len(words)), vocabulary):
        changed = [*words[:position], word, *words[position + 1 :]]
        verdicts[rewrite.verify(" ".join(changed), instance)] += 1
    assert verdicts[True] == len(words), "only the word itself is right at its place"
    for text in ("", SWAPS + " a", " ".join(words[:-1]), SWAPS.upper(), SWAPS * 1000, "x" * 10**6):
        assert not rewrite.verify(text, instance)
    assert rewrite.verify(f" {SWAPS}<|endoftext|>", instance)


@pytest.mark.parametrize(
    "text",
    ["", "Turn a c b d into d b c a", "Turn a a b d into d b a a:", "Turn a c b d into d b c e:", "36"],
)
def test_other_texts_are_no_instances(text):
    with pytest.raises(ValueError, match="not a rewriting instance"):
        rewrite.parse_instance(text)


def test_the_reward():
    assert REWARDS["rewrite"](SWAPS, "Turn a c b d into d a b c:") == 1
    assert REWARDS["rewrite"](SWAPS, "Turn a c b d into d a c b:") == 0


def test_the_tokenizer_has_a_token_a_word():
    from siren_megatron.toy_model import task_tokenizer

    tokenizer = task_tokenizer(rewrite, 1024)
    instance = Instance("acbd", "dabc")
    prompt = tokenizer(rewrite.render_prompt(instance))["input_ids"]
    both = tokenizer(f"{rewrite.render_prompt(instance)} {SWAPS}{rewrite.END_OF_TEXT}")["input_ids"]
    assert len(prompt) == rewrite.PROMPT_TOKENS and both[: len(prompt)] == prompt
    assert len(both) == rewrite.PROMPT_TOKENS + rewrite.RESPONSE_WORDS + 1
    assert max(both) < len(rewrite.VOCABULARY)
    assert tokenizer.decode(both[len(prompt) : -1]).strip() == SWAPS
