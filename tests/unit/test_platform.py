"""The CPU adapter leaves torch as it was for everybody but megatron-core."""

from __future__ import annotations

import pytest
import torch

from siren_megatron import platform


@pytest.fixture(scope="module")
def installed():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: nothing is adapted")
    return platform.install()


@pytest.mark.parametrize("factory", [torch.empty, torch.zeros, torch.ones, torch.rand])
def test_cuda_means_the_cpu(installed, factory):
    factory = getattr(torch, factory.__name__)
    assert factory(3, device="cuda").device == torch.device("cpu")


def test_a_default_device_still_counts(installed):
    with torch.device("meta"):
        assert torch.empty(3).is_meta
        assert torch.nn.Linear(3, 3).weight.is_meta
    assert torch.empty(3).device == torch.device("cpu")
