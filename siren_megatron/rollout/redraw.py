"""What becomes of prompts whose requests took too long: others take their place, and the batch stays full.

Leaving them out would change group sizes, batch sizes and denominators; an empty response is no sample of the
policy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from siren_megatron.data.prompts import Prompt
from siren_megatron.rollout.server import RolloutError

Group = TypeVar("Group")

MAX_REDRAWS = 3
"""How often other prompts are drawn in the place of dropped ones, in one call."""


def sample_with_redraws(
    prompts: list[Prompt],
    *,
    sample: Callable[[list[Prompt], int], list[Group | None]],
    draw: Callable[[int], list[Prompt]],
) -> tuple[list[Prompt], list[Group]]:
    """The responses of as many prompts as are given.

    Args:
        prompts: the first to try.
        sample: (prompts, round counted from 0) -> their groups; None or [] for a prompt that was dropped.
        draw: the next n prompts of the data.

    Returns:
        (prompts, their groups): where a prompt was dropped another one stands in its place.

    Raises:
        RolloutError: what was drawn in their place was dropped as well, MAX_REDRAWS times.
    """
    prompts, groups = list(prompts), sample(prompts, 0)
    for redraw in range(1, MAX_REDRAWS + 1):
        missing = [k for k, group in enumerate(groups) if not group]
        if not missing:
            break
        drawn = draw(len(missing))
        for k, prompt, group in zip(missing, drawn, sample(drawn, redraw), strict=True):
            prompts[k], groups[k] = prompt, group
    left = sum(not group for group in groups)
    if left:
        raise RolloutError(
            f"{left} prompt(s) were dropped and so were those drawn in their place, {MAX_REDRAWS} times: "
            "raise --rollout-request-timeout or --rollout-request-retries"
        )
    return prompts, groups
