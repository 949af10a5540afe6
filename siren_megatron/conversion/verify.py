"""Logits of transformers and megatron-core on the same random tokens: the last word on a conversion."""

from __future__ import annotations

import gc
from pathlib import Path

import torch
from torch import Tensor

from siren_megatron import platform
from siren_megatron.conversion.convert import read_config
from siren_megatron.run_options import ParallelOptions


def transformers_logits(directory: Path, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits [rows, tokens, vocabulary] of a Hugging Face checkpoint, in float32.

    Args:
        tokens: [rows, tokens].
        dtype: of parameters and activations.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation="eager", local_files_only=True, trust_remote_code=False
    )
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits.float()


def megatron_logits(config_directory: Path, megatron: Path, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits [rows, tokens, vocabulary] of a Megatron checkpoint, by `dist_checkpointing.load`, in float32.

    Args:
        config_directory: holds config.json.
        tokens: [rows, tokens].
        dtype: float32 or bfloat16.
    """
    device = platform.install()
    from megatron.core import parallel_state, tensor_parallel

    from siren_megatron.conversion.live import load_megatron_weights
    from siren_megatron.model import build_model, transformer_config

    started = not torch.distributed.is_initialized()
    if started:
        platform.init_process_group(device, timeout_s=600)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    try:
        hf_config = read_config(config_directory)
        config = transformer_config(hf_config, ParallelOptions(), device, bf16=dtype == torch.bfloat16)
        model = build_model(hf_config, config)[0].eval()
        load_megatron_weights(model, megatron)
        positions = torch.arange(tokens.size(1)).expand_as(tokens)
        with torch.no_grad():
            logits = model(
                input_ids=tokens.to(device.device),
                position_ids=positions.to(device.device),
                attention_mask=None,
            )
        return logits[..., : hf_config["vocab_size"]].float().cpu()
    finally:
        parallel_state.destroy_model_parallel()
        if started:
            torch.distributed.destroy_process_group()


def logits_difference(
    hf: Path,
    megatron: Path,
    *,
    num_tokens: int = 64,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[float, float]:
    """(largest absolute difference, largest absolute logit) on random tokens, both models in `dtype`.

    Args:
        hf: the Hugging Face checkpoint; its config.json holds for both.
        megatron: the Megatron checkpoint.
        num_tokens: length of the one row.
    """
    generator = torch.Generator().manual_seed(seed)
    vocab = read_config(hf)["vocab_size"]
    tokens = torch.randint(0, vocab, (1, num_tokens), generator=generator)
    expected = transformers_logits(hf, tokens, dtype)
    # One model in memory at a time.
    gc.collect()
    found = megatron_logits(hf, megatron, tokens, dtype)
    return float((found - expected).abs().max()), float(expected.abs().max())
