"""Side by side: top-p token statistics against what peers compute, forward and backward, on CPU.

    python benchmarks/vocab_parallel.py --tokens 1024 --vocab 151936 --dtype fp32 bf16 --tp 1 2 --rows lm flat

Every method gets the same logits and the same upstream gradients, in one interleaved run: times are medians
over the rounds. verl is measured when it can be imported (requirements/bench-vocab-parallel.txt). The slow
methods get fewer rows (--slow-tokens), their time is scaled by the rows. "heap retained" keeps freed memory
in this process, as a caching allocator does. "floor" reads the logits once, then reads and writes as many
bytes in place: what memory alone would take.
"""

import argparse
import ctypes
import datetime
import itertools
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "distributed")]  # other packages also install a "tests"
from launch import run_ranks  # noqa: E402
from vocab_parallel_peers import CANDIDATE, SLOW, language_model_rows, make_methods  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def retain_heap() -> None:
    """glibc: no mmap for large blocks, no trimming."""
    libc = ctypes.CDLL(None)
    libc.mallopt(-4, 0)  # M_MMAP_MAX
    libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


class CountCollectives:
    """Collectives called inside the block."""

    NAMES = ("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_single", "all_to_all_single")

    def __enter__(self):
        self.count = 0
        self.originals = {name: getattr(dist, name) for name in self.NAMES}
        for name, original in self.originals.items():

            def counted(*args, original=original, **kwargs):
                self.count += 1
                return original(*args, **kwargs)

            setattr(dist, name, counted)
        return self

    def __exit__(self, *_):
        for name, original in self.originals.items():
            setattr(dist, name, original)


def peak_extra_bytes(run) -> int:
    """Growth of the resident set while run() runs (Linux; meaningful where the heap is not retained)."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def measure(case: dict, options: argparse.Namespace, rank: int, size: int) -> list[dict]:
    """All methods on one case; times are the slowest rank's."""
    torch.manual_seed(0)
    dtype, tokens, vocab = DTYPES[case["dtype"]], case["tokens"], case["vocab"]
    shard = vocab // size
    z = torch.empty(tokens, shard, dtype=dtype)
    for part in z.split(256):  # the whole vocabulary of all rows would be the peak of the memory
        rows = (
            language_model_rows(len(part), vocab) if case["rows"] == "lm" else torch.randn(len(part), vocab)
        )
        part.copy_(rows[:, rank * shard : (rank + 1) * shard])
    del rows
    labels = torch.randint(0, vocab, (tokens,))
    upstream = torch.randn(3, tokens)
    methods = make_methods(size, options.top_p, candidate=CANDIDATE in (options.methods or ()))
    if options.methods:
        methods = {name: methods[name] for name in options.methods if name in methods}
    few = min(tokens, options.slow_tokens)
    results = {}

    def prepare(name):
        if hasattr(methods[name], "prepare"):
            methods[name].prepare(z)

    def run(name):
        n = few if name in SLOW else tokens
        return methods[name](z[:n], labels[:n], upstream[:, :n])

    for name in list(methods):
        prepare(name)
        try:
            with CountCollectives() as collectives:
                info = run(name)  # also the warm-up: compiles, fills caches
        except (RuntimeError, ImportError, MemoryError) as error:
            print(
                f"  {name}: not measured ({type(error).__name__}: {str(error).splitlines()[0]})", flush=True
            )
            del methods[name]
            continue
        results[name] = dict(method=name, collectives=collectives.count, times=[], **(info or {}))
        prepare(name)
        if options.heap == "fresh":
            extra = peak_extra_bytes(lambda name=name: run(name))
            results[name]["extra_bytes"] = extra * tokens // (few if name in SLOW else tokens)
    for round_ in range(options.rounds):
        for name in methods:
            if name in SLOW and round_ >= options.slow_rounds:
                continue
            prepare(name)
            dist.barrier()
            clock = time.perf_counter if options.clock == "wall" else time.process_time
            start = clock()
            run(name)
            elapsed = torch.tensor(clock() - start)
            dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
            results[name]["times"].append(elapsed.item() * tokens / (few if name in SLOW else tokens))
    out = []
    for result in results.values():
        times = result.pop("times")
        logits = tokens * vocab
        result.update(case, tp=size, heap=options.heap, milliseconds=1e3 * statistics.median(times))
        result.update(
            best_milliseconds=1e3 * min(times), rounds=len(times),
            ns_per_logit=1e9 * statistics.median(times) / logits, logits_bytes=z.nbytes,
        )  # fmt: skip
        out.append(result)
    return out


def run_rank(
    rank: int, size: int, cases: list[dict], options: argparse.Namespace, earlier: list[dict]
) -> list[dict]:
    if options.heap == "retained":
        retain_heap()
    torch.set_num_threads(max(1, options.threads // size))
    rows = []
    for case in cases:
        found = measure(case, options, rank, size)
        rows.extend(found)
        if rank == 0:
            print(table(found), flush=True)
            if options.output:
                write(options, earlier + rows)
    return rows


def table(rows: list[dict]) -> str:
    """A case's methods as a markdown table."""
    case = rows[0]
    by_name = {row["method"]: row for row in rows}
    verl, floor = by_name.get("verl"), by_name.get("floor")
    lines = [
        f"### {case['rows']} rows, T = {case['tokens']}, V = {case['vocab']}, {case['dtype']}, "
        f"TP = {case['tp']}, heap {case['heap']}",
        "",
        "| method | ms | best ms | ns/logit | of verl | of floor | extra memory (MB; ÷ logits) | collectives "
        "| fallback rows |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:

        def ratio(to, row=row):
            return f"{row['milliseconds'] / to['milliseconds']:.3g}" if to else ""

        memory = ""
        if "extra_bytes" in row:
            memory = f"{row['extra_bytes'] / 2**20:.0f}; {row['extra_bytes'] / row['logits_bytes']:.2f}"
        lines.append(
            f"| {row['method']} | {row['milliseconds']:.1f} | {row['best_milliseconds']:.1f} "
            f"| {row['ns_per_logit']:.2f} | {ratio(verl)} | {ratio(floor)} | {memory} | {row['collectives']} "
            f"| {row.get('fallback', '')} |"
        )
    return "\n".join(lines) + "\n"


def write(options: argparse.Namespace, results: list[dict]) -> None:
    """OUTPUT.json and OUTPUT.md, anew after each case: an interrupted run keeps what it has."""
    options.output.parent.mkdir(parents=True, exist_ok=True)
    record = dict(machine=options.machine, threads=options.threads, clock=options.clock, top_p=options.top_p)
    record["results"] = results
    options.output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    keys = ("tp", "rows", "tokens", "vocab", "dtype")
    groups = itertools.groupby(results, key=lambda row: tuple(row[k] for k in keys))
    text = "\n".join(table(list(group)) for _, group in groups)
    head = ", ".join(f"{k} {v}" for k, v in options.machine.items())
    options.output.with_suffix(".md").write_text(
        f"# vocab_parallel, forward and backward\n\n{head}, {options.threads} threads in all, "
        f"{options.clock} time.\n\n{text}"
    )


def hardware() -> dict:
    model = "unknown CPU"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
    found = dict(
        cpu=model, cores=os.cpu_count(), avx512="avx512f" in Path("/proc/cpuinfo").read_text(),
        date=datetime.date.today().isoformat(), python=platform.python_version(), torch=torch.__version__,
        load_at_start=os.getloadavg()[0],
    )  # fmt: skip
    try:
        from importlib.metadata import version

        found["verl"] = version("verl")
        found["megatron_core"] = version("megatron-core")
    except ImportError:
        found["verl"] = None
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024], help="rows of logits")
    parser.add_argument("--vocab", type=int, nargs="+", default=[151_936])
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", choices=["lm", "flat"], nargs="+", default=["lm"], help="shape of the rows")
    parser.add_argument("--heap", choices=["retained", "fresh"], default="retained")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="in all; divided over the ranks")
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: of a rank's threads; for busy machines"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--slow-rounds", type=int, default=2, help="rounds of the slow methods")
    parser.add_argument("--slow-tokens", type=int, default=64, help="rows given to the slow methods")
    parser.add_argument("--top-p", type=float, default=0.8)
    parser.add_argument("--methods", nargs="*", help="only these")
    parser.add_argument(
        "--max-gb", type=float, default=8.0, help="skip cases whose logits take more than 1/6 of it"
    )
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    options = parser.parse_args()
    cases = []
    for rows, tokens, vocab, dtype in itertools.product(
        options.rows, options.tokens, options.vocab, options.dtype
    ):
        if tokens * vocab * DTYPES[dtype].itemsize * 6 > options.max_gb * 2**30:
            print(f"skipped: T = {tokens}, V = {vocab}, {dtype} would not fit --max-gb {options.max_gb}")
            continue
        cases.append(dict(rows=rows, tokens=tokens, vocab=vocab, dtype=dtype))
    options.machine = hardware()
    results = []
    for size in options.tp:
        results.extend(run_ranks(run_rank, size, cases, options, results, timeout=7200.0)[0])


if __name__ == "__main__":
    main()
