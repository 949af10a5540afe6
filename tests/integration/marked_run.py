"""pretrain_siren.py, for a test that kills it: rank 0 leaves a file `<stage>-<step>` where it is.

The directory for the files is in SIREN_TEST_MARKS. Stages: `rollout`, `train` (in the middle of a step's
optimizer steps) and `save` (all of a checkpoint's tensors are written, nothing else of it is). A rank's
writer waits for the kill in the save whose step is in SIREN_TEST_STOP_IN_SAVE.
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pretrain_siren
from siren_megatron.config import parse_args


def mark(stage: str, step: int) -> None:
    if os.environ["RANK"] == "0":
        (Path(os.environ["SIREN_TEST_MARKS"]) / f"{stage}-{step}").touch()


def main() -> None:
    parse_args()
    from siren_megatron import platform

    platform.install()
    from siren_megatron.checkpointing import writer as checkpoint_writer
    from siren_megatron.collector import Collector
    from siren_megatron.trainer import Trainer

    collect, optimizer_step, write = Collector.collect, Trainer.optimizer_step, checkpoint_writer._write

    def marked_collect(self, step):
        mark("rollout", step)
        return collect(self, step)

    def marked_optimizer_step(self, *args, **kwargs):
        if kwargs["index"] == 1:
            mark("train", kwargs["step"] + 1)
        return optimizer_step(self, *args, **kwargs)

    def marked_write(buckets, transforms):
        written = write(buckets, transforms)
        step = int(Path(buckets[0][0]).parent.name.removeprefix("step_").removesuffix(".partial"))
        mark("save", step)
        if step == int(os.environ.get("SIREN_TEST_STOP_IN_SAVE", "0")):
            signal.pause()
        return written

    Collector.collect, Trainer.optimizer_step = marked_collect, marked_optimizer_step
    checkpoint_writer._write = marked_write
    pretrain_siren.main()


if __name__ == "__main__":
    main()
