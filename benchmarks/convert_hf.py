#!/usr/bin/env python3
"""Peak memory and speed of tools/convert_hf.py on a checkpoint made from a real configuration.

Makes random bf16 weights in the shape of Qwen2.5-1.5B (3.09 GB, largest tensor 467 MB; `--layers` for less),
written tensor by tensor, then runs import and export as users do, each in a process of its own, and prints a
table: GB/s of the tool's own clock over the bytes of all tensors (reading and writing, to the disk), and the
largest resident memory (VmHWM of /proc, with the interpreter, torch and any mapped file in it). The limit is
the size of the largest tensor plus 1.5 GB. Ends with 1 where a limit is passed or a bit differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# config.json of Qwen/Qwen2.5-1.5B.
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
SPARE_GB = 1.5


def make_checkpoint(directory: Path, layers: int) -> int:
    """Random weights; returns the size of the largest tensor in bytes."""
    import torch

    from siren_megatron.architecture import Architecture
    from siren_megatron.conversion.files import HfWriter

    config = {**CONFIG, "num_hidden_layers": layers}
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    shapes = Architecture.of(config).hf_shapes()
    plan = [(name, torch.bfloat16, shape) for name, shape in shapes.items()]
    generator = torch.Generator().manual_seed(0)
    with HfWriter(directory, plan, 5 * 10**9) as writer:
        for name, _, shape in plan:
            bits = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, generator=generator)
            # Any bits, but no NaN or infinity: clear the exponent's highest bit.
            writer.write(name, bits.bitwise_and_(-16385).view(torch.bfloat16))
        writer.finish()
    return max(2 * torch.Size(shape).numel() for _, _, shape in plan)


def run(label: str, arguments: list[str]) -> tuple[float, float, float]:
    """Run the tool; returns (its GB/s, wall seconds, peak resident GB)."""
    started = time.monotonic()
    report = tempfile.NamedTemporaryFile(suffix=".hwm", delete=False)  # noqa: SIM115 (removed below)
    report.close()
    # VmHWM rather than getrusage: a child inherits ru_maxrss of the process that started it.
    code = (
        "import runpy, sys, pathlib, atexit\n"
        f"atexit.register(lambda: pathlib.Path({report.name!r}).write_text("
        "[l for l in open('/proc/self/status') if l.startswith('VmHWM')][0]))\n"
        f"sys.argv = ['convert_hf.py', *{arguments!r}]\n"
        f"runpy.run_path({str(ROOT / 'tools' / 'convert_hf.py')!r}, run_name='__main__')\n"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    seconds = time.monotonic() - started
    peak = int(Path(report.name).read_text().split()[1]) * 1024 / 1e9
    os.unlink(report.name)
    if process.returncode:
        raise SystemExit(f"{label} failed: {process.stderr}")
    speed = re.search(r"([\d.]+) GB/s", process.stdout)
    return float(speed[1]) if speed else 0.0, seconds, peak


def disk_speed(directory: Path) -> float:
    """GB/s at which 1 GB reaches this disk with a plain write and fsync: what bounds a conversion."""
    block = memoryview(bytes(2**24))
    path = directory / "disk-speed"
    started = time.monotonic()
    with open(path, "wb", buffering=0) as file:
        for _ in range(60):
            file.write(block)
        os.fsync(file.fileno())
    seconds = time.monotonic() - started
    path.unlink()
    return 60 * len(block) / 1e9 / seconds


def digest(directory: Path) -> str:
    """Of all tensors in order, whatever the files are called."""
    from siren_megatron.conversion.files import HfReader

    total = hashlib.sha256()
    for name, array in sorted(HfReader(directory).arrays.items()):
        total.update(f"{name} {array.dtype} {array.shape}".encode())
        with open(array.path, "rb") as file:
            file.seek(array.offset)
            left = array.nbytes
            while left:
                block = file.read(min(left, 2**24))
                total.update(block)
                left -= len(block)
    return total.hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--work", type=Path, help="where to write, 3 x the model (default: a temporary directory)"
    )
    parser.add_argument("--layers", type=int, default=28, help="layers of the model (28: 3.09 GB)")
    parser.add_argument("--tensor-model-parallel-size", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(dir=args.work))
    try:
        largest = make_checkpoint(work / "hf", args.layers)
        size = sum(p.stat().st_size for p in (work / "hf").glob("*.safetensors"))
        limit = largest / 1e9 + SPARE_GB
        expected = digest(work / "hf")
        print(f"checkpoint {size / 1e9:.2f} GB, largest tensor {largest / 1e9:.3f} GB, limit {limit:.2f} GB")
        print(f"{'':28}{'GB/s':>8}{'seconds':>10}{'peak GB':>10}")
        good = True
        for tp in args.tensor_model_parallel_size:
            megatron, back = work / f"megatron-{tp}", work / f"back-{tp}"
            flags = ["--megatron", str(megatron)]
            layout = ["--tensor-model-parallel-size", str(tp), "--pipeline-model-parallel-size", "2"]
            speed = disk_speed(work)
            print(f"{'the disk, plain write':28}{speed:8.2f}   (1 GB and fsync: what bounds a conversion)")
            for label, arguments in (
                ("import", ["import", "--hf", str(work / "hf"), *flags, *layout]),
                ("inspect", ["inspect", *flags]),
                ("export", ["export", "--hf", str(back), *flags]),
                ("verify, parameters", ["verify", "--hf", str(work / "hf"), *flags, "--no-logits"]),
            ):
                speed, seconds, peak = run(label, arguments)
                good = good and peak <= limit
                shown = f"{speed:8.2f}" if speed else f"{'':8}"
                print(f"{f'TP={tp} PP=2, {label}':28}{shown}{seconds:10.1f}{peak:10.2f}", flush=True)
            same = digest(back) == expected
            good = good and same
            print(
                f"TP={tp} PP=2: the exported tensors are {'the same, bit for bit' if same else 'DIFFERENT'}"
            )
            shutil.rmtree(megatron)
            shutil.rmtree(back)
        return 0 if good else 1
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
