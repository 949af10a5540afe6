"""What the ranks of `test_transformer_engine` do, with tests/standins in Transformer Engine's place."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

STANDINS = Path(__file__).resolve().parents[1] / "standins"


def install_standin() -> None:
    """Before megatron-core is imported in this process."""
    assert not any(name.startswith("megatron") for name in sys.modules), "too late"
    sys.path.insert(0, str(STANDINS))


def train_layouts(rank: int, world_size: int, *arguments: Any):
    """For `run_ranks`: as `layouts.train_layouts`."""
    install_standin()
    from tests.distributed import layouts

    return layouts.train_layouts(rank, world_size, *arguments)


def cross_checkpoints(rank: int, world_size: int, checkpoint: Path, directory: Path):
    """For `run_ranks`: save with one kind of layers at TP=2, go on with the other, and back.

    Returns:
        For both kinds: what the run that saved went on to, and those that loaded, at TP=2 and PP=2.
    """
    install_standin()
    from tests.distributed.test_checkpoint import PP, TP, load_and_go_on, save_and_go_on
    from tests.distributed.test_layouts import SP

    results = []
    for saved_by, loaded_by in (("local", "transformer_engine"), ("transformer_engine", "local")):
        place, own, other = (
            directory / saved_by,
            {"transformer_impl": saved_by},
            {"transformer_impl": loaded_by},
        )
        went_on = save_and_go_on(rank, world_size, checkpoint, place, {**SP, **own})
        layouts = [{**SP, **other}, {PP: 2, **other}]
        results.append((went_on, load_and_go_on(rank, world_size, checkpoint, place, layouts, {TP: 2})))
    return results


def implementations(rank: int, world_size: int, checkpoint: Path) -> dict[str, str]:
    """For `run_ranks`: what `find_implementations` finds in a trainer of Transformer Engine's layers."""
    install_standin()
    from siren_megatron import platform
    from siren_megatron.config import read_hf_config
    from tests.distributed.layouts import config_of

    device = platform.install()
    from siren_megatron.implementations import find_implementations
    from siren_megatron.trainer import Trainer, initialize_model_parallel

    config = config_of(checkpoint, transformer_impl="transformer_engine")
    initialize_model_parallel(config)
    trainer = Trainer(config, read_hf_config(checkpoint), device)
    return find_implementations(trainer.chunks, trainer.optimizer)
