"""A trainer on random responses, as a side that takes turns; and how the other benchmarks start such sides.

    python benchmarks/training.py WORK.json DIRECTORY    # siren_overhead.py, memory.py and growth.py do

A turn is what a rollout step leaves to the trainer: the log-prob pass and one optimizer step. Its report has
their seconds, the responses' mean entropy in nats, and how many rows of the update had a nucleus too large
for the fast path. No vLLM is started, and no rewards are computed.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from turns import Side, Turn, Turns  # noqa: E402


@dataclass(frozen=True)
class Work:
    """One trainer and what it trains on.

    Args:
        name: for tables.
        hidden, layers, vocab: of a Qwen2 with heads of 64 and tied embeddings.
        responses, tokens: of an optimizer step, and of each response; prompts have 16 more.
        ranks: processes.
        threads: of each process.
        logit_std: standard deviation of the logits. At 6 a response token's entropy is a nat or two and its
            nucleus some tokens, as of a language model; at 1 a nucleus is most of the vocabulary.
        options: of pretrain_siren.py, by field name.
    """

    name: str
    hidden: int = 512
    layers: int = 4
    vocab: int = 32_000
    responses: int = 8
    tokens: int = 128
    ranks: int = 1
    threads: int = 2
    logit_std: float = 6.0
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def total_tokens(self) -> int:
        """Of an optimizer step, prompts included."""
        return self.responses * (self.tokens + PROMPT_TOKENS)


PROMPT_TOKENS = 16


@contextlib.contextmanager
def sides(works: list[Work]) -> Iterator[list[Side]]:
    """A waiting side for each work; they end with the context."""
    with tempfile.TemporaryDirectory(prefix="training-") as temporary, contextlib.ExitStack() as stack:
        started = []
        for number, work in enumerate(works):
            directory = Path(temporary) / str(number)
            path = Path(temporary) / f"{number}.json"
            path.write_text(json.dumps(asdict(work)))
            command = [sys.executable, str(HERE / "training.py"), str(path)]
            if work.ranks > 1:
                command[1:1] = ["-m", "siren_megatron.launch", "--nproc-per-node", str(work.ranks)]
            environment = {
                **os.environ,
                "OMP_NUM_THREADS": str(work.threads),
                "PYTHONPATH": os.pathsep.join(
                    filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH", "")])
                ),
            }
            started.append(Side(work.name, command, directory, environment))
            stack.callback(started[-1].close)
        yield started


def step_seconds(turn: Turn) -> float:
    """Of the log-prob pass and the update."""
    return turn.report["logprob"] + turn.report["train"]


def run(work: Work, directory: Path) -> None:
    """The side itself."""
    import torch

    from siren_megatron import platform

    torch.set_num_threads(work.threads)
    device = platform.install()
    platform.init_process_group(device, 600)
    from siren_megatron.batch import Sample, make_batch
    from siren_megatron.config import Config, read_hf_config
    from siren_megatron.policy import initialize_model_parallel
    from siren_megatron.trainer import Trainer
    from tests.checkpoints import make_random_checkpoint

    rank = torch.distributed.get_rank()
    checkpoint = directory / "model"
    if rank == 0:
        make_random_checkpoint(
            checkpoint,
            # The head's inputs, normalised, have a length of sqrt(hidden); embeddings are the head's weights.
            std=work.logit_std / work.hidden**0.5,
            vocab_size=work.vocab,
            hidden_size=work.hidden,
            intermediate_size=3 * work.hidden,
            num_hidden_layers=work.layers,
            num_attention_heads=work.hidden // 64,
            num_key_value_heads=work.hidden // 128,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
        )
    torch.distributed.barrier()
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, work.vocab, (count,), generator=generator).tolist())

    config = Config.of(
        hf_checkpoint=checkpoint,
        prompt_data=checkpoint,
        save=directory,
        global_batch_size=work.responses,
        rollout_max_response_length=work.tokens,
        seq_length=work.tokens + PROMPT_TOKENS,
        **work.options,
    )
    initialize_model_parallel(config)
    trainer = Trainer(config, read_hf_config(checkpoint), device)
    samples = [
        Sample(tokens(PROMPT_TOKENS), tokens(work.tokens), (-8.0,) * work.tokens, "stop")
        for _ in range(work.responses)
    ]
    rewards = torch.rand(work.responses, generator=generator)
    batch = make_batch(samples, rewards, rewards - rewards.mean(), multiple=trainer.length_multiple)
    turns, report = Turns(directory) if rank == 0 else None, {}
    while True:
        if turns is not None:
            turns.wait(report)
        torch.distributed.barrier()
        started = time.perf_counter()
        measured = trainer.compute_logprobs(batch)
        passed = time.perf_counter()
        metrics = trainer.update(measured, 1.0)
        report = {
            "logprob": passed - started,
            "train": time.perf_counter() - passed,
            "entropy": float(measured.entropy[measured.loss_mask].mean()),
            "fallback_rows": metrics["top_p_fallback_rows"],
        }


if __name__ == "__main__":
    run(Work(**json.loads(Path(sys.argv[1]).read_text())), Path(sys.argv[2]))
