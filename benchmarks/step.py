"""One GRPO step here, with SIREN on, and in TRL's GRPOTrainer: time by stage, and memory of all processes.

    python -m pip install --no-deps --target BENCH -r requirements/bench-step.txt
    python benchmarks/step.py --trl BENCH --tokens 128 256
    python benchmarks/step.py --trl BENCH --quick          # a smoke run

The same random Qwen2 (51.7M parameters), prompts, response lengths, float32 and optimizer steps on both
sides. The sides live side by side and take turns step by step, so that what else happens on the machine
happens to all: `pretrain_siren.py` itself with SIREN and without (megatron-core, vLLM), TRL with its own
generation, vLLM alone on the same requests, and the training's matrix products alone. Medians over the
rounds; memory is the sum of the proportional set sizes of a side's processes, the largest sample of a round
of its own, as sampling takes time.

Exit code 0 where all goals were measured and hold: at least 3 times TRL's steps in a second and no more
memory, at every length, every stage within twice its bound, SIREN at most 3% over GRPO.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from turns import Side, Turn  # noqa: E402

RATIO_GOAL, BOUND_GOAL, SIREN_GOAL = 3.0, 2.0, 3.0
MODEL = {
    "vocab_size": 32_000,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
PROMPT_TOKENS, NUM_PROMPTS = 16, 64
STAGES = ("rollout", "logprob", "train", "weight_sync")


def make_model(directory: Path, config: dict[str, int]) -> int:
    """A random Qwen2 and a tokenizer of words t0, t1, ... in the Hugging Face format; its parameters."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    last = config["vocab_size"] - 1
    model = Qwen2ForCausalLM(
        Qwen2Config(
            **config,
            tie_word_embeddings=False,
            max_position_embeddings=4096,
            eos_token_id=last,
            pad_token_id=last,
            bos_token_id=None,
        )
    )
    # Logits of a standard deviation of 6: a token's entropy is a nat or two, as of a language model.
    torch.nn.init.normal_(model.lm_head.weight, std=6 / config["hidden_size"] ** 0.5)
    model.save_pretrained(directory)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(last + 1)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token=f"t{last}", pad_token=f"t{last}", padding_side="left"
    )
    tokenizer.save_pretrained(directory)
    return sum(parameter.numel() for parameter in model.parameters())


def make_work(directory: Path, tokens: int, args: argparse.Namespace) -> dict[str, Any]:
    """What all sides do, as work.json."""
    config = {**MODEL, **({"num_hidden_layers": 2, "vocab_size": 4096} if args.quick else {})}
    parameters = make_model(directory / "model", config)
    ids = [
        [(17 * i + 101 * j * j + 7 * i * j) % 4000 for j in range(PROMPT_TOKENS)] for i in range(NUM_PROMPTS)
    ]
    rows = [{"prompt": " ".join(f"t{t}" for t in row), "answer": "0"} for row in ids]
    prompts = directory / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    work = {
        "model": str(directory / "model"),
        "config": config,
        "parameters": parameters,
        "prompts": str(prompts),
        "prompt_ids": ids,
        "prompt_tokens": PROMPT_TOKENS,
        "prompts_per_step": 2,
        "group": 8,
        "tokens": tokens,
        "micro_batch": args.micro_batch_size,
        "threads": args.threads,
        "lr": 1e-6,
        "more": args.ours_options.split(),
    }
    (directory / "work.json").write_text(json.dumps(work))
    return work


def start(name: str, directory: Path, args: argparse.Namespace) -> Side:
    """Start one side; it waits for its first turn."""
    path = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(args.threads)}
    if name == "trl":
        path.insert(0, str(args.trl))
    elif name == "vllm":
        environment |= {"TORCHDYNAMO_DISABLE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        environment |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_HOST_IP": "127.0.0.1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    sides = str(HERE / "step_sides.py")
    command = [sys.executable, sides, name, str(directory / "work.json")]
    if name in ("ours", "grpo") and args.ranks > 1:
        launch = ["-m", "siren_megatron.launch", "--nproc-per-node", str(args.ranks)]
        command[1:1] = launch
    return Side(name, command, directory / name, environment)


def measure(tokens: int, args: argparse.Namespace) -> tuple[dict[str, list[Turn]], dict[str, float]]:
    """Of every side at one response length: its turns, the warm-up left out, and its peak memory in GiB."""
    with tempfile.TemporaryDirectory(prefix="step-") as temporary:
        directory = Path(temporary)
        make_work(directory, tokens, args)
        sides: list[Side] = []
        turns: dict[str, list[Turn]] = {name: [] for name in args.sides}
        try:
            for name in args.sides:
                sides.append(start(name, directory, args))
                print(f"{name} is ready after {sides[-1].start_seconds:.1f} s", flush=True)
            for number in range(args.rounds + 1):
                for side in sides:
                    turn = side.turn()
                    if number:
                        turns[side.name].append(turn)
                    print(f"round {number} {side.name:6} {turn.seconds:7.2f} s", flush=True)
            peaks = {side.name: side.turn(memory=True).peak_bytes / 2**30 for side in sides}
        finally:
            for side in sides:
                side.close()
    return turns, peaks


def median(turns: list[Turn], stage: str | None = None) -> float:
    values = [turn.seconds if stage is None else turn.report.get(stage, 0.0) for turn in turns]
    return statistics.median(values) if values else float("nan")


def report(tokens: int, turns: dict[str, list[Turn]], peaks: dict[str, float]) -> dict[str, float]:
    """Print the table of one length; the numbers that the goals speak of."""
    print(f"\n16 responses of {tokens} tokens, seconds (medians of {min(map(len, turns.values()))} rounds)")
    print(f"{'':12}{'step':>8}" + "".join(f"{stage:>13}" for stage in STAGES) + f"{'peak GiB':>10}")
    for name, rows in turns.items():
        if name in ("vllm", "floor"):
            continue
        cells = "".join(f"{median(rows, stage):13.2f}" for stage in STAGES)
        print(f"{name:12}{median(rows):8.2f}{cells}{peaks[name]:10.2f}")
    bounds = {"rollout": median(turns.get("vllm", []), "rollout")}
    bounds |= {stage: median(turns.get("floor", []), stage) for stage in STAGES[1:]}
    print(f"{'bound':12}{'':8}" + "".join(f"{bounds[stage]:13.2f}" for stage in STAGES))
    over = {stage: median(turns["ours"], stage) / bounds[stage] for stage in STAGES}
    print(f"{'over bound':12}{'':8}" + "".join(f"{over.get(stage, 0):13.2f}" for stage in STAGES))
    numbers = {f"over_{stage}": value for stage, value in over.items()}
    if turns.get("trl"):
        numbers["ratio"] = median(turns["trl"]) / median(turns["ours"])
        numbers["memory"] = peaks["ours"] / peaks["trl"]
        print(f"steps in a second: {numbers['ratio']:.2f} x TRL's; memory: {numbers['memory']:.2f} x TRL's")
    if turns.get("grpo"):
        pairs = [a.seconds / b.seconds - 1 for a, b in zip(turns["ours"], turns["grpo"], strict=True)]
        numbers["siren"] = 100 * statistics.median(pairs)
    return numbers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 256], help="response lengths")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, after one of warm-up")
    parser.add_argument("--trl", type=Path, help="where requirements/bench-step.txt is installed")
    names = ["ours", "grpo", "trl", "vllm", "floor"]
    parser.add_argument("--without", nargs="+", choices=names[1:], default=[], help="sides to leave out")
    parser.add_argument("--micro-batch-size", type=int, default=16, help="responses, of ours and TRL's")
    parser.add_argument("--threads", type=int, default=2, help="of every process that computes")
    parser.add_argument("--ranks", type=int, default=1, help="of our trainer")
    parser.add_argument(
        "--ours-options",
        default="--rollout-logprobs-as-old",
        help="more options of pretrain_siren.py, in one string; TRL makes no log-prob pass either",
    )
    parser.add_argument("--output", type=Path, help="write the numbers here as JSON")
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round, 16 tokens")
    args = parser.parse_args()
    args.sides = [name for name in names if name not in args.without]
    if args.quick:
        args.tokens, args.rounds = [16], 1
    if "trl" in args.sides and (args.trl is None or not (args.trl / "trl").is_dir()):
        parser.error(
            "--trl DIR must hold TRL: pip install --no-deps --target DIR -r requirements/bench-step.txt"
        )
    results = {}
    for tokens in args.tokens:
        turns, peaks = measure(tokens, args)
        results[tokens] = report(tokens, turns, peaks)
        if args.output:
            rows = {
                n: {"peak_gib": peaks[n], "rounds": [[t.seconds, t.report] for t in r]}
                for n, r in turns.items()
            }
            kept = json.loads(args.output.read_text()) if args.output.exists() else {}
            args.output.write_text(json.dumps({**kept, str(tokens): rows}, indent=1) + "\n")
    missed = [
        f"{name} at {tokens} tokens: {value:.2f}"
        for tokens, numbers in results.items()
        for name, value in numbers.items()
        if (name == "ratio" and value < RATIO_GOAL)
        or (name == "memory" and value > 1)
        or (name == "siren" and value > SIREN_GOAL)
        or (name.startswith("over_") and value > BOUND_GOAL)
    ]
    unmeasured = [name for name in ("trl", "grpo", "vllm", "floor") if name not in args.sides]
    if missed:
        print("\nmissed: " + "; ".join(missed))
    else:
        print("\nnot measured without " + ", ".join(unmeasured) if unmeasured else "\nall goals hold")
    least = min(numbers.get("ratio", float("nan")) for numbers in results.values())
    siren = max(numbers.get("siren", float("nan")) for numbers in results.values())
    print(f"step_ratio_to_trl={least:.2f} siren_overhead_percent={siren:.1f}")
    return 1 if missed or unmeasured else 0


if __name__ == "__main__":
    raise SystemExit(main())
