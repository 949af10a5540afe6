"""What the fused linear path saves and costs: forward and backward from hidden states, on CPU.

    python benchmarks/vocab_parallel_linear.py --tokens 256 1024 --hidden 896 --vocab 151936

"fused" computes the logits a chunk at a time, twice; "logits" keeps them whole; "separate" is a plain product
followed by vocab_parallel_token_stats. The weight's gradient goes to an fp32 main_grad in the first two.
Prints medians of interleaved rounds, and the growth of the resident set over the inputs and main_grad.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent), str(ROOT / "tests" / "distributed")]
from vocab_parallel import DTYPES, hardware, peak_extra_bytes  # noqa: E402

from siren_megatron.vocab_parallel import linear_token_stats, vocab_parallel_token_stats  # noqa: E402


def make_methods(hidden, weight, labels, upstream, chunk_mb):
    def linear(path):
        def run():
            h = hidden.detach().requires_grad_(True)
            stats = linear_token_stats(h, weight, labels, top_p=0.8, chunk_mb=chunk_mb, path=path)
            torch.autograd.grad(stats, [h, weight], list(upstream), allow_unused=True)

        return run

    def separate():
        h, w = hidden.detach().requires_grad_(True), weight.detach().requires_grad_(True)
        stats = vocab_parallel_token_stats(h @ w.t(), labels, top_p=0.8)
        torch.autograd.grad(stats, [h, w], list(upstream))

    return {"fused": linear("fused"), "logits": linear("logits"), "separate": separate}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--chunk-mb", type=float, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    options = parser.parse_args()
    lines = ["| T | dtype | logits (MB) | path | s | extra memory (MB) |", "|---|---|---|---|---|---|"]
    results = []
    for tokens in options.tokens:
        for name in options.dtype:
            torch.manual_seed(0)
            dtype = DTYPES[name]
            hidden = torch.randn(tokens, options.hidden).to(dtype)
            weight = torch.nn.Parameter((torch.randn(options.vocab, options.hidden) * 0.1).to(dtype))
            weight.main_grad = torch.zeros(weight.shape)
            labels, upstream = torch.randint(0, options.vocab, (tokens,)), torch.randn(3, tokens)
            methods = make_methods(hidden, weight, labels, upstream, options.chunk_mb)
            for run in methods.values():
                run()  # warm-up
            extra = {path: peak_extra_bytes(run) / 2**20 for path, run in methods.items()}
            times = {path: [] for path in methods}
            for _ in range(options.rounds):
                for path, run in methods.items():
                    start = time.perf_counter()
                    run()
                    times[path].append(time.perf_counter() - start)
            size = tokens * options.vocab * dtype.itemsize / 2**20
            for path in methods:
                seconds = statistics.median(times[path])
                results.append(
                    dict(
                        tokens=tokens,
                        dtype=name,
                        path=path,
                        seconds=seconds,
                        extra_mb=extra[path],
                        logits_mb=size,
                    )
                )
                lines.append(
                    f"| {tokens} | {name} | {size:.0f} | {path} | {seconds:.2f} | {extra[path]:.0f} |"
                )
            print("\n".join(lines[-3:]), flush=True)
    if options.output:
        machine = hardware()
        shape = f"H = {options.hidden}, V = {options.vocab}, chunk {options.chunk_mb:.0f} MiB"
        record = dict(machine=machine, hidden=options.hidden, vocab=options.vocab, results=results)
        options.output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        head = ", ".join(f"{k} {v}" for k, v in machine.items())
        options.output.with_suffix(".md").write_text(
            f"# The fused linear path, forward and backward\n\n{head}; {shape}.\n\n" + "\n".join(lines) + "\n"
        )


if __name__ == "__main__":
    main()
