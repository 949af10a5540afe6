"""Tokens and time that packing saves over padding, on response lengths like GSM8K's.

    python benchmarks/packing.py --lengths gsm8k/train.jsonl

One optimizer step (forward, backward, update) of a random Qwen2 model, packed and padded interleaved.
Without --lengths, lengths are drawn from a log-normal with GSM8K's mean and spread (in words, x 1.3 tokens).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

TOKENS_PER_WORD = 1.3


def draw_lengths(path: Path | None, count: int, seed: int) -> list[tuple[int, int]]:
    """(prompt tokens, response tokens) of `count` samples."""
    rng = random.Random(seed)
    if path is None:
        return [
            (max(8, int(rng.lognormvariate(4.0, 0.4))), max(8, int(rng.lognormvariate(4.6, 0.5))))
            for _ in range(count)
        ]
    rows = [json.loads(line) for line in path.open()]
    chosen = rng.sample(rows, count)
    sizes = [(len(r["question"].split()), len(r["answer"].split())) for r in chosen]
    return [(int(q * TOKENS_PER_WORD) + 1, int(a * TOKENS_PER_WORD) + 1) for q, a in sizes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--lengths", type=Path, help="GSM8K's JSONL; its word counts give the lengths")
    parser.add_argument("--responses", type=int, default=64)
    parser.add_argument("--micro-batch-size", type=int, default=8, help="of the padded runs")
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    import torch

    from siren_megatron import platform

    device = platform.install()
    platform.init_process_group(device, 600)
    from megatron.core import parallel_state

    from siren_megatron.batch import Sample, make_batch
    from siren_megatron.config import Config, read_hf_config
    from siren_megatron.policy import initialize_model_parallel
    from siren_megatron.trainer import Trainer
    from tests.checkpoints import make_random_checkpoint

    lengths = draw_lengths(args.lengths, args.responses, args.seed)
    generator = torch.Generator().manual_seed(args.seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, args.vocab_size, (count,), generator=generator).tolist())

    samples = [Sample(tokens(p), tokens(r), (-8.0,) * r, "stop") for p, r in lengths]
    longest = max(p + r for p, r in lengths)
    directory = Path(tempfile.mkdtemp())
    checkpoint = make_random_checkpoint(
        directory / "model",
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=4 * args.hidden_size,
        num_hidden_layers=args.layers,
        max_position_embeddings=1024,
    )
    # The same tokens a micro-batch as a padded one of average rows.
    budget = max(longest, sum(p + r for p, r in lengths) * args.micro_batch_size // args.responses)
    trainers, batches = {}, {}
    for name, packed in (("padded", 0), ("packed", budget)):
        config = Config.of(
            hf_checkpoint=checkpoint,
            prompt_data=checkpoint,
            save=directory,
            global_batch_size=args.responses,
            micro_batch_size=args.micro_batch_size,
            max_tokens_per_microbatch=packed,
            rollout_max_response_length=longest,
            seq_length=1024,
        )
        if not trainers:
            initialize_model_parallel(config)
        trainers[name] = Trainer(config, read_hf_config(checkpoint), device)
        rewards = torch.rand(args.responses, generator=generator)
        batch = make_batch(samples, rewards, rewards - 0.5, multiple=trainers[name].length_multiple)
        batches[name] = trainers[name].compute_logprobs(batch)
    fed = {
        name: sum(m.tokens.numel() for m in t.micro_batches(batches[name])[0]) for name, t in trainers.items()
    }
    times: dict[str, list[float]] = {name: [] for name in trainers}
    for _ in range(args.repeats + 1):
        for name, trainer in trainers.items():
            start = time.perf_counter()
            trainer.update(batches[name], 1.0)
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(t[1:]) for name, t in times.items()}
    real = sum(p + r for p, r in lengths)
    print(
        f"{args.responses} responses, {real} real tokens, longest {longest}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} thread(s); median of {args.repeats} interleaved optimizer steps"
    )
    print(f"{'':8}{'tokens fed':>12}{'waste':>9}{'seconds':>10}{'tokens/s':>10}")
    for name in ("padded", "packed"):
        waste, speed = fed[name] / real - 1, real / medians[name]
        print(f"{name:8}{fed[name]:12d}{waste:9.1%}{medians[name]:10.3f}{speed:10.0f}")
    print(
        f"saved_tokens_percent={100 * (1 - fed['packed'] / fed['padded']):.1f} "
        f"time_ratio={medians['packed'] / medians['padded']:.3f}"
    )
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
