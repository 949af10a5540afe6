"""What the ranks of `test_transformer_engine` do, with tests/standins in Transformer Engine's place."""

from __future__ import annotations

import sys
from pathlib import Path

STANDINS = Path(__file__).resolve().parents[1] / "standins"
TE = {"transformer_impl": "transformer_engine"}


def install_standin() -> None:
    """Before megatron-core is imported in this process."""
    assert not any(name.startswith("megatron") for name in sys.modules), "too late"
    sys.path.insert(0, str(STANDINS))


def update(rank: int, world_size: int, jobs: list):
    """For `run_ranks`: as `gradients.update`."""
    install_standin()
    from tests.distributed import gradients

    return gradients.update(rank, world_size, jobs)


def cross_checkpoints(rank: int, world_size: int, checkpoint: Path, directory: Path):
    """For `run_ranks`: save with one kind of layers at TP=2, go on with the other, and back.

    Returns:
        For both kinds: what the run that saved went on to, and those that loaded, at TP=2 and PP=2.
    """
    install_standin()
    from tests.distributed.test_checkpoint import PP, TP, load_and_go_on, save_and_go_on
    from tests.distributed.test_layouts import SP

    results = []
    for name, own, other in (("local", {}, TE), ("te", TE, {})):
        went_on = save_and_go_on(rank, world_size, checkpoint, directory / name, {**SP, **own})
        layouts = [{**SP, **other}, {PP: 2, **other}]
        resumed = load_and_go_on(rank, world_size, checkpoint, directory / name, layouts, {TP: 2})
        results.append((went_on, resumed))
    return results
