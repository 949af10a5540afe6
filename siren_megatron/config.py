"""Every option of pretrain_siren.py: frozen dataclasses with help, unit and check. Standard library only.

A field `rollout_batch_size` is the option `--rollout-batch-size`. Options that Megatron-LM has keep its
spelling. `parse_args` refuses unknown and contradictory options with one line and exit code 2, before
anything heavy is imported.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from siren_megatron.architecture import Architecture, Layout
from siren_megatron.checkpointing import files as checkpoint_files
from siren_megatron.data.options import DataOptions, check_data
from siren_megatron.evaluation.options import EvaluationOptions, check_evaluation
from siren_megatron.method_options import CorrectionOptions, EntropyOptions, GrpoOptions, check_methods
from siren_megatron.options import REQUIRED, flag
from siren_megatron.rollout.options import RolloutOptions, check_rollout, check_servers
from siren_megatron.rollout.transfer.choice import check_sharing
from siren_megatron.run_options import ModelOptions, ParallelOptions, RunOptions, TrainOptions

GROUPS = {
    "model": ModelOptions,
    "parallel": ParallelOptions,
    "train": TrainOptions,
    "grpo": GrpoOptions,
    "entropy": EntropyOptions,
    "correction": CorrectionOptions,
    "rollout": RolloutOptions,
    "data": DataOptions,
    "evaluation": EvaluationOptions,
    "run": RunOptions,
}


@dataclass(frozen=True)
class Config:
    """All options of a run, by group."""

    model: ModelOptions
    parallel: ParallelOptions
    train: TrainOptions
    grpo: GrpoOptions
    entropy: EntropyOptions
    correction: CorrectionOptions
    rollout: RolloutOptions
    data: DataOptions
    evaluation: EvaluationOptions
    run: RunOptions

    @classmethod
    def of(cls, **options: Any) -> Config:
        """A configuration from field names, defaults for the rest; not yet checked.

        Raises:
            ValueError: an unknown option, or a required one is missing.
        """
        groups = {}
        for name, group in GROUPS.items():
            names = [field.name for field in dataclasses.fields(group)]
            try:
                groups[name] = group(**{n: options.pop(n) for n in names if n in options})
            except TypeError as error:
                raise ValueError(str(error).replace(group.__name__ + ".__init__() ", "options: ")) from None
        if options:
            raise ValueError(f"unknown option(s): {', '.join(sorted(options))}")
        return cls(**groups)

    def flat(self) -> dict[str, Any]:
        """Every option by its field name, paths as text: what is logged and kept in checkpoints."""
        values = {}
        for group in GROUPS:
            values.update(dataclasses.asdict(getattr(self, group)))
        return {k: _as_plain(v) for k, v in values.items()}

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one replica's share of a micro-batch together (tensor x pipeline x context)."""
        parallel = self.parallel
        model = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
        return model * parallel.context_parallel_size

    @property
    def logprob_tolerance(self) -> float:
        """Largest mean |log-prob difference| of rollout engine and trainer, in nats."""
        return self.rollout.rollout_logprob_tolerance or (0.5 if self.model.bf16 else 0.01)


def option_defaults() -> dict[str, Any]:
    """Default of every option by its field name, as `Config.flat` writes it; without the required ones."""
    fields = (field for group in GROUPS.values() for field in dataclasses.fields(group))
    return {f.name: _as_plain(f.default) for f in fields if f.default is not REQUIRED}


def _as_plain(value: Any) -> Any:
    """Paths as text; a tuple of one as that one, else as a list."""
    if isinstance(value, tuple):
        return _as_plain(value[0]) if len(value) == 1 else [_as_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)


def build_parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(
        prog="pretrain_siren.py",
        description="GRPO with selective entropy regularisation (SIREN) on megatron-core and vLLM.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    for name, cls in GROUPS.items():
        group = parser.add_argument_group(name)
        for field in dataclasses.fields(cls):
            kind, text = field.metadata["type"], field.metadata["help"]
            if kind is bool:
                group.add_argument(
                    flag(field.name), action=argparse.BooleanOptionalAction, default=field.default, help=text
                )
            else:
                several = {"nargs": "+", "action": "extend"} if field.metadata["several"] else {}
                required = field.default is REQUIRED
                group.add_argument(
                    flag(field.name),
                    type=kind,
                    required=required,
                    choices=field.metadata["choices"],
                    default=None if required else field.default,
                    metavar=None if field.metadata["choices"] else kind.__name__.upper(),
                    help=text + (" (required)" if required else ""),
                    **several,
                )
    return parser


def parse_args(argv: Sequence[str] | None = None) -> Config:
    """The options of a run, checked; prints one line and exits with code 2 where they are wrong."""
    try:
        config = Config.of(**vars(build_parser().parse_args(argv)))
        check(config)
    except ValueError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"pretrain_siren.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    return config


def check(config: Config, world_size: int | None = None) -> None:
    """Refuse options that are wrong alone or together.

    Args:
        world_size: ranks of the job; torchrun's `WORLD_SIZE` when None (not checked where that is unset
            and `--check` is given).

    Raises:
        ValueError: one line that names the option.
    """
    check_plan(config, read_hf_config(config.model.hf_checkpoint), world_size)
    if config.model.transformer_impl == "transformer_engine" and not _is_installed("transformer_engine"):
        raise ValueError(
            "--transformer-impl transformer_engine needs the package transformer-engine and CUDA: "
            "pip install --no-build-isolation 'transformer-engine[core_cu13,pytorch]'"
        )
    check_rollout(config.rollout)
    _check_files(config)


def check_plan(config: Config, hf_config: dict[str, Any], world_size: int | None = None) -> None:
    """What `check` refuses without looking at any file: a plan may be made where the model is not.

    Args:
        hf_config: the model's config.json.
        world_size: as in `check`.

    Raises:
        ValueError: one line that names the option.
    """
    _check_bounds(config)
    check_servers(config.rollout)
    check_sharing(config.rollout)
    steps_ahead = config.rollout.rollout_async_steps
    if steps_ahead and config.correction.rollout_correction == "none":
        raise ValueError(
            f"--rollout-async-steps {steps_ahead} trains on responses of older weights, and needs a "
            "--rollout-correction other than none, such as token-truncate"
        )
    _check_layers(config.model, config.parallel)
    _check_architecture(config, hf_config)
    _check_batches(config, world_size)
    check_methods(
        config.grpo,
        config.entropy,
        config.correction,
        group_size=config.rollout.rollout_num_samples,
        max_response=config.rollout.rollout_max_response_length,
    )


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _check_layers(model: ModelOptions, parallel: ParallelOptions) -> None:
    if model.fp8_format is not None:
        raise ValueError(
            f"--fp8-format {model.fp8_format} is not supported: layers compute in float32, or in bfloat16"
        )
    context = parallel.context_parallel_size
    if model.transformer_impl == "transformer_engine" and context > 1 and not model.bf16:
        raise ValueError(
            f"--transformer-impl transformer_engine with --context-parallel-size {context} needs --bf16: "
            "Transformer Engine has no float32 attention over context ranks"
        )


def _check_bounds(config: Config) -> None:
    for name, cls in GROUPS.items():
        for field in dataclasses.fields(cls):
            value, m = getattr(getattr(config, name), field.name), field.metadata
            for number in value if m["several"] and value is not None else (value,):
                _check_bound(flag(field.name), number, m)


def _check_bound(name: str, value: Any, m: Mapping[str, Any]) -> None:
    if not isinstance(value, int | float):
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    if m["minimum"] is not None and value < m["minimum"]:
        raise ValueError(f"{name} must be at least {m['minimum']}, got {value}")
    if m["above"] is not None and value <= m["above"]:
        raise ValueError(f"{name} must be greater than {m['above']}, got {value}")
    if m["maximum"] is not None and value > m["maximum"]:
        raise ValueError(f"{name} must be at most {m['maximum']}, got {value}")


def _check_batches(config: Config, world_size: int | None) -> None:
    train, rollout, parallel = config.train, config.rollout, config.parallel
    if rollout.rollout_max_response_length >= train.seq_length:
        raise ValueError(
            f"--rollout-max-response-length {rollout.rollout_max_response_length} leaves no room for a "
            f"prompt in --seq-length {train.seq_length}"
        )
    responses = rollout.rollout_batch_size * rollout.rollout_num_samples
    if responses % train.global_batch_size:
        raise ValueError(
            f"--global-batch-size {train.global_batch_size} does not divide the {responses} responses of "
            "--rollout-batch-size x --rollout-num-samples"
        )
    packed = train.max_tokens_per_microbatch
    if packed and packed < train.seq_length:
        raise ValueError(
            f"--max-tokens-per-microbatch {packed} is less than --seq-length {train.seq_length}: a sequence "
            "may not fit"
        )
    if not packed and train.global_batch_size % train.micro_batch_size:
        raise ValueError(
            f"--micro-batch-size {train.micro_batch_size} does not divide "
            f"--global-batch-size {train.global_batch_size}"
        )
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        raise ValueError("--sequence-parallel needs --tensor-model-parallel-size of at least 2")
    if parallel.virtual_stages and parallel.pipeline_model_parallel_size == 1:
        raise ValueError(
            "--num-virtual-stages-per-pipeline-rank needs --pipeline-model-parallel-size of at least 2"
        )
    if parallel.recompute_num_layers > 1 and parallel.recompute_granularity != "full":
        raise ValueError("--recompute-num-layers needs --recompute-granularity full")
    if world_size is None:
        if "WORLD_SIZE" not in os.environ and config.run.check:
            return
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
    _check_ranks(config, world_size)


def _check_ranks(config: Config, world_size: int) -> None:
    train, parallel, size = config.train, config.parallel, config.model_parallel_size
    if world_size % size:
        raise ValueError(
            "--tensor-model-parallel-size x --pipeline-model-parallel-size x --context-parallel-size = "
            f"{size} does not divide the {world_size} rank(s) of the job; start it with torchrun "
            f"--nproc-per-node {size}"
        )
    data_ranks = world_size // size
    experts = parallel.expert_model_parallel_size * parallel.expert_tensor_size
    same_layers = world_size // parallel.pipeline_model_parallel_size
    if same_layers % experts:
        raise ValueError(
            f"--expert-model-parallel-size x --expert-tensor-parallel-size = {experts} does not divide the "
            f"{same_layers} rank(s) that hold the same layers"
        )
    _check_step_entropy(config, data_ranks)
    if train.max_tokens_per_microbatch:
        return
    per_rank = train.micro_batch_size * data_ranks
    if train.global_batch_size % per_rank:
        raise ValueError(
            f"--micro-batch-size {train.micro_batch_size} x {data_ranks} data-parallel rank(s) does "
            f"not divide --global-batch-size {train.global_batch_size}"
        )
    stages = parallel.pipeline_model_parallel_size
    if parallel.virtual_stages and train.global_batch_size // per_rank % stages:
        raise ValueError(
            "--num-virtual-stages-per-pipeline-rank wants a multiple of --pipeline-model-parallel-size "
            f"{stages} micro-batches, got {train.global_batch_size // per_rank}"
        )


def _check_step_entropy(config: Config, data_ranks: int) -> None:
    """Without the log-prob pass, H of the optimizer step is known where one forward pass sees all of it."""
    entropy, train = config.entropy, config.train
    anchored = entropy.entropy_method == "siren" and entropy.siren_anchor
    if not (config.correction.rollout_logprobs_as_old and anchored):
        return
    one_pass = train.micro_batch_size * data_ranks == train.global_batch_size
    if entropy.siren_anchor_estimate == "step" and (train.max_tokens_per_microbatch or not one_pass):
        raise ValueError(
            "--rollout-logprobs-as-old with --siren-anchor-estimate step needs --micro-batch-size x "
            f"{data_ranks} data-parallel rank(s) = --global-batch-size {train.global_batch_size}, or "
            "--siren-anchor-estimate microbatch"
        )


def read_hf_config(directory: Path) -> dict[str, Any]:
    """config.json of a Hugging Face checkpoint.

    Raises:
        ValueError: no such directory or file, or it is not JSON.
    """
    path = directory / "config.json"
    if not directory.is_dir():
        raise ValueError(f"--hf-checkpoint {directory} is not a directory")
    if not path.is_file():
        raise ValueError(f"--hf-checkpoint {directory} holds no config.json")
    if not any(directory.glob("*.safetensors")):
        raise ValueError(f"--hf-checkpoint {directory} holds no *.safetensors file")
    try:
        architecture = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(architecture, dict):
        raise ValueError(f"{path} is not a JSON object")
    return architecture


def _check_architecture(config: Config, hf_config: dict[str, Any]) -> None:
    parallel, seq_length = config.parallel, config.train.seq_length
    try:
        architecture = Architecture.of(hf_config)
        architecture.check_length(seq_length)
    except ValueError as error:
        raise ValueError(f"--hf-checkpoint: {error}") from None
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    Layout(tp, pp, parallel.expert_model_parallel_size).check(architecture)
    chunks = pp * parallel.num_virtual_stages_per_pipeline_rank
    if architecture.layers % chunks:
        raise ValueError(
            f"--pipeline-model-parallel-size x --num-virtual-stages-per-pipeline-rank = {chunks} does not "
            f"divide the model's num_hidden_layers {architecture.layers}"
        )
    if architecture.experts and tp > 1 and not parallel.sequence_parallel:
        raise ValueError("--tensor-model-parallel-size of a model of experts needs --sequence-parallel")
    if parallel.expert_model_parallel_size == 1 and parallel.expert_tensor_size != tp:
        # megatron-core then takes the experts for dense layers, and leaves their gradients unsummed.
        raise ValueError(
            f"--expert-tensor-parallel-size {parallel.expert_tensor_size} other than "
            f"--tensor-model-parallel-size {tp} needs --expert-model-parallel-size of at least 2"
        )
    if seq_length > architecture.max_length:
        raise ValueError(
            f"--seq-length {seq_length} exceeds the model's max_position_embeddings {architecture.max_length}"
        )


def _check_files(config: Config) -> None:
    run, pretrained = config.run, config.model.pretrained_checkpoint
    if run.record_interval and not run.record_prompts:
        raise ValueError(f"--record-interval {run.record_interval} has no meaning with --record-prompts 0")
    if pretrained is not None and not (pretrained / "metadata.json").is_file():
        raise ValueError(f"--pretrained-checkpoint {pretrained} is no Megatron distributed checkpoint")
    check_data(config.data)
    check_evaluation(
        config.evaluation,
        prompt_key=config.data.prompt_key,
        answer_key=config.data.prompt_answer_key,
        seq_length=config.train.seq_length,
    )
    if run.load is not None and run.overwrite:
        raise ValueError("--load and --overwrite contradict each other")
    if run.load is not None and not checkpoint_files.finished(run.load / "checkpoints"):
        raise ValueError(f"--load {run.load} holds no checkpoint")
    if run.save.exists() and not run.save.is_dir():
        raise ValueError(f"--save {run.save} is not a directory")
    resumes_itself = run.load is not None and run.load.resolve() == run.save.resolve()
    if run.save.is_dir() and any(run.save.iterdir()) and not (resumes_itself or run.overwrite):
        raise ValueError(f"--save {run.save} exists already: pass --load {run.save} or --overwrite")
