#!/usr/bin/env python3
"""Convert checkpoints between Hugging Face and Megatron's distributed format, and check the result.

  import   Hugging Face -> Megatron distributed checkpoint, which loads in any layout
  export   Megatron distributed checkpoint (of import, of a run, of Megatron-LM) -> Hugging Face
  verify   compare the two: every parameter, and the logits on random tokens
  inspect  say what a checkpoint of either kind holds, without loading weights

One process, no GPU and no torchrun. Tensors are streamed: memory does not grow with the model. An error is
one line and exit code 2, and leaves no half-written output; `verify` exits with 1 where the two differ.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

SIZE_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(message)


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB (10^9) or 500MiB (2^20).

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B?)", text.strip().upper())
    unit = match and (match[2] + "B" if match[2] in ("K", "M", "G") else match[2].removeprefix("B"))
    if match is None or unit not in SIZE_UNITS or float(match[1]) * SIZE_UNITS[unit] < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write for example 5GB or 500MB")
    return int(float(match[1]) * SIZE_UNITS[unit])


def build_parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(
        prog="convert_hf.py",
        description=__doc__.split("\n\n")[0],
        epilog="tools/convert_hf.py COMMAND --help lists a command's options.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_OneLineParser)

    def command(name: str, help: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help, description=help, allow_abbrev=False)

    def directories(sub: argparse.ArgumentParser, *, required: bool = True) -> None:
        sub.add_argument("--hf", type=Path, required=required, help="Hugging Face checkpoint (a directory)")
        sub.add_argument("--megatron", type=Path, required=required, help="Megatron checkpoint (a directory)")

    def config_from(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--config-from",
            type=Path,
            help="Hugging Face checkpoint with the configuration and tokenizer of the Megatron one; "
            "default: those that import put into it",
        )

    sub = command("import", "Hugging Face -> Megatron distributed checkpoint")
    directories(sub)
    for name, text in (
        ("tensor-model-parallel-size", "ranks that share each layer and the vocabulary"),
        ("pipeline-model-parallel-size", "pipeline stages the layers are cut into"),
        ("expert-model-parallel-size", "ranks that share each layer's experts"),
    ):
        sub.add_argument(f"--{name}", type=int, default=1, help=f"{text}: how the files are cut (default: 1)")
    sub.add_argument("--overwrite", action="store_true", help="replace an existing checkpoint")

    sub = command("export", "Megatron distributed checkpoint -> Hugging Face")
    directories(sub)
    config_from(sub)
    sub.add_argument(
        "--max-shard-size",
        type=parse_size,
        default="5GB",
        metavar="SIZE",
        help="size from which a new safetensors file is begun (default: 5GB)",
    )
    sub.add_argument("--overwrite", action="store_true", help="replace an existing checkpoint")

    sub = command("verify", "compare a Hugging Face and a Megatron checkpoint: parameters and logits")
    directories(sub)
    config_from(sub)
    sub.add_argument("--num-tokens", type=int, default=64, help="random tokens the logits are compared on")
    sub.add_argument("--seed", type=int, default=0, help="seed of the tokens")
    sub.add_argument(
        "--tolerance", type=float, default=1e-3, help="largest difference of logits (default: 1e-3)"
    )
    sub.add_argument("--no-logits", action="store_true", help="compare parameters only: needs no memory")

    sub = command("inspect", "say what a checkpoint holds, without loading weights")
    directories(sub, required=False)
    config_from(sub)
    return parser


def run_import(args: argparse.Namespace) -> int:
    from siren_megatron.architecture import Layout
    from siren_megatron.conversion.convert import plan_import

    layout = Layout(
        args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.expert_model_parallel_size
    )
    return _run_plan(
        "import", plan_import(args.hf, args.megatron, layout, overwrite=args.overwrite), args.megatron
    )


def run_export(args: argparse.Namespace) -> int:
    from siren_megatron.conversion.convert import plan_export

    plan = plan_export(
        args.megatron,
        args.hf,
        config_from=args.config_from,
        max_shard_bytes=args.max_shard_size,
        overwrite=args.overwrite,
    )
    return _run_plan("export", plan, args.hf)


def _run_plan(label: str, plan, target: Path) -> int:
    from siren_megatron.conversion.progress import ByteProgress

    with ByteProgress(label, plan.nbytes) as progress:
        plan.run(progress)
    print(f"{label}: {progress.summary()}: {target}")
    return 0


def run_verify(args: argparse.Namespace) -> int:
    from siren_megatron.conversion.convert import parameter_differences, tensor_bytes
    from siren_megatron.conversion.progress import ByteProgress

    if args.num_tokens < 1:
        raise ValueError(f"--num-tokens must be at least 1, got {args.num_tokens}")
    with ByteProgress("parameters", tensor_bytes(args.hf)) as progress:
        differences = parameter_differences(args.hf, args.megatron, progress, args.config_from)
    changed = [d for d in differences if not d.identical]
    print(
        f"parameters: {len(differences) - len(changed)} of {len(differences)} tensors identical, bit for bit"
    )
    for difference in changed[:10]:
        print(f"  {difference.name}: differs by at most {difference.largest:.3g}")
    if len(changed) > 10:
        print(f"  and {len(changed) - 10} more")
    if args.no_logits:
        return 1 if changed else 0
    from siren_megatron.conversion.verify import logits_difference

    worst, scale = logits_difference(args.hf, args.megatron, num_tokens=args.num_tokens, seed=args.seed)
    print(f"logits: differ by at most {worst:.3g} on {args.num_tokens} tokens (largest logit {scale:.3g})")
    return 1 if changed or not worst <= args.tolerance else 0


def run_inspect(args: argparse.Namespace) -> int:
    from siren_megatron.conversion.convert import describe

    if (args.hf is None) == (args.megatron is None):
        raise ValueError("inspect wants one of --hf and --megatron")
    rows = describe(args.hf or args.megatron, args.config_from).rows
    width = max(len(label) for label, _ in rows)
    for label, text in rows:
        print(f"{label:{width}}  {text}")
    return 0


COMMANDS = {"import": run_import, "export": run_export, "verify": run_verify, "inspect": run_inspect}


def main(argv: list[str] | None = None) -> int:
    try:
        args = build_parser().parse_args(argv)
        return COMMANDS[args.command](args)
    except ValueError as error:
        print(f"convert_hf.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("convert_hf.py: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
