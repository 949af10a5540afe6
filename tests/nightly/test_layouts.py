"""The layouts of tests/distributed on GPUs with NCCL, held to the same float64 reference."""

from __future__ import annotations

import pytest

from tests.checkpoints import make_random_checkpoint
from tests.distributed.layouts import Layout, compare_layouts
from tests.distributed.test_layouts import EXPERT_LAYOUTS, LAYOUTS, UPDATES

# float32 sums in another order than a CPU's; matrix products are not in TF32 (torch's default).
TOLERANCE = 1e-3
ONE = [layout for layout in LAYOUTS[1] if "optimizer" not in layout.name]


def compare(tmp_path, family: str, layouts: dict[int, list[Layout]]) -> None:
    checkpoint = make_random_checkpoint(tmp_path / "model", family)
    compare_layouts(checkpoint, layouts, UPDATES, backend="nccl", tolerance=TOLERANCE)


@pytest.mark.gpus(1)
def test_one_gpu(tmp_path):
    compare(tmp_path, "qwen2", {1: ONE})


@pytest.mark.gpus(2)
@pytest.mark.parametrize("layout", LAYOUTS[2], ids=lambda layout: layout.name)
def test_two_gpus(tmp_path, layout):
    compare(tmp_path, "qwen2", {2: [layout]})


@pytest.mark.gpus(4)
@pytest.mark.parametrize("layout", LAYOUTS[4], ids=lambda layout: layout.name)
def test_four_gpus(tmp_path, layout):
    compare(tmp_path, "qwen2", {4: [layout]})


@pytest.mark.gpus(2)
@pytest.mark.parametrize("layout", EXPERT_LAYOUTS[2], ids=lambda layout: layout.name)
def test_experts_on_two_gpus(tmp_path, layout):
    compare(tmp_path, "qwen3-moe", {2: [layout]})


@pytest.mark.gpus(4)
@pytest.mark.parametrize("layout", EXPERT_LAYOUTS[4], ids=lambda layout: layout.name)
def test_experts_on_four_gpus(tmp_path, layout):
    compare(tmp_path, "qwen3-moe", {4: [layout]})
