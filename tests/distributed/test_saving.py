"""Saving on two gloo ranks: random states, background writers, limits, damage, full disks."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.checkpoints import make_random_checkpoint
from tests.distributed.launch import run_ranks
from tests.distributed.layouts import ANCHOR
from tests.distributed.test_checkpoint import TP, build
from tests.small_disk import small_disk
from tests.unit.test_pickle_check import Evil

DISK_BYTES = 24 * 2**20


def listing(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def draw() -> list[float]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), float(torch.rand(()))]


def weights_of(trainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for chunk in trainer.chunks for parameter in chunk.parameters()]


def equal(ours, theirs) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def save_and_load(rank, world_size, checkpoint, directory, disk):
    """Everything that needs a trainer, in one start of the ranks; returns what the tests look at."""
    trainer, batch = build(checkpoint, {TP: 2})
    batch = trainer.compute_logprobs(batch)
    trainer.update(batch, ANCHOR)
    return {
        "limit": keep_two(trainer, directory / "limit"),
        "random": random_states_return(rank, trainer, directory / "random"),
        "background": save_in_background(rank, trainer, batch, directory / "background"),
        "killed": kill_the_writer(rank, trainer, directory / "background"),
        "full": fill_the_disk(rank, trainer, disk),
    }


def keep_two(trainer, directory):
    from siren_megatron.checkpointing.checkpoint import CheckpointSaver

    saver = CheckpointSaver(directory, trainer, total_limit=2)
    seen = []
    for step in (1, 2, 3):
        saver.save({"step": step})
        seen.append(listing(directory))
        dist.barrier()
    return seen


def random_states_return(rank, trainer, directory):
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    from siren_megatron.checkpointing import random_states
    from siren_megatron.checkpointing.checkpoint import CheckpointSaver, load_checkpoint

    random.seed(rank), np.random.seed(rank), torch.manual_seed(rank)
    draw()  # a second normal number waits in Python's and in NumPy's generator
    tracker = get_cuda_rng_tracker()
    CheckpointSaver(directory, trainer).save({"step": 1})
    expected, tracked = draw(), tracker.get_states()
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    tracker.set_states({name: torch.get_rng_state() for name in tracked})
    other = draw()
    if rank == 0:
        path = directory / "step_000001" / "manifest.json"
        path.write_text(path.read_text().replace(f'"numpy": "{np.__version__}"', '"numpy": "1.0"'))
    dist.barrier()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        loaded = load_checkpoint(directory, trainer)
    random_states.restore(loaded.random_states, trainer.device)
    again = tracker.get_states()
    same = sorted(again) == sorted(tracked) and equal([again[n] for n in tracked], [*tracked.values()])
    return expected, other, draw(), same and len(tracked), printed.getvalue().splitlines()


def save_in_background(rank, trainer, batch, directory):
    from siren_megatron.checkpointing import writer as checkpoint_writer
    from siren_megatron.checkpointing.checkpoint import CheckpointSaver, load_checkpoint

    write, gate = checkpoint_writer._write, directory / "gate"
    directory.mkdir(exist_ok=True)

    def write_late(*args):
        """In the writer's process: the training has moved on by the time it writes."""
        with open(gate):  # a pipe: opens when the trainer opens its other end
            pass
        return write(*args)

    if rank == 0:
        os.mkfifo(gate)
    dist.barrier()
    checkpoint_writer._write = write_late
    saver = CheckpointSaver(directory, trainer, asynchronous=True)
    at_save = weights_of(trainer)
    saver.save({"step": 4})
    checkpoint_writer._write = write
    trainer.update(batch, ANCHOR)
    moved = not equal(weights_of(trainer), at_save)
    saver.poll()
    before = listing(directory)
    dist.barrier()
    if rank == 0:
        with open(gate, "w"):
            saver.wait()
        gate.unlink()
    else:
        saver.wait()
    dist.barrier()
    after = listing(directory)
    load_checkpoint(directory, trainer)
    return {"moved": moved, "before": before, "after": after, "same": equal(weights_of(trainer), at_save)}


def kill_the_writer(rank, trainer, directory):
    from siren_megatron.checkpointing import writer as checkpoint_writer
    from siren_megatron.checkpointing.checkpoint import CheckpointSaver, SaveError

    write = checkpoint_writer._write
    if rank == 1:
        checkpoint_writer._write = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    saver = CheckpointSaver(directory, trainer, asynchronous=True)
    saver.save({"step": 5})
    checkpoint_writer._write = write
    with pytest.raises(SaveError) as error:
        saver.wait()
    dist.barrier()
    return str(error.value), listing(directory)


def fill_the_disk(rank, trainer, disk):
    from siren_megatron.checkpointing import files as checkpoint_files
    from siren_megatron.checkpointing.checkpoint import CheckpointSaver, SaveError, load_checkpoint

    def leave(free):
        """Fill the disk but for so many bytes; limit the size of files where there is no small disk."""
        dist.barrier()
        if not os.path.ismount(disk):
            resource.setrlimit(resource.RLIMIT_FSIZE, (free, resource.RLIM_INFINITY))
        elif rank == 0:
            with open(disk / "filler", "wb") as file:
                file.truncate(0)
                os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - free)
        dist.barrier()

    def empty():
        dist.barrier()
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        if rank == 0:
            (disk / "filler").unlink(missing_ok=True)
        dist.barrier()

    def attempt(saver, step):
        try:
            saver.save({"step": step})
            saver.wait()
        except SaveError as error:
            message = str(error)
        else:
            message = None
        dist.barrier()
        return message, [name for name in listing(directory) if name != "filler"]

    directory = disk / "checkpoints"
    savers = {
        kind: CheckpointSaver(directory, trainer, asynchronous=kind == "async") for kind in ("sync", "async")
    }
    results = {"first": attempt(savers["sync"], 1)}
    for kind, saver in savers.items():
        for room in (0, 300_000):
            leave(room)
            results[f"{kind}, {room} bytes left"] = attempt(saver, 2)
            empty()
    # Room for everything but the last file, which rank 0 alone writes.
    write_manifest = checkpoint_files.write_manifest

    def full(*_):
        raise OSError(28, "No space left on device")

    checkpoint_files.write_manifest = full
    results["manifest"] = attempt(savers["async"], 2)
    checkpoint_files.write_manifest = write_manifest
    results["loads"] = load_checkpoint(directory, trainer).path.name
    results["again"] = attempt(savers["async"], 3)
    return results


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_random_checkpoint(tmp_path_factory.mktemp("model") / "hf")


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """A real file system of 24 MB where this user may mount one; else a plain directory."""
    path = tmp_path_factory.mktemp("disk")
    with small_disk(path, DISK_BYTES):
        yield path


@pytest.fixture(scope="module")
def saved(model, disk, tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    return directory, run_ranks(save_and_load, 2, model, directory, disk)


def test_old_checkpoints_go(saved):
    for result in saved[1]:
        assert result["limit"] == [
            ["latest", "step_000001"],
            ["latest", "step_000001", "step_000002"],
            ["latest", "step_000002", "step_000003"],
        ]


def test_every_ranks_random_states_return(saved):
    for result in saved[1]:
        expected, other, again, tracked, _ = result["random"]
        assert again == expected != other
        assert tracked == 3, "megatron-core's tracker has three states"
    assert saved[1][0]["random"][0] != saved[1][1]["random"][0], "each rank has its own"


def test_another_version_is_one_line(saved):
    (line,), nothing = saved[1][0]["random"][4], saved[1][1]["random"][4]
    assert line.endswith(f"step_000001 was written with numpy 1.0 (now {np.__version__})") and not nothing


def test_a_background_save_is_of_the_moment_it_was_asked_for(saved):
    for result in saved[1]:
        seen = result["background"]
        assert seen["before"] == ["gate", "step_000004.partial"]
        assert seen["after"] == ["latest", "step_000004"]
        assert seen["moved"] and seen["same"]


def test_a_killed_writer_is_one_error_on_all_ranks(saved):
    for result in saved[1]:
        message, left = result["killed"]
        assert "step_000005 could not be written" in message and "rank 1" in message and "killed" in message
        assert "the last good one is step_000004" in message and "\n" not in message
        assert left == ["latest", "step_000004"]


def test_a_full_disk_leaves_the_last_checkpoint(saved, disk):
    # Of a file that may not grow, torch's writer of common.pt says no more than that writing failed.
    reasons = ("No space left on device",) if os.path.ismount(disk) else ("File too large", "iostream error")
    for result in saved[1]:
        seen = dict(result["full"])
        assert seen.pop("first") == (None, ["latest", "step_000001"])
        assert seen.pop("again") == (None, ["latest", "step_000001", "step_000003"])
        assert seen.pop("loads") == "step_000001"
        assert len(seen) == 5
        for moment, (message, left) in seen.items():
            assert "step_000002 could not be written" in message, moment
            words = ("No space left on device",) if moment == "manifest" else reasons
            assert any(word in message for word in words), (moment, message)
            assert moment == "manifest" or "rank 0: common.pt: " in message or "_0.distcp: " in message
            assert "the last good one is step_000001" in message and "\n" not in message, moment
            assert left == ["latest", "step_000001"], moment


# ---------------------------------------------------------------- damage


def choose(rank, world_size, directories):
    """For each directory: the checkpoint that is taken, or the error; the lines that rank 0 printed; and what
    --pretrained-checkpoint says of the newest where that is evil.
    """
    from siren_megatron import platform

    platform.install()
    from siren_megatron.checkpointing.checkpoint import choose_checkpoint
    from siren_megatron.conversion.live import load_megatron_weights

    results = {}
    for directory in directories:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            try:
                result = choose_checkpoint(directory)[0].name
            except ValueError as error:
                result = str(error)
            refusal = ""
            if directory.name.startswith("evil"):
                with pytest.raises(ValueError, match="refused|damaged") as error:
                    load_megatron_weights(None, directory / "step_000003")
                refusal = str(error.value)
        results[directory.name] = (result, printed.getvalue().splitlines(), refusal)
    return results


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def replace(newest: Path, name: str, content: bytes) -> None:
    """Put a file into a checkpoint, and its checksum into the manifest, as an attacker would."""
    from siren_megatron.checkpointing import files as checkpoint_files

    (newest / name).write_bytes(content)
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["files"][name] = checkpoint_files.describe_file(newest / name)
    (newest / "manifest.json").write_text(json.dumps(manifest))


def evil_common(mark: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"run": Evil(mark)}, buffer)
    return buffer.getvalue()


# What is done to the newest of two checkpoints, and the words of the line that reports it.
DAMAGE = {
    "flipped-bit": (lambda d, _: flip(d / "__1_0.distcp", 123_456), "__1_0.distcp is damaged"),
    "file-missing": (lambda d, _: (d / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
    "truncated": (lambda d, _: cut(d / "__1_0.distcp"), "__1_0.distcp has "),
    "common-bit": (lambda d, _: flip(d / "common.pt", 200), "common.pt is damaged"),
    "table-truncated": (lambda d, _: cut(d / ".metadata"), ".metadata has "),
    "format-missing": (lambda d, _: (d / "metadata.json").unlink(), "metadata.json is missing"),
    "manifest-truncated": (lambda d, _: cut(d / "manifest.json"), "manifest.json is damaged"),
    "manifest-missing": (lambda d, _: (d / "manifest.json").unlink(), "manifest.json is missing"),
    "evil-table": (lambda d, m: replace(d, ".metadata", pickle.dumps(Evil(m))), ".metadata is refused"),
    "evil-common": (lambda d, m: replace(d, "common.pt", evil_common(m)), "common.pt is refused"),
}


@pytest.fixture(scope="module")
def chosen(saved, tmp_path_factory):
    directory, mark = tmp_path_factory.mktemp("damage"), tmp_path_factory.mktemp("mark") / "mark"
    good = saved[0] / "limit"
    for name, (damage, _) in DAMAGE.items():
        shutil.copytree(good, directory / name)
        damage(directory / name / "step_000003", mark)
    for name in ("whole", "no-pointer", "lost-pointer", "all-damaged", "pinned"):
        shutil.copytree(good, directory / name)
    (directory / "no-pointer" / "latest").unlink()
    (directory / "lost-pointer" / "latest").write_text("step_000009\n")
    (directory / "pinned" / "latest").write_text("step_000002\n")
    for step in (2, 3):
        cut(directory / "all-damaged" / f"step_00000{step}" / "__0_0.distcp")
    (directory / "empty").mkdir()
    results = run_ranks(choose, 2, sorted(directory.iterdir()))
    assert not mark.exists(), "the code in a pickle ran"
    assert all(results[0][name][0] == results[1][name][0] for name in results[0]), "the ranks disagree"
    assert not any(lines for _, lines, _ in results[1].values()), "rank 1 printed"
    return results[0]


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(chosen, name):
    result, lines, _ = chosen[name]
    assert result == "step_000002"
    assert len(lines) == 1 and lines[0].startswith("checkpoint: step_000003 cannot be used: ")
    assert DAMAGE[name][1] in lines[0] and f"{name}/step_000003/" in lines[0]


def test_whole_checkpoints_are_taken_without_a_word(chosen):
    assert chosen["whole"][:2] == ("step_000003", [])
    assert chosen["no-pointer"][:2] == ("step_000003", [])
    assert chosen["lost-pointer"][:2] == ("step_000003", [])
    assert chosen["pinned"][:2] == ("step_000002", [])


@pytest.mark.parametrize(("name", "file"), [("evil-table", ".metadata"), ("evil-common", "common.pt")])
def test_a_pretrained_checkpoint_that_runs_code_is_refused(chosen, name, file):
    refusal = chosen[name][2]
    assert "posix.system" in refusal and f"{name}/step_000003/{file}" in refusal and "\n" not in refusal


def test_no_good_checkpoint_is_an_error(chosen):
    message, lines, _ = chosen["all-damaged"]
    assert message.startswith("--load: none of the 2 checkpoint(s) in ") and len(lines) == 2
    assert "holds no finished checkpoint" in chosen["empty"][0]
