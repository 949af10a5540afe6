"""torchrun that hands SIGTERM and SIGUSR1 to its ranks and waits for them to finish their step.

    python -m siren_megatron.launch --nproc-per-node 4 pretrain_siren.py OPTIONS

takes torchrun's own options. torchrun itself kills the ranks 30 s after a SIGTERM and then ends with a
traceback and exit code 1 whatever they did, and SIGUSR1 kills it. Here the job ends when its ranks have
saved, with exit code 0.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from types import FrameType

import psutil

from siren_megatron.signals import STOP_SIGNALS


def _hand_on(signum: int, frame: FrameType | None) -> None:
    ranks = psutil.Process().children()
    for rank in ranks:
        # The rank itself, not its group: what it started knows nothing of the signal.
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.send_signal(signum)
    if not ranks:  # before the first rank or after the last
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)


def main(argv: list[str] | None = None) -> int:
    """Run torchrun with argv; returns the exit code."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    for signum in STOP_SIGNALS:
        signal.signal(signum, _hand_on)
    args = parse_args(sys.argv[1:] if argv is None else argv)
    # torchrun sets handlers for what it is told to handle: Ctrl-C and its like stay with it.
    handled = {name.strip() for name in args.signals_to_handle.split(",")}
    args.signals_to_handle = ",".join(sorted(handled - {signum.name for signum in STOP_SIGNALS}))
    try:
        run(args)
    except ChildFailedError as failed:
        # The rank has said why; torchrun's own page about it says nothing more.
        rank, failure = failed.get_first_failure()
        print(f"launch: rank {rank} ended with exit code {failure.exitcode}", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    return 0


if __name__ == "__main__":
    sys.exit(main())
