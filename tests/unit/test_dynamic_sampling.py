"""Groups without variance are replaced in place, for as many rounds as are allowed."""

from siren_megatron.batch import Sample
from siren_megatron.dynamic_sampling import refill


def group(name):
    return [Sample((name,), (1,), (0.0,), "stop")] * 2


def names(groups):
    return [g[0].prompt_ids[0] for g in groups]


def run(rewards, drawn, max_rounds=10):
    """`drawn` is a list of rounds, each the rewards of the groups it gives; new prompts count from 10."""
    asked, next_name = [], iter(range(10, 99))

    def draw(extra_round, count):
        asked.append((extra_round, count))
        rows = drawn[extra_round - 1]
        assert len(rows) == count
        return [group(next(next_name)) for _ in rows], [r for row in rows for r in row]

    flattened = [r for row in rewards for r in row]
    return refill([group(i) for i in range(len(rewards))], flattened, draw=draw, max_rounds=max_rounds), asked


def test_nothing_is_drawn_where_every_group_varies():
    refilled, asked = run([[0.0, 1.0], [1.0, 0.0]], [])
    assert asked == [] and names(refilled.groups) == [0, 1] and refilled.rewards == [0, 1, 1, 0]
    assert refilled.metrics()["dynamic_sampling/flat_fraction"] == 0


def test_flat_groups_are_replaced_in_their_places():
    rewards = [[0.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
    refilled, asked = run(rewards, [[[1.0, 1.0], [0.5, 0.0]], [[1.0, 0.0]]])
    assert asked == [(1, 2), (2, 1)]
    assert names(refilled.groups) == [11, 1, 12]
    assert refilled.rewards == [0.5, 0.0, 0.0, 1.0, 1.0, 0.0]
    assert refilled.metrics() == {
        "dynamic_sampling/rounds": 2,
        "dynamic_sampling/flat_fraction": 3 / 6,
        "dynamic_sampling/groups_left_flat": 0,
    }


def test_the_rounds_are_capped_and_what_is_missing_stays():
    refilled, asked = run([[0.0, 0.0], [1.0, 1.0]], [[[1.0, 1.0], [0.0, 0.0]]] * 3, max_rounds=3)
    assert asked == [(1, 2), (2, 2), (3, 2)]
    assert names(refilled.groups) == [0, 1] and refilled.num_left == 2
    assert len(refilled.rewards) == 4
