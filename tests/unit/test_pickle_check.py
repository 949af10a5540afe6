"""Pickles in a checkpoint that would run code: refused, and not run. The checkpoint is torch's own."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from siren_megatron.conversion.pickle_check import check_pickles

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Evil:
    """What an attacker would put in: unpickling it runs a command."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    directory = tmp_path / "checkpoint"
    state = {"weight": torch.arange(6.0), "_extra_state": {"plain": 1}}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(directory), no_dist=True)
    torch.save({"run": {"step": 1}}, directory / "common.pt")
    check_pickles(directory)
    return directory


def refused(checkpoint: Path) -> str:
    mark = checkpoint.parent / "mark"
    with pytest.raises(ValueError, match="refused|damaged") as error:
        check_pickles(checkpoint)
    assert not mark.exists(), "the code ran"
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_table_of_contents_that_runs_code(checkpoint):
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Evil(checkpoint.parent / "mark")))
    message = refused(checkpoint)
    assert str(checkpoint / ".metadata") in message and "posix.system" in message


def test_common_values_that_run_code(checkpoint):
    torch.save({"run": Evil(checkpoint.parent / "mark")}, checkpoint / "common.pt")
    message = refused(checkpoint)
    assert str(checkpoint / "common.pt") in message and "posix.system" in message


def test_an_extra_state_that_runs_code(tmp_path):
    directory = tmp_path / "checkpoint"
    state = {"weight": torch.arange(6.0), "_extra_state": Evil(tmp_path / "mark")}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(directory), no_dist=True)
    torch.save({}, directory / "common.pt")
    message = refused(directory)
    assert "_extra_state" in message and "posix.system" in message and ".distcp" in message
    # The test itself is right: torch would run it.
    with open(directory / ".metadata", "rb") as file:
        table = pickle.load(file)
    (info,) = [info for index, info in table.storage_data.items() if index.fqn == "_extra_state"]
    with open(directory / info.relative_path, "rb") as file:
        file.seek(info.offset)
        torch.load(io.BytesIO(file.read(info.length)), weights_only=False)
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "change", [{"relative_path": "../other"}, {"transform_descriptors": ["stream.zstd"]}]
)
def test_a_table_that_points_out_of_the_checkpoint(checkpoint, change):
    with open(checkpoint / ".metadata", "rb") as file:
        table = pickle.load(file)
    for info in table.storage_data.values():
        for name, value in change.items():
            setattr(info, name, value)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(table))
    assert "lies outside of the checkpoint or is encoded" in refused(checkpoint)


@pytest.mark.parametrize("name", [".metadata", "common.pt"])
def test_truncated_pickles(checkpoint, name):
    path = checkpoint / name
    path.write_bytes(path.read_bytes()[:-40])
    assert str(path) in refused(checkpoint)
