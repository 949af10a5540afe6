"""Which rollout is made when. On rank 0.

With `--rollout-async-steps` k the rollout of step s + k is made in the background while step s is trained:
that of step s always has the weights after step max(0, s - 1 - k), whatever takes how long. They change only
between two rollouts. k = 0 makes each one when it is wanted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

from siren_megatron.rollout.service import RolloutService

T = TypeVar("T")


class RolloutSchedule(Generic[T]):
    """Makes rollouts ahead of their steps.

    Args:
        collect: makes the rollout of a step (from 1), in the thread that samples.
        rollouts: runs that thread.
        steps_ahead: k.
        num_steps: the last step.
    """

    def __init__(
        self, collect: Callable[[int], T], rollouts: RolloutService, *, steps_ahead: int, num_steps: int
    ) -> None:
        self._collect, self._rollouts = collect, rollouts
        self._ahead, self._num_steps = steps_ahead, num_steps
        self._ready: deque[T] = deque()
        self._under_way: Future[T] | None = None
        self._made = 0

    def next(self, step: int) -> T:
        """The rollout of a step, while the others assist; the one of k steps later is begun.

        Raises as what `collect` does.
        """
        self.settle()
        # At the start (of a run, or of one that was resumed with another k) nothing was made ahead.
        self._made = max(self._made, step - 1)
        while self._made < min(step + max(self._ahead, 1) - 1, self._num_steps):
            self._begin()
            self.settle()
        if self._made < min(step + self._ahead, self._num_steps):
            self._begin()
        return self._ready.popleft()

    def settle(self) -> None:
        """Wait for the rollout that is under way, while the others assist. Raises as `next`."""
        if self._under_way is not None:
            under_way, self._under_way = self._under_way, None
            self._ready.append(self._rollouts.finish(under_way))

    @property
    def ready(self) -> list[T]:
        """What was made for the next steps, in their order; all of it between `settle` and `next`."""
        return list(self._ready)

    def restore(self, step: int, ready: Sequence[T]) -> None:
        """Go on after `step` with what was `ready` then."""
        self._ready, self._made = deque(ready), step + len(ready)

    def _begin(self) -> None:
        self._made += 1
        step = self._made
        self._under_way = self._rollouts.start(lambda: self._collect(step))
