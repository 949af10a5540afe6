"""What a real trainer holds on each rank: for comparison with siren_megatron.planning.memory_model."""

from __future__ import annotations

from pathlib import Path

import torch

from siren_megatron.batch import make_batch
from siren_megatron.config import read_hf_config
from tests.distributed.layouts import Layout, config_of, fixed_samples


def _unique_bytes(tensors) -> int:
    """Bytes of the storages that the tensors live in, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
    return sum(storages.values())


def held_bytes(rank: int, world_size: int, checkpoint: Path, layouts: list[Layout], tokens: int):
    """For `run_ranks`: of each layout the bytes of parameters, gradients, optimizer states and of what a
    forward pass over one micro-batch of 4 x tokens / 4 keeps for its backward pass (pp = 1 only)."""
    from megatron.core import parallel_state

    from siren_megatron import platform
    from siren_megatron.policy import initialize_model_parallel
    from siren_megatron.trainer import Trainer

    device = platform.install()
    found = []
    for layout in layouts:
        config = config_of(checkpoint, **layout.options)
        initialize_model_parallel(config)
        trainer = Trainer(config, read_hf_config(checkpoint), device)
        samples, rewards = fixed_samples()
        batch = make_batch(samples, rewards, torch.ones_like(rewards), multiple=trainer.length_multiple)
        batch = trainer.compute_logprobs(batch)
        trainer.update(batch, 3.0)  # Adam makes its states at the first step
        parameters = [p for chunk in trainer.chunks for p in chunk.parameters()]
        buffers = [b for model in trainer.model for b in (*model.buffers, *model.expert_parallel_buffers)]
        states = [
            value
            for part in getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer])
            for state in part.optimizer.state.values()
            for value in state.values()
            if torch.is_tensor(value) and value.numel() > 1
        ]
        if config.model.bf16:
            parts = getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer])
            states += [p for part in parts for g in part.optimizer.param_groups for p in g["params"]]
        found.append(
            {
                "stage": parallel_state.get_pipeline_model_parallel_rank(),
                "parameters": sum(p.numel() * p.element_size() for p in parameters),
                "gradients": sum(p.main_grad.numel() * p.main_grad.element_size() for p in parameters),
                "gradient_buffers": sum(b.grad_data.numel() * b.grad_data.element_size() for b in buffers),
                "optimizer": sum(t.numel() * t.element_size() for t in states),
                "activations": _saved_bytes(trainer, tokens) if trainer.pp_group.size() == 1 else None,
            }
        )
        parallel_state.destroy_model_parallel()
    return found


def _saved_bytes(trainer, tokens: int) -> int:
    """Bytes that the decoder's layers save in a forward pass of [4, tokens / 4], weights left out."""
    model = trainer.chunks[0]
    inner = getattr(model, "module", model)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    weights |= {
        b.param_data.untyped_storage().data_ptr()
        for m in trainer.model
        for b in m.buffers
        if b.param_data is not None
    }
    saved: list[torch.Tensor] = []
    inside = False

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if inside and tensor.untyped_storage().data_ptr() not in weights:
            saved.append(tensor)
        return tensor

    def enter(*_):
        nonlocal inside
        inside = True

    def leave(*_):
        nonlocal inside
        inside = False

    hooks = [layer.register_forward_pre_hook(enter) for layer in inner.decoder.layers]
    hooks += [layer.register_forward_hook(leave) for layer in inner.decoder.layers]
    ids = torch.arange(tokens).view(4, -1) % 500
    positions = torch.arange(tokens // 4).expand(4, -1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        output = model(input_ids=ids, position_ids=positions, attention_mask=None)
    for hook in hooks:
        hook.remove()
    total = _unique_bytes(saved)
    del output
    return total
