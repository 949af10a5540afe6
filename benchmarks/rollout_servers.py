"""What several vLLM servers, more requests in flight, and --rollout-async-steps bring, on CPUs.

    python benchmarks/rollout_servers.py --checkpoint runs/toy-countdown --output runs/bench-servers

First responses alone: one server or two, with few or many requests in flight, in turns. Then the toy job, 2
trainer ranks, with and without rollouts ahead. Medians; tokens are those of responses.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

IN_FLIGHT = (8, 16, 32, 64)
STAGES = ("time/step", "time/rollout", "time/reward", "time/logprob", "time/train", "time/weight_sync")


def sample(checkpoint: Path, output: Path, prompts: int, samples: int, rounds: int) -> None:
    """Tokens a second of one and of two servers."""
    from transformers import AutoTokenizer

    from siren_megatron.config import Config
    from siren_megatron.rollout.balancer import Balancer
    from siren_megatron.rollout.client import RolloutClient
    from siren_megatron.rollout.hosts import Hosts
    from siren_megatron.rollout.node_servers import NodeServers, server_options

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    with open(checkpoint / "prompts" / "train.jsonl") as lines:
        texts = [json.loads(line)["problem"] for line, _ in zip(lines, range(prompts), strict=False)]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    config = Config.of(
        hf_checkpoint=checkpoint, prompt_data=checkpoint, save=output, seq_length=64, rollout_num_servers=2
    )
    options = server_options(config, Hosts(), on_cpu=True)
    servers = NodeServers(options, config.rollout.rollout_health_timeout)
    rates: dict[tuple[int, int], list[float]] = defaultdict(list)
    try:
        servers.connect()
        for round_ in range(rounds + 1):
            for number in (1, 2):
                for in_flight in IN_FLIGHT:
                    clients = [RolloutClient(s.url, 600, in_flight, server=s) for s in list(servers)[:number]]
                    start = time.perf_counter()
                    groups = Balancer(clients).generate(
                        ids,
                        num_samples=samples,
                        max_tokens=16,
                        temperature=1.0,
                        seed=round_,
                        stop_token_ids=[tokenizer.eos_token_id],
                    )
                    tokens = sum(len(s.response_ids) for group in groups for s in group)
                    if round_:  # the first one warms up
                        rates[number, in_flight].append(tokens / (time.perf_counter() - start))
    finally:
        servers.stop()
    print(f"{prompts} prompts x {samples} responses, median of {rounds} rounds (lowest to highest)")
    for (number, in_flight), values in rates.items():
        print(
            f"{number} server(s), {in_flight:3} in flight each: {statistics.median(values):8,.0f} tokens/s "
            f"({min(values):,.0f} to {max(values):,.0f})"
        )


def train(checkpoint: Path, output: Path, steps: int, repeats: int) -> None:
    """Seconds of a step of the toy job, with rollouts ahead and without."""
    from siren_megatron.metrics import read_metrics
    from tests.integration.jobs import run_job, toy_options

    rows: dict[int, list[dict[str, float]]] = defaultdict(list)
    for repeat in range(repeats):
        for ahead in (0, 1):
            save = output / f"ahead{ahead}-{repeat}"
            # A rollout that takes about as long as a step: else there is nothing to hide.
            options = toy_options(
                checkpoint,
                save,
                num_steps=steps,
                rollout_batch_size=32,
                rollout_num_samples=8,
                global_batch_size=64,
                rollout_async_steps=ahead,
                rollout_correction="token-truncate",
            )
            done = run_job(options)
            if done.returncode:
                raise SystemExit(done.stderr[-2000:])
            rows[ahead] += read_metrics(save / "metrics.jsonl")[2:]
    print(f"32 prompts x 8 responses a step, 2 ranks, {steps - 2} steps of {repeats} run(s) each, medians")
    print(f"{'--rollout-async-steps':24}" + "".join(f"{name.removeprefix('time/'):>13}" for name in STAGES))
    for ahead, found in rows.items():
        medians = [statistics.median(row.get(name, 0.0) for row in found) for name in STAGES]
        print(f"{ahead:<24}" + "".join(f"{value:11.3f} s" for value in medians))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="of tools/make_toy_checkpoint.py")
    parser.add_argument(
        "--output", type=Path, required=True, help="directory to write into; emptied at the end"
    )
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=14, help="of each training run; 2 are left out")
    parser.add_argument("--repeats", type=int, default=2, help="training runs of each kind; 0 = none")
    args = parser.parse_args()
    args.output.mkdir(parents=True)
    sample(args.checkpoint, args.output, args.prompts, args.samples, args.rounds)
    if args.repeats:
        train(args.checkpoint, args.output, args.steps, args.repeats)
    shutil.rmtree(args.output)


if __name__ == "__main__":
    main()
