#!/usr/bin/env python3
"""Print the plan of a run: placement, memory of each GPU, tokens and estimated seconds of a step.

  python tools/plan.py --nodes 1 --gpus-per-node 8 --rollout-gpus 4 -- --hf-checkpoint DIR --bf16 \\
      --tensor-model-parallel-size 4 --sequence-parallel --max-tokens-per-microbatch 16384
  python tools/plan.py --model llama-3.1-70b --nodes 4 --gpus-per-node 8 --rollout-gpus 4 -- --bf16 ...
  python tools/plan.py --scale        # 7B to 405B on 8 to 4,096 GPUs
  python tools/plan.py --compare      # the estimate beside published figures

What follows -- are options of pretrain_siren.py. Exit code 0: it fits; 2: refused, saying what to change.
Standard library only: it runs on a login node without torch.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from siren_megatron.config import Config, build_parser, read_hf_config  # noqa: E402
from siren_megatron.planning.hardware import GPUS, find_gpu  # noqa: E402
from siren_megatron.planning.known_models import KNOWN_MODELS  # noqa: E402
from siren_megatron.planning.plan import Cluster, Lengths, make_plan  # noqa: E402
from siren_megatron.planning.published import comparison_text  # noqa: E402
from siren_megatron.planning.scale import scale_text  # noqa: E402
from siren_megatron.planning.time_model import ASSUMPTIONS  # noqa: E402


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="plan.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", metavar="NAME", help=f"without a checkpoint: {', '.join(KNOWN_MODELS)}")
    parser.add_argument("--nodes", type=int, default=1, metavar="N")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="0 = CPUs; default 8")
    parser.add_argument("--ranks-per-node", type=int, default=1, metavar="N", help="on CPUs; default 1")
    parser.add_argument(
        "--rollout-gpus",
        type=int,
        default=0,
        metavar="N",
        help="the last N GPUs of a node with vLLM servers are theirs; default 0: one shares the first rank's",
    )
    parser.add_argument("--gpu", default="h100-80gb", metavar="NAME", help=", ".join(GPUS))
    parser.add_argument("--mean-prompt-length", type=float, metavar="TOKENS")
    parser.add_argument("--mean-response-length", type=float, metavar="TOKENS")
    parser.add_argument(
        "--assume",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help=f"another constant of the estimate: {', '.join(ASSUMPTIONS.lines())}",
    )
    parser.add_argument("--scale", action="store_true", help="a table of models and numbers of GPUs")
    parser.add_argument("--compare", action="store_true", help="the estimate beside published figures")
    parser.add_argument("options", nargs="*", metavar="-- OPTION", help="options of pretrain_siren.py")
    return parser


def _config(args: argparse.Namespace) -> tuple[Config, dict[str, Any]]:
    # Placeholders for what a plan needs not; the user's own values come later and win.
    given = ["--hf-checkpoint", "none", "--prompt-data", "none", "--save", "none", *args.options]
    if args.rollout_gpus:
        first = args.gpus_per_node - args.rollout_gpus
        given += ["--rollout-devices", ",".join(str(i) for i in range(max(0, first), args.gpus_per_node))]
    values = vars(build_parser().parse_args(given))
    values["prompt_data"] = values["prompt_data"][-1]
    config = Config.of(**values)
    if args.model is None:
        return config, read_hf_config(config.model.hf_checkpoint)
    if args.model not in KNOWN_MODELS:
        raise ValueError(f"--model {args.model} is unknown (known: {', '.join(KNOWN_MODELS)})")
    return config, KNOWN_MODELS[args.model]


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns the exit code (2 for a wrong argument or a plan that does not fit)."""
    args = _parser().parse_args(argv)
    try:
        assumptions = ASSUMPTIONS.changed(args.assume)
        if args.compare:
            if args.assume:
                raise ValueError("--assume has no meaning with --compare")
            print(comparison_text())
        elif args.scale:
            print(scale_text(find_gpu(args.gpu), assumptions))
        if args.compare or args.scale:
            print("\nassumed: " + ", ".join(assumptions.lines()))
            return 0
        gpu = find_gpu(args.gpu) if args.gpus_per_node else None
        if args.rollout_gpus < 0:
            raise ValueError(f"--rollout-gpus must be at least 0, got {args.rollout_gpus}")
        cluster = Cluster(args.nodes, args.gpus_per_node, gpu, args.ranks_per_node)
        config, hf_config = _config(args)
        lengths = Lengths(args.mean_prompt_length, args.mean_response_length)
        plan = make_plan(config, hf_config, cluster, lengths, assumptions)
    except ValueError as error:
        print(f"plan.py: error: {error}", file=sys.stderr)
        return 2
    print(plan.text())
    if plan.time is not None:
        print("assumed    " + ", ".join(assumptions.lines()))
    return 2 if plan.refusals else 0


if __name__ == "__main__":
    sys.exit(main())
