"""SIGTERM and SIGUSR1 to a process, and to torchrun's ranks through the launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from siren_megatron.signals import StopSignals, describe

REPOSITORY = Path(__file__).resolve().parents[2]

# A rank that writes its pid, works until a signal has come, and says which.
RANK = """
import multiprocessing, os, signal, subprocess, sys, time
from pathlib import Path
from siren_megatron.signals import StopSignals, describe

directory, mode = Path(sys.argv[1]), sys.argv[2]
rank = os.environ.get("RANK", "0")
signals = StopSignals()
if mode == "building":
    (directory / f"{rank}.ready").write_text(str(os.getpid()))
    time.sleep(600)
signals.arm(lambda: mode == "peer failed")
if mode == "unblocked":
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGUSR1})
multiprocessing.get_context("spawn").Queue()  # starts Python's resource tracker, as checkpoint writers do
child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
(directory / f"{rank}.child").write_text(str(child.pid))
(directory / f"{rank}.ready.partial").write_text(str(os.getpid()))
(directory / f"{rank}.ready.partial").rename(directory / f"{rank}.ready")
while not signals.received():
    time.sleep(0.02)
assert child.poll() is None, "the signal took away what the rank had started"
child.communicate(b"end")
# One write: torchrun's ranks share their output unbuffered, and print writes a line's end by itself.
os.write(1, f"rank {rank} heard {describe(signals.received())}\\n".encode())
sys.exit(7 if mode == "fails" and rank == "1" else 0)
"""


def wait_until(condition, seconds, what):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.02)


@contextmanager
def started(tmp_path, mode, *launcher):
    script = tmp_path / "rank.py"
    script.write_text(textwrap.dedent(RANK))
    process = subprocess.Popen(
        [sys.executable, *launcher, str(script), str(tmp_path), mode],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        for ready in tmp_path.glob("*.ready"):  # ranks have sessions of their own
            pid = int(ready.read_text())
            if "rank.py" in command_line(pid):
                os.killpg(pid if launcher else process.pid, signal.SIGKILL)
        process.kill()
        process.communicate()


def command_line(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode()
    except OSError:
        return ""


def wait_for_ranks(tmp_path, process, count):
    def ready():
        assert process.poll() is None, process.communicate()[1][-2000:]
        return len(list(tmp_path.glob("*.ready"))) == count

    wait_until(ready, 120, "the ranks are up")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_whole_group_is_heard_and_hurts_nothing(tmp_path, signum):
    with started(tmp_path, "works") as process:
        wait_for_ranks(tmp_path, process, 1)
        os.killpg(process.pid, signum)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out == f"rank 0 heard {signum.name}\n"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_while_a_run_is_built_a_signal_ends_it_as_ever(tmp_path, signum):
    with started(tmp_path, "building") as process:
        wait_for_ranks(tmp_path, process, 1)
        process.send_signal(signum)
        assert process.wait(timeout=60) == -signum


def test_when_another_rank_failed_there_is_no_step_to_finish(tmp_path):
    with started(tmp_path, "peer failed") as process:
        wait_for_ranks(tmp_path, process, 1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 1


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_heard_though_a_library_unblocked_it(tmp_path, signum):
    with started(tmp_path, "unblocked") as process:
        wait_for_ranks(tmp_path, process, 1)
        process.send_signal(signum)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out == f"rank 0 heard {signum.name}\n"


def test_a_process_that_was_suspended_for_a_while_is_not_told_to_stop(monkeypatch):
    heard, again = [], threading.Event()
    # What CPython 3.11 returns where SIGSTOP outlasts the time limit: a siginfo that nobody has filled.
    answers = [signal.struct_siginfo((1289686832, 0, 0, 0, 0, 0, 0)), None]

    def sigtimedwait(signums, seconds):
        if answers:
            return answers.pop(0)
        again.set()
        threading.Event().wait()

    monkeypatch.setattr(signal, "sigtimedwait", sigtimedwait)
    signals = StopSignals.__new__(StopSignals)  # without the signal handlers of this process
    signals._received, signals._peer_failed, signals._parent = 0, lambda: False, os.getppid()
    monkeypatch.setattr(signals, "_hear", heard.append)
    threading.Thread(target=signals._listen, daemon=True).start()
    assert again.wait(60) and heard == []


LAUNCH = ["-m", "siren_megatron.launch", "--standalone", "--nproc-per-node", "2"]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_the_launcher_hands_signals_on_and_ends_with_0(tmp_path, signum):
    with started(tmp_path, "works", *LAUNCH) as process:
        wait_for_ranks(tmp_path, process, 2)
        process.send_signal(signum)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err[-2000:]
    assert sorted(out.splitlines()) == [f"rank {rank} heard {signum.name}" for rank in (0, 1)]
    assert "Traceback" not in err


def test_the_launcher_ends_with_the_ranks_exit_code(tmp_path):
    with started(tmp_path, "fails", *LAUNCH) as process:
        wait_for_ranks(tmp_path, process, 2)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 7
    assert "launch: rank 1 ended with exit code 7" in err and "Traceback" not in err


def test_plain_torchrun_passes_sigterm_on_and_ends_with_1_all_the_same(tmp_path):
    with started(tmp_path, "works", "-m", "torch.distributed.run", *LAUNCH[2:]) as process:
        wait_for_ranks(tmp_path, process, 2)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert sorted(out.splitlines()) == [f"rank {rank} heard SIGTERM" for rank in (0, 1)]
    assert process.returncode == 1 and "SignalException" in err


def test_ranks_whose_launcher_is_gone_stop_too(tmp_path):
    with started(tmp_path, "works", "-m", "torch.distributed.run", *LAUNCH[2:]) as process:
        wait_for_ranks(tmp_path, process, 2)
        process.send_signal(signal.SIGUSR1)  # torchrun does not know it, and dies
        out, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGUSR1
    assert sorted(out.splitlines()) == [f"rank {rank} heard the end of its launcher" for rank in (0, 1)]


def test_names():
    assert describe(signal.SIGUSR1) == "SIGUSR1"
    assert describe(1_000) == "the end of its launcher"
