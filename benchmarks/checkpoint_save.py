"""How long a save keeps the training waiting: here, in the background, and by megatron-core alone.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/checkpoint_save.py --output DIR

A random Qwen2 model at TP = all ranks, Adam, float32. Each round does one of each, one after the other, with
a training step before and behind it, and one beside the background save.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--output", type=Path, required=True, help="directory to write into; emptied at the end"
    )
    parser.add_argument("--hidden-size", type=int, default=768)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab-size", type=int, default=16000)
    parser.add_argument("--rounds", type=int, default=4, help="the first is told apart")
    args = parser.parse_args()

    import torch
    import torch.distributed as dist

    from siren_megatron import platform

    device = platform.install()
    platform.init_process_group(device, 600)
    from megatron.core import dist_checkpointing

    from siren_megatron.batch import make_batch
    from siren_megatron.checkpointing import checkpoint
    from siren_megatron.config import read_hf_config
    from siren_megatron.policy import initialize_model_parallel
    from siren_megatron.trainer import Trainer
    from tests.checkpoints import make_random_checkpoint
    from tests.distributed.layouts import config_of, fixed_samples

    model = args.output / "model"
    if dist.get_rank() == 0:
        make_random_checkpoint(
            model,
            vocab_size=args.vocab_size,
            hidden_size=args.hidden_size,
            intermediate_size=4 * args.hidden_size,
            num_hidden_layers=args.layers,
            std=0.02,
        )
    dist.barrier()
    config = config_of(model, tensor_model_parallel_size=dist.get_world_size())
    initialize_model_parallel(config)
    trainer = Trainer(config, read_hf_config(model), device)
    samples, rewards = fixed_samples()
    batch = make_batch(samples, rewards, rewards - 0.5, multiple=trainer.length_multiple)
    batch = trainer.compute_logprobs(batch)
    trainer.update(batch, 1.0)

    times: dict[str, list[float]] = defaultdict(list)

    def timed(name: str, function, *arguments) -> None:
        dist.barrier()
        start = time.perf_counter()
        function(*arguments)
        dist.barrier()
        times[name].append(time.perf_counter() - start)

    def megatron_save(directory: Path) -> None:
        content = checkpoint._sharded_state(trainer, is_loading=False)
        content.update(scheduler=trainer.scheduler.state_dict(), run={})
        dist_checkpointing.save(content, str(directory))

    def train() -> None:
        trainer.update(batch, 1.0)

    savers = {
        kind: checkpoint.CheckpointSaver(
            args.output / kind, trainer, asynchronous=kind == "async", total_limit=1
        )
        for kind in ("sync", "async")
    }
    # Made by the savers, whose results need no server: megatron-core's own save starts one.
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    ours, theirs = filesystem_async._results_queue, None
    for round_ in range(args.rounds):
        directory = args.output / f"megatron{round_}"
        if dist.get_rank() == 0:
            directory.mkdir(parents=True)
        timed("training step, nothing beside it", train)
        filesystem_async._results_queue = theirs
        timed("megatron-core's save, blocks", megatron_save, directory)
        theirs, filesystem_async._results_queue = filesystem_async._results_queue, ours
        if dist.get_rank() == 0:
            shutil.rmtree(directory)
        timed("save, blocks", savers["sync"].save, {"step": round_})
        start = time.perf_counter()
        timed("--async-save, blocks", savers["async"].save, {"step": round_})
        timed("training step beside the writers", train)
        savers["async"].wait()
        times["--async-save, until it is named"].append(time.perf_counter() - start)
    timed("load, checksums and all", checkpoint.load_checkpoint, args.output / "sync", trainer)
    if dist.get_rank() == 0:
        size = sum(p.stat().st_size for p in (args.output / "sync").rglob("*") if p.is_file())
        print(f"{size / 1e9:.2f} GB, {dist.get_world_size()} ranks, torch {torch.__version__}")
        print(f"{'':36}{'first':>8}{'median of the others':>24}")
        for name, values in times.items():
            later = f"{statistics.median(values[1:]):.2f} s" if values[1:] else ""
            print(f"{name:36}{values[0]:6.2f} s{later:>24}")
        shutil.rmtree(args.output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
