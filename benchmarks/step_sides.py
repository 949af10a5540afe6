"""The sides of benchmarks/step.py, one process each; started by it, never by hand.

    python benchmarks/step_sides.py SIDE WORK.json DIRECTORY

- ours, grpo: pretrain_siren.py itself, with SIREN and without; it waits for its turn between two steps.
- trl: TRL's GRPOTrainer with its own generation.
- vllm: vLLM alone on the same requests.
- floor: the training's matrix products at torch's speed, and one copy of the weights' bytes.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from turns import Turns  # noqa: E402


def options(work: dict[str, Any], side: str, save: Path) -> list[str]:
    """The command line of our side."""
    named = {
        "hf-checkpoint": work["model"],
        "prompt-data": work["prompts"],
        "prompt-template": "{prompt}",
        "reward-function": f"{HERE / 'step_reward.py'}:grade",
        "save": save,
        "num-steps": 10_000,
        "rollout-batch-size": work["prompts_per_step"],
        "rollout-num-samples": work["group"],
        "rollout-max-response-length": work["tokens"],
        "rollout-cpu-threads": work["threads"],
        "global-batch-size": work["prompts_per_step"] * work["group"],
        "micro-batch-size": work["micro_batch"],
        "seq-length": work["prompt_tokens"] + work["tokens"],
        "lr": work["lr"],
        "entropy-method": "none" if side == "grpo" else "siren",
        "record-prompts": 0,
    }
    return [part for name, value in named.items() for part in (f"--{name}", str(value))] + work["more"]


def ours(work: dict[str, Any], side: str, directory: Path) -> None:
    from siren_megatron import platform

    platform.install()
    from siren_megatron import job
    from siren_megatron.rollout.service import RolloutService

    save, generate = directory / "run", RolloutService.generate

    class WaitingJob(job.Job):
        turns = None

        def goes_on(self) -> bool:
            if self.is_main:
                self.turns = self.turns or Turns(directory)
                self.turns.wait(last_times(save / "metrics.jsonl"))
            return super().goes_on()

    def generate_to_the_end(self, *args, stop_token_ids, **kwargs):
        return generate(self, *args, stop_token_ids=[], **kwargs)

    job.Job, RolloutService.generate = WaitingJob, generate_to_the_end
    sys.argv = ["pretrain_siren.py", *options(work, side, save)]
    import pretrain_siren

    pretrain_siren.main()


def last_times(path: Path) -> dict[str, float]:
    """Seconds by stage of the last step in metrics.jsonl."""
    lines = path.read_text().splitlines()
    row = json.loads(lines[-1]) if lines else {}
    kept = ("time/", "response_length", "rollout_logprob_diff")
    return {name.removeprefix("time/"): value for name, value in row.items() if name.startswith(kept)}


def trl(work: dict[str, Any], side: str, directory: Path) -> None:
    import torch
    from datasets import Dataset
    from step_reward import grade
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(work["threads"])
    rows = [json.loads(line) for line in Path(work["prompts"]).read_text().splitlines()]
    turns, times = Turns(directory), dict[str, float]()

    class WaitingCallback(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            turns.wait(dict(times))
            times.clear()

    class TimedTrainer(GRPOTrainer):
        def _generate_single_turn(self, *args, **kwargs):
            started = time.perf_counter()
            try:
                return super()._generate_single_turn(*args, **kwargs)
            finally:
                times["rollout"] = time.perf_counter() - started

    size = work["prompts_per_step"] * work["group"]
    trainer = TimedTrainer(
        model=AutoModelForCausalLM.from_pretrained(work["model"], dtype=torch.float32),
        # AutoTokenizer would take it for Qwen2's own, and cut the words up.
        processing_class=PreTrainedTokenizerFast.from_pretrained(work["model"]),
        reward_funcs=lambda completions, **_: [grade(c, "") for c in completions],
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in rows]),
        callbacks=[WaitingCallback()],
        args=GRPOConfig(
            output_dir=str(directory / "run"),
            use_cpu=True,
            bf16=False,
            loss_type="dr_grpo",
            scale_rewards="none",
            beta=0.0,
            learning_rate=work["lr"],
            lr_scheduler_type="constant",
            weight_decay=0.1,
            num_generations=work["group"],
            per_device_train_batch_size=work["micro_batch"],
            gradient_accumulation_steps=size // work["micro_batch"],
            max_completion_length=work["tokens"],
            temperature=1.0,
            top_k=0,
            generation_kwargs={"min_new_tokens": work["tokens"]},
            # On by default; off is faster, and these models fit.
            gradient_checkpointing=False,
            max_steps=10_000,
            report_to=[],
            save_strategy="no",
            logging_steps=10_000,
            disable_tqdm=True,
        ),
    )
    trainer.train()


def vllm(work: dict[str, Any], side: str, directory: Path) -> None:
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=work["model"],
        dtype="float32",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=work["prompt_tokens"] + work["tokens"],
        kv_cache_memory_bytes=256 * 2**20,
        logprobs_mode="processed_logprobs",
        generation_config="vllm",
        disable_log_stats=True,
    )
    sampling = SamplingParams(
        n=work["group"], max_tokens=work["tokens"], temperature=1.0, logprobs=0, ignore_eos=True
    )
    sampling.detokenize = False
    prompts = [{"prompt_token_ids": ids} for ids in work["prompt_ids"][: work["prompts_per_step"]]]
    turns, report = Turns(directory), {}
    while True:
        turns.wait(report)
        engine.reset_prefix_cache()
        started = time.perf_counter()
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
        tokens = sum(len(sample.token_ids) for output in outputs for sample in output.outputs)
        report = {"rollout": time.perf_counter() - started, "tokens": tokens}


def floor(work: dict[str, Any], side: str, directory: Path) -> None:
    import torch
    from step_products import Products

    torch.set_num_threads(work["threads"])
    products = Products.of(work)
    weights = torch.zeros(work["parameters"])
    copy = torch.empty_like(weights)
    turns, report = Turns(directory), {}
    while True:
        turns.wait(report)
        started = time.perf_counter()
        copy.copy_(weights)
        copied = time.perf_counter() - started
        report = {"logprob": products.forward(), "train": products.both(), "weight_sync": copied}


def main() -> None:
    side, work, directory = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
    run = {"ours": ours, "grpo": ours, "trl": trl, "vllm": vllm, "floor": floor}[side]
    run(work, side, directory)


if __name__ == "__main__":
    main()
