"""Run a function on several gloo ranks, one spawned process each.

The function and its arguments are pickled: the function must stand at the top level of an importable module.
"""

import datetime
import os
import pickle
import queue
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _leave_with(parent: int) -> None:
    """End this process when its parent is gone (killed by a time limit, say): no rank is left spinning."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _rank_main(
    fn: Callable, rank: int, world_size: int, port: int, args: tuple, timeout: float, backend: str, results
) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)  # its GPU, where there are some
    if backend == "nccl":
        torch.cuda.set_device(rank)
    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()
    try:
        store = dist.TCPStore(
            "127.0.0.1", port, world_size, is_master=False, timeout=datetime.timedelta(seconds=timeout)
        )
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=timeout),
        )
        value = fn(rank, world_size, *args)
        dist.barrier()
        results.put((rank, pickle.dumps(value), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
        raise SystemExit(1) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _join_errors(rank: int, error: str, results) -> str:
    """The first error and those that follow within a second: the first to arrive may be a mere echo."""
    message = f"rank {rank} failed:\n{error}"
    try:
        while True:
            rank, _, error = results.get(timeout=1.0)
            if error is not None:
                message += f"\nrank {rank} failed:\n{error}"
    except queue.Empty:
        return message


def run_ranks(
    fn: Callable, world_size: int, *args: Any, timeout: float = 120.0, backend: str = "gloo"
) -> list[Any]:
    """Call fn(rank, world_size, *args) on world_size ranks and return its values in rank order.

    Each rank has a process group of its own making (loopback, a port chosen by the system) and one thread.
    Values come back pickled: return plain numbers, numpy arrays or small CPU tensors.

    Args:
        timeout: hard limit in seconds for the whole run; then every rank is killed.
        backend: "gloo", or "nccl" with a GPU a rank.

    Raises:
        RuntimeError: a rank failed (its traceback is in the message) or died without a word.
        TimeoutError: the limit passed.
    """
    context = mp.get_context("spawn")
    store = dist.TCPStore("127.0.0.1", 0, world_size, is_master=True, wait_for_workers=False)
    results = context.Queue()
    # Not daemons: megatron-core's checkpoint writer starts processes of its own.
    ranks = [
        context.Process(
            target=_rank_main, args=(fn, rank, world_size, store.port, args, timeout, backend, results)
        )
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    values: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    try:
        while len(values) < world_size:
            try:
                rank, value, error = results.get(timeout=0.2)
            except queue.Empty:
                dead = [r for r, p in enumerate(ranks) if p.exitcode not in (None, 0) and r not in values]
                if dead and results.empty():
                    code = ranks[dead[0]].exitcode
                    raise RuntimeError(f"rank {dead[0]} ended with exit code {code}") from None
                if time.monotonic() > deadline:
                    missing = sorted(set(range(world_size)) - set(values))
                    raise TimeoutError(f"ranks {missing} did not finish within {timeout:.0f} s") from None
                continue
            if error is not None:
                raise RuntimeError(_join_errors(rank, error, results))
            values[rank] = pickle.loads(value)
        for process in ranks:
            process.join(timeout=max(0.0, min(10.0, deadline - time.monotonic())))
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()
                process.join()
    return [values[rank] for rank in range(world_size)]
