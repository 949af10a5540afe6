"""How long a weight update of a running vLLM takes, and what it is bounded by: 0.5B parameters on a CPU.

A random checkpoint of Qwen2.5-0.5B's shape in bfloat16, a real vLLM server, and a `WeightPublisher` in this
process. Each tensor is put together of two halves as it is asked for, as tensor-parallel gathering would. In
the same run, the bound: the same tensors copied once, by one thread, into memory that is there already.

    python benchmarks/weight_sync.py [--repeats 7] [--chunk-mib 64 512] [--output results.json]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from siren_megatron.rollout.server import RolloutServer
from siren_megatron.rollout.vllm_command import ServerOptions
from siren_megatron.rollout.weight_sync import WeightPublisher


def make_model(small: bool) -> Qwen2ForCausalLM:
    """Qwen2.5-0.5B's shape with random weights, or a toy for trying this script."""
    shape = dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, vocab_size=151936)
    if small:
        shape = dict(hidden_size=224, intermediate_size=512, num_hidden_layers=3, vocab_size=4096)
    config = Qwen2Config(
        **shape,
        num_attention_heads=14 if not small else 7,
        num_key_value_heads=2 if not small else 1,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.tie_weights()
    return model


def gather(tensors: list[tuple[str, torch.Tensor]], spent: list[float]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor joined from two halves; adds the seconds that this takes to `spent`."""
    for name, tensor in tensors:
        started = time.perf_counter()
        joined = torch.cat([half.clone() for half in tensor.chunk(2)])
        spent.append(time.perf_counter() - started)
        yield name, joined


class Memory:
    """Largest growth of this process's memory and its files in shared memory while it is entered; bytes."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __enter__(self) -> Memory:
        self._end, self._start = threading.Event(), self._now()
        self.peak = 0
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(0.005):
            self.peak = max(self.peak, self._now() - self._start)

    def _now(self) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        private = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
        files = 0
        for path in self._directory.iterdir():
            with contextlib.suppress(FileNotFoundError):
                files += path.stat().st_blocks * 512
        return private * 1024 + files


def seconds(action) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7, help="measured updates, after one that is not")
    parser.add_argument(
        "--chunk-mib", type=int, nargs="+", default=[128], help="sizes of a chunk, measured in turns"
    )
    parser.add_argument("--small", action="store_true", help="a toy model, to try this script")
    parser.add_argument("--output", type=Path, help="JSON file for the numbers")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        model = make_model(args.small)
        model.save_pretrained(f"{directory}/model")
        tensors = [(name, parameter.detach()) for name, parameter in model.named_parameters()]
        num_bytes = sum(tensor.nbytes for _, tensor in tensors)
        options = ServerOptions(
            model=Path(directory) / "model",
            log_file=Path(directory) / "vllm.log",
            dtype="bfloat16",
            max_model_len=1024,
        )
        with RolloutServer.start(options) as server:
            server.wait_ready()
            publishers = {mib: WeightPublisher([server], chunk_bytes=mib * 2**20) for mib in args.chunk_mib}
            next(iter(publishers.values())).init()
            target = torch.ones(num_bytes // 2, dtype=torch.bfloat16)

            def copy_once() -> None:
                offset = 0
                for _, tensor in tensors:
                    target[offset : offset + tensor.numel()].copy_(tensor.flatten())
                    offset += tensor.numel()

            copies: list[float] = []
            rows = {mib: {"update_s": [], "gather_s": [], "peak_mib": []} for mib in publishers}
            for repeat in range(args.repeats + 1):
                copied = seconds(copy_once)
                print(f"{repeat}: one copy {copied:.2f} s")
                if repeat:  # the first meets cold caches
                    copies.append(copied)
                for mib, publisher in publishers.items():
                    spent: list[float] = []
                    with Memory(server.transfer_dir) as memory:
                        stats = publisher.update(gather(tensors, spent))
                    numbers = stats.seconds, sum(spent), memory.peak / 2**20
                    print(
                        "   chunks of {} MiB: {:.2f} s, gathering {:.2f} s of it; +{:.0f} MiB".format(
                            mib, *numbers
                        )
                    )
                    if repeat:
                        for values, number in zip(rows[mib].values(), numbers, strict=True):
                            values.append(number)
    result = {"bytes": num_bytes, "repeats": args.repeats, "one_copy_s": summary(copies)}
    for mib, row in rows.items():
        result[f"chunk_{mib}_mib"] = {name: summary(values) for name, values in row.items()}
    print(json.dumps(result))
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
