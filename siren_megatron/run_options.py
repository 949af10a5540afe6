"""Options of the model, its layout over ranks, the training and the run. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from siren_megatron.options import REQUIRED, option


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    hf_checkpoint: Path = option(REQUIRED, "Hugging Face checkpoint to start from (a directory)", type=Path)
    pretrained_checkpoint: Path | None = option(
        None,
        "Megatron checkpoint whose weights to start from (of tools/convert_hf.py import, or of another run), "
        "in place of --hf-checkpoint's",
        type=Path,
    )
    bf16: bool = option(False, "parameters and activations in bfloat16 (default: float32)")
    transformer_impl: str = option(
        "local",
        "layers: megatron-core's own with this program's norm and attention (local), or Transformer Engine's",
        choices=("local", "transformer_engine"),
    )
    fp8_format: str | None = option(
        None, "format of FP8 matrix products: not supported, always refused", choices=("e4m3", "hybrid")
    )


@dataclass(frozen=True, kw_only=True)
class ParallelOptions:
    tensor_model_parallel_size: int = option(1, "ranks that share each layer and the vocabulary", minimum=1)
    pipeline_model_parallel_size: int = option(1, "pipeline stages the layers are cut into", minimum=1)
    num_virtual_stages_per_pipeline_rank: int = option(
        1, "chunks of each pipeline rank, computed interleaved; 1 = plain pipeline", minimum=1
    )
    context_parallel_size: int = option(1, "ranks that share each sequence", minimum=1)
    expert_model_parallel_size: int = option(1, "ranks that share each layer's experts", minimum=1)
    expert_tensor_parallel_size: int = option(
        0, "ranks that share each expert; 0 = as many as --tensor-model-parallel-size", minimum=0
    )
    sequence_parallel: bool = option(False, "shard activations between layers over the tensor ranks")
    use_distributed_optimizer: bool = option(True, "shard optimizer states over the data-parallel ranks")
    recompute_granularity: str = option(
        "none",
        "activations computed again in the backward pass: none, of attention, or of whole layers",
        choices=("none", "selective", "full"),
    )
    recompute_num_layers: int = option(1, "layers of one unit of full recomputation", minimum=1)
    distributed_timeout_minutes: float = option(10.0, "a collective waits this many minutes", above=0)

    @property
    def expert_tensor_size(self) -> int:
        """Ranks that share each expert."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    @property
    def virtual_stages(self) -> int | None:
        """Chunks of a pipeline rank, None for the plain schedule (megatron-core's convention)."""
        chunks = self.num_virtual_stages_per_pipeline_rank
        return chunks if chunks > 1 else None


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    num_steps: int = option(60, "rollout steps to train, in all (a resumed run counts from 0)", minimum=1)
    micro_batch_size: int = option(8, "responses of one forward pass on one rank", minimum=1)
    max_tokens_per_microbatch: int = option(
        0,
        "pack sequences without padding into micro-batches of at most this many tokens; "
        "0 = padded micro-batches of --micro-batch-size",
        minimum=0,
    )
    fused_linear: str = option(
        "auto",
        "compute logits a chunk at a time, and once more in the backward pass, so that they are never whole; "
        "auto = where a micro-batch's would take over a quarter of the bytes that the rank holds in weights, "
        "gradients and optimizer",
        choices=("auto", "on", "off"),
    )
    global_batch_size: int = option(64, "responses of one optimizer step, over all ranks", minimum=1)
    seq_length: int = option(4096, "most tokens of prompt + response", minimum=2)
    lr: float = option(1e-6, "peak learning rate of AdamW", above=0)
    lr_warmup_steps: int = option(5, "optimizer steps of linear warm-up from 0; 0 = none", minimum=0)
    weight_decay: float = option(0.1, "decoupled weight decay of AdamW", minimum=0)
    adam_beta1: float = option(0.9, "AdamW's beta 1", minimum=0, maximum=1)
    adam_beta2: float = option(0.999, "AdamW's beta 2", minimum=0, maximum=1)
    adam_eps: float = option(1e-8, "AdamW's epsilon", above=0)
    clip_grad: float = option(1.0, "largest global gradient norm; 0 = no clipping", minimum=0)
    max_consecutive_skips: int = option(
        3,
        "updates in a row with a non-finite loss or gradient, all of them skipped, after which the run stops",
        minimum=1,
    )
    seed: int = option(1234, "seed of prompts, sampling and initialisation", minimum=0)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    save: Path = option(REQUIRED, "directory of the run: metrics, checkpoints, report, export", type=Path)
    load: Path | None = option(None, "directory of a run to resume from its newest checkpoint", type=Path)
    overwrite: bool = option(False, "replace an existing --save directory")
    save_interval: int = option(0, "steps between checkpoints; 0 = only at the end", minimum=0)
    save_total_limit: int = option(
        0, "finished checkpoints to keep, the oldest are deleted; 0 = all", minimum=0
    )
    async_save: bool = option(False, "write checkpoints in the background, while the training goes on")
    log_interval: int = option(1, "steps between printed lines where there is no progress bar", minimum=1)
    record_interval: int = option(
        0,
        "steps between records of a few responses token by token (tokens.jsonl, for the report); the first "
        "and the last step have one as well; 0 = a tenth of the run",
        minimum=0,
    )
    record_prompts: int = option(
        4, "prompts of such a record, up to four responses each; 0 = no records", minimum=0
    )
    profile: tuple[int, ...] | None = option(
        None,
        "steps to profile: <save>/profile gets a torch profiler trace of every rank, the report a timeline",
        type=int,
        minimum=1,
        several=True,
    )
    tensorboard_dir: Path | None = option(None, "write TensorBoard events here", type=Path)
    wandb_project: str | None = option(None, "log to this Weights & Biases project (WANDB_MODE holds)")
    check: bool = option(False, "check the options and end: nothing is loaded or written")
