"""DAPO's dynamic sampling: groups whose rewards are all equal teach nothing, and make room for others.

Legend: P = prompts of a step, G = responses of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from siren_megatron.advantages import flat_groups
from siren_megatron.batch import Sample

Draw = Callable[[int, int], tuple[list[list[Sample]], list[float]]]
"""(round counted from 1, number of prompts) -> their groups and G rewards each, from new prompts."""


@dataclass(frozen=True)
class Refilled:
    """Groups of a step after dynamic sampling.

    Args:
        groups: P groups; where a replacement was found it stands in the flat group's place.
        rewards: [P·G], those of a prompt side by side.
        num_rounds: extra generation rounds.
        num_drawn: groups drawn in all, the first P included.
        num_flat: groups without variance among those.
        num_left: groups without variance that stayed, because the rounds ran out.
    """

    groups: list[list[Sample]]
    rewards: list[float]
    num_rounds: int
    num_drawn: int
    num_flat: int
    num_left: int

    def metrics(self) -> dict[str, float]:
        return {
            "dynamic_sampling/rounds": self.num_rounds,
            "dynamic_sampling/flat_fraction": self.num_flat / self.num_drawn,
            "dynamic_sampling/groups_left_flat": self.num_left,
        }


def refill(groups: list[list[Sample]], rewards: list[float], *, draw: Draw, max_rounds: int) -> Refilled:
    """Replace groups whose rewards are all equal by groups of new prompts.

    Each round draws as many prompts as groups are missing.

    Args:
        groups: P groups of G samples.
        rewards: [P·G].
        draw: gives new groups.
        max_rounds: at most so many calls of draw; groups still flat then stay (their advantages are 0).

    References: arXiv 2503.14476 (DAPO), section 3.2 and algorithm 1.
    """
    size = len(groups[0])
    groups = list(groups)
    by_group = [rewards[i : i + size] for i in range(0, len(rewards), size)]
    flat = _flat(by_group)
    num_drawn, num_flat, rounds = len(groups), len(flat), 0
    while flat and rounds < max_rounds:
        rounds += 1
        new_groups, new_rewards = draw(rounds, len(flat))
        parts = [new_rewards[i : i + size] for i in range(0, len(new_rewards), size)]
        bad = set(_flat(parts))
        num_drawn, num_flat = num_drawn + len(parts), num_flat + len(bad)
        good = [i for i in range(len(parts)) if i not in bad]
        # Fewer may be good than are missing: the rest of `flat` waits for the next round.
        for place, index in zip(flat, good, strict=False):
            groups[place], by_group[place] = new_groups[index], parts[index]
        flat = flat[len(good) :]
    flattened = [reward for part in by_group for reward in part]
    return Refilled(groups, flattened, rounds, num_drawn, num_flat, len(flat))


def _flat(by_group: list[list[float]]) -> list[int]:
    rewards = torch.tensor(by_group, dtype=torch.float64)
    return flat_groups(rewards.flatten(), rewards.size(1)).nonzero().flatten().tolist()
