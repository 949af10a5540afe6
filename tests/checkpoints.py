"""Small checkpoints in the real Hugging Face format, from real config classes, for tests of any kind."""

from __future__ import annotations

import json
from pathlib import Path

import torch


def make_random_checkpoint(directory: Path, *, seed: int = 0, std: float = 0.2, **overrides) -> Path:
    """A randomly initialised Qwen2 checkpoint with weights large enough that entropies differ by position.

    Args:
        std: standard deviation of the weights; transformers' own 0.02 gives near-uniform distributions.
        overrides: fields of `transformers.Qwen2Config`.
    """
    from transformers import AutoModelForCausalLM, Qwen2Config

    fields = {
        "vocab_size": 500,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "initializer_range": std,
    }
    config = Qwen2Config(**{**fields, **overrides})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms and biases start as constants: give every parameter something a wrong layout would show.
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory)
    return directory


def write_prompts(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
