"""What the ranks of `test_families` do: build a family's model in a layout, and return what it computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from siren_megatron.run_options import ParallelOptions

TOKENS = torch.randint(0, 500, (2, 40), generator=torch.Generator().manual_seed(11))
"""[responses, tokens]; longer than the llama3 test's original length, so that scaling shows."""


def build(checkpoint: Path, options: dict[str, Any], *, bf16: bool = False):
    """This rank's stage with megatron-core's groups set up, and its configuration; weights not yet loaded."""
    import json

    from megatron.core import parallel_state, tensor_parallel

    from siren_megatron import platform
    from siren_megatron.model import build_model, transformer_config

    device = platform.install()
    parallel = ParallelOptions(**options)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
    )
    torch.manual_seed(1)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    hf_config = json.loads((checkpoint / "config.json").read_text())
    config = transformer_config(hf_config, parallel, device, bf16=bf16)
    return build_model(hf_config, config)[0], config, hf_config


def logits_of(model, config) -> torch.Tensor | None:
    """Whole logits [responses, tokens, padded vocabulary] of TOKENS, on the last pipeline stage."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.pipeline_parallel import get_forward_backward_func

    model.eval()
    positions = torch.arange(TOKENS.size(1)).expand_as(TOKENS)

    def forward_step(data_iterator, stage):
        output = stage(input_ids=TOKENS, position_ids=positions, attention_mask=None)
        return output, lambda logits, non_loss_data=True: logits

    with torch.no_grad():
        outputs = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter([None]),
            model=model,
            num_microbatches=1,
            seq_length=TOKENS.size(1),
            micro_batch_size=TOKENS.size(0),
            forward_only=True,
            collect_non_loss_data=True,
        )
        if not parallel_state.is_pipeline_last_stage():
            return None
        group = parallel_state.get_tensor_model_parallel_group()
        return tensor_parallel.gather_from_tensor_model_parallel_region(outputs[0].float(), group=group)


def forward_and_gather(rank: int, world_size: int, jobs: list[tuple[Path, dict[str, Any]]]):
    """For `run_ranks`: for each (checkpoint, layout) the last stage's logits and rank 0's weights."""
    from megatron.core import parallel_state

    from siren_megatron.conversion.live import iterate_hf_weights, load_hf_weights

    results = []
    for checkpoint, options in jobs:
        model, config, hf_config = build(checkpoint, options)
        load_hf_weights(model, checkpoint, hf_config)
        logits = logits_of(model, config)
        weights = {name: tensor.clone() for name, tensor in iterate_hf_weights(model, hf_config)}
        results.append((logits, weights))
        parallel_state.destroy_model_parallel()
    return results


def load_megatron(rank: int, world_size: int, jobs: list[tuple[Path, Path, dict[str, Any], bool]]):
    """For `run_ranks`: load (Megatron checkpoint, HF checkpoint, layout, bf16); returns rank 0's weights.

    The weights start as NaN, so that what a load leaves out shows.
    """
    from megatron.core import parallel_state

    from siren_megatron.conversion.live import iterate_hf_weights, load_megatron_weights

    results = []
    for megatron, checkpoint, options, bf16 in jobs:
        model, _, hf_config = build(checkpoint, options, bf16=bf16)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float("nan"))
        load_megatron_weights(model, megatron)
        results.append({name: tensor.clone() for name, tensor in iterate_hf_weights(model, hf_config)})
        parallel_state.destroy_model_parallel()
    return results


def save_megatron(rank: int, world_size: int, jobs: list[tuple[Path, Path, dict[str, Any], bool]]):
    """For `run_ranks`: megatron-core's own save of (HF checkpoint, target, layout, a tensor a layer)."""
    from megatron.core import dist_checkpointing, parallel_state

    from siren_megatron.conversion.live import load_hf_weights

    for checkpoint, target, options, singles in jobs:
        model, _, hf_config = build(checkpoint, options)
        load_hf_weights(model, checkpoint, hf_config)
        if rank == 0:
            target.mkdir()
        torch.distributed.barrier()
        metadata = {
            "singleton_local_shards": singles,
            "non_homogeneous_layers": singles,
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        }
        dist_checkpointing.save({"model": model.sharded_state_dict(metadata=metadata)}, str(target))
        parallel_state.destroy_model_parallel()


def weights_of_trainer(rank: int, world_size: int, checkpoint: Path, megatron: Path):
    """For `run_ranks`: rank 0's weights of a TP=2 run that starts from a Megatron checkpoint."""
    from siren_megatron import platform
    from siren_megatron.config import read_hf_config
    from siren_megatron.policy import initialize_model_parallel
    from siren_megatron.trainer import Trainer
    from tests.distributed.layouts import config_of

    device = platform.install()
    config = config_of(
        checkpoint, tensor_model_parallel_size=2, seq_length=64, pretrained_checkpoint=megatron
    )
    initialize_model_parallel(config)
    trainer = Trainer(config, read_hf_config(checkpoint), device)
    return {name: tensor.clone() for name, tensor in trainer.hf_weights()}
