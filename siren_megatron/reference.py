"""The reference model of the KL term: the initial policy's weights, kept on the CPU between uses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


class ReferenceWeights:
    """A second set of this rank's weights that takes the policy's place for a forward pass.

    The model, its layout and its schedule stay as they are; only the values in the parameters change. On CUDA
    the device never holds both sets: the policy waits on the CPU meanwhile, bit for bit.

    Args:
        parameters: this rank's parameters, which hold the reference now.
    """

    def __init__(self, parameters: Iterable[Tensor]):
        self._parameters = list(parameters)
        self._weights = [_on_cpu(p) for p in self._parameters]

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within this context the model is the reference. For forward passes only."""
        policy = [_on_cpu(p) for p in self._parameters]
        _fill(self._parameters, self._weights)
        try:
            yield
        finally:
            _fill(self._parameters, policy)


@torch.no_grad()
def _on_cpu(parameter: Tensor) -> Tensor:
    copy = torch.empty(parameter.shape, dtype=parameter.dtype, pin_memory=parameter.is_cuda)
    return copy.copy_(parameter)


@torch.no_grad()
def _fill(parameters: list[Tensor], weights: list[Tensor]) -> None:
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.copy_(weight)
