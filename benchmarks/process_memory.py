"""Memory of a process and all its descendants: the proportional set size (PSS), sampled while they run."""

from __future__ import annotations

import threading
from pathlib import Path

INTERVAL_S = 0.2


def _children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [int(child) for child in task.read_text().split()]
        except OSError:
            continue  # the thread has ended
    return found


def process_tree(pid: int) -> list[int]:
    """`pid` and its descendants, by /proc."""
    tree = [pid]
    for parent in tree:  # grows while it is walked
        tree += _children(parent)
    return tree


def tree_pss_bytes(pid: int) -> int:
    """Bytes of `pid` and its descendants; a page that n processes share counts 1/n in each of them."""
    total = 0
    for process in process_tree(pid):
        try:
            rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
        except OSError:
            continue  # it has ended
        total += next((int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")), 0)
    return total * 1024


class PeakMemory:
    """The largest `tree_pss_bytes` of a process tree while the context is open.

    Args:
        pid: root of the tree.

    Attributes:
        peak: bytes.
    """

    def __init__(self, pid: int):
        self.pid, self.peak = pid, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, tree_pss_bytes(self.pid))
            if self._stop.wait(INTERVAL_S):
                return
