"""The batch of a skipped update on disk; tests/distributed/test_nonfinite.py has the update itself."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors import safe_open

from siren_megatron.batch import Sample, make_batch
from siren_megatron.nonfinite import save_batch


@pytest.fixture
def batch():
    samples = [Sample((5, 6, 7), (8, 9), (-0.5, -1.5), "stop"), Sample((5,), (3,), (-2.0,), "length")]
    batch = make_batch(samples, torch.tensor([1.0, 0.0]), torch.tensor([float("nan"), -0.5]), multiple=8)
    return batch.replace(old_logprobs=batch.rollout_logprobs * 2)


def test_every_tensor_is_kept_as_it_was(batch, tmp_path):
    path = tmp_path / "step_000003_update_1.safetensors"
    save_batch(path, batch, {"step": 3, "metrics": {"grad_norm": float("nan"), "loss/policy": 0.25}})
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["about"])
        for field in dataclasses.fields(batch):
            got, expected = file.get_tensor(field.name), getattr(batch, field.name)
            assert got.dtype == expected.dtype
            torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    assert about == {"step": 3, "metrics": {"grad_norm": "nan", "loss/policy": 0.25}}
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_batch_that_cannot_be_written_leaves_nothing(batch, tmp_path, monkeypatch):
    def full_disk(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("siren_megatron.nonfinite.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_batch(tmp_path / "x.safetensors", batch, {})
    assert list(tmp_path.iterdir()) == []
