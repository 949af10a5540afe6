"""The order in which prompts are taken: endless epochs of one file, or of several by weight.

It resumes exactly: the position is a few plain numbers, and the order depends on them alone, not on how many
prompts are taken at a time, nor on Python's random state.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

_SEED_STEP = 1_000_003  # between the files of a mixture


def make_cursor(
    sizes: Sequence[int], *, seed: int, weights: Sequence[float] | None = None
) -> PromptCursor | MixtureCursor:
    """The cursor over files of so many prompts each, laid end to end.

    Args:
        sizes: prompts of each file.
        seed: of the permutations and of the mixing.
        weights: share of each file, in any unit; None takes the sizes, so that every prompt counts alike.

    Returns:
        A :class:`PromptCursor` for one file, else a :class:`MixtureCursor`.

    Raises:
        ValueError: as the two raise it.
    """
    if len(sizes) == 1:
        return PromptCursor(sizes[0], seed=seed)
    return MixtureCursor(sizes, sizes if weights is None else weights, seed=seed)


class PromptCursor:
    """Endless epochs over ``num_prompts`` prompts; each epoch is a permutation of its own.

    The order depends on the seed and the epoch alone: not on how many prompts are taken at a time.

    Args:
        num_prompts: size of the data set.
        seed: of the permutations.
        shuffle: False takes every epoch in the file's order.
    """

    def __init__(self, num_prompts: int, *, seed: int, shuffle: bool = True) -> None:
        if num_prompts < 1:
            raise ValueError(f"a cursor needs at least one prompt, got {num_prompts}")
        self.num_prompts = num_prompts
        self._seed = seed
        self._shuffle = shuffle
        self._start_epoch(0, 0)

    @property
    def epoch(self) -> int:
        """Epoch of the next prompt, from 0."""
        return self._epoch + (self._position == self.num_prompts)

    def next(self, n: int) -> list[int]:
        """The next ``n`` positions in the data set, going on into the next epoch where one ends."""
        taken: list[int] = []
        while len(taken) < n:
            if self._position == self.num_prompts:
                self._start_epoch(self._epoch + 1, 0)
            part = self._order[self._position : self._position + n - len(taken)]
            self._position += len(part)
            taken += part
        return taken

    def state_dict(self) -> dict[str, int | bool]:
        """Everything needed to go on from here, as plain numbers."""
        return {
            "num_prompts": self.num_prompts,
            "seed": self._seed,
            "shuffle": self._shuffle,
            "epoch": self._epoch,
            "position": self._position,
        }

    def load_state_dict(self, state: dict[str, int | bool]) -> None:
        """Go on where ``state`` was taken; its seed and shuffling replace this cursor's.

        Raises:
            ValueError: the state is of a data set of another size, or not a cursor's state.
        """
        if "files" in state:
            raise ValueError(
                f"--load: the checkpoint's cursor goes over {len(state['files'])} files, "
                "--prompt-data names one"
            )
        if set(state) != set(self.state_dict()):
            raise ValueError(f"not the state of a prompt cursor: its keys are {sorted(state)}")
        if state["num_prompts"] != self.num_prompts:
            raise ValueError(
                f"the checkpoint's cursor goes over {state['num_prompts']} prompts, "
                f"but the prompt data now has {self.num_prompts}"
            )
        if not (0 <= state["position"] <= self.num_prompts and state["epoch"] >= 0):
            raise ValueError(f"not the state of a prompt cursor: {state}")
        self._seed, self._shuffle = int(state["seed"]), bool(state["shuffle"])
        self._start_epoch(int(state["epoch"]), int(state["position"]))

    def _start_epoch(self, epoch: int, position: int) -> None:
        self._epoch, self._position = epoch, position
        self._order = list(range(self.num_prompts))
        if self._shuffle:
            # A text seed goes through SHA-512: neighbouring seeds and epochs share nothing.
            random.Random(f"{self._seed}:{epoch}").shuffle(self._order)


class MixtureCursor:
    """Several files mixed by weight; each runs through epochs of its own, whatever the others do.

    The file of each prompt is drawn independently, with probabilities in the ratio of the weights; the prompt
    is that file's next one, in the order of its :class:`PromptCursor`.

    Args:
        sizes: prompts of each file; position ``sizes[0]`` is the second file's first prompt.
        weights: one finite number above 0 for each file, in any unit.
        seed: of the draws and of the files' permutations.

    Raises:
        ValueError: there are no files, one is empty, or the weights do not fit.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], *, seed: int) -> None:
        if not sizes or len(weights) != len(sizes):
            raise ValueError(f"{len(sizes)} files cannot be mixed by {len(weights)} weights")
        if not all(weight > 0 and math.isfinite(weight) for weight in weights):
            raise ValueError(f"weights must be finite and above 0, got {list(weights)}")
        self._cursors = [PromptCursor(size, seed=seed + n * _SEED_STEP) for n, size in enumerate(sizes)]
        self._offsets = list(accumulate(sizes, initial=0))
        self._weights = list(weights)
        self._seed = seed
        self._num_drawn = 0

    @property
    def num_prompts(self) -> int:
        """Prompts of all files."""
        return self._offsets[-1]

    @property
    def epochs(self) -> list[int]:
        """Epoch of each file's next prompt, from 0."""
        return [cursor.epoch for cursor in self._cursors]

    def next(self, n: int) -> list[int]:
        """The next ``n`` positions in the files laid end to end."""
        taken = []
        for _ in range(n):
            # A generator for each draw: the count of draws is all the state there is.
            draw = random.Random(f"{self._seed}:file:{self._num_drawn}")
            (file,) = draw.choices(range(len(self._weights)), self._weights)
            taken.append(self._offsets[file] + self._cursors[file].next(1)[0])
            self._num_drawn += 1
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on from here, as plain numbers in dicts and a list."""
        return {
            "seed": self._seed,
            "num_drawn": self._num_drawn,
            "files": [cursor.state_dict() for cursor in self._cursors],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken, with its seeds; the weights of this cursor hold from here on.

        Raises:
            ValueError: the state is of other files, or not a cursor's state.
        """
        if "files" not in state and "num_prompts" in state:
            raise ValueError(
                "--load: the checkpoint's cursor goes over one file, "
                f"--prompt-data names {len(self._cursors)}"
            )
        if set(state) != set(self.state_dict()) or state["num_drawn"] < 0:
            raise ValueError(f"not the state of a mixture's cursor: {state}")
        if len(state["files"]) != len(self._cursors):
            raise ValueError(
                f"--load: the checkpoint's cursor goes over {len(state['files'])} files, "
                f"--prompt-data names {len(self._cursors)}"
            )
        for number, (cursor, part) in enumerate(zip(self._cursors, state["files"], strict=True), start=1):
            try:
                cursor.load_state_dict(part)
            except ValueError as error:
                raise ValueError(f"--load, file {number} of --prompt-data: {error}") from error
        self._seed, self._num_drawn = int(state["seed"]), int(state["num_drawn"])
