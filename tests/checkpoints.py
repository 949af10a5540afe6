"""Small checkpoints in the real Hugging Face format, from real config classes, for tests of any kind."""

from __future__ import annotations

import json
from pathlib import Path

import torch

# Every family in its awkward variants: a head size that is not hidden / heads, tied heads, scaled rotations.
FAMILY_CONFIGS = {
    "qwen2": ("Qwen2Config", {}),
    "qwen2-tied": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "qwen3-tied": ("Qwen3Config", {"head_dim": 32, "tie_word_embeddings": True}),
    "llama2": ("LlamaConfig", {"num_key_value_heads": 8}),
    "llama3": (
        "LlamaConfig",
        {
            "head_dim": 32,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 6.0,
                "low_freq_factor": 1.5,
                "high_freq_factor": 5.0,
                "original_max_position_embeddings": 24,
            },
        },
    ),
    "llama-linear": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.5}},
    ),
    "mistral": ("MistralConfig", {"head_dim": 32, "sliding_window": None}),
    "qwen3-moe": ("Qwen3MoeConfig", {"head_dim": 32, "norm_topk_prob": True}),
    "qwen3-moe-unnormalised": ("Qwen3MoeConfig", {"head_dim": 32, "norm_topk_prob": False}),
}


def make_random_checkpoint(
    directory: Path,
    family: str = "qwen2",
    *,
    seed: int = 0,
    std: float = 0.2,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    **overrides,
) -> Path:
    """A randomly initialised checkpoint with weights large enough that entropies differ by position.

    Args:
        family: a key of `FAMILY_CONFIGS`.
        std: standard deviation of the weights; transformers' own 0.02 gives near-uniform distributions.
        dtype, max_shard_size: how it is stored.
        overrides: fields of the family's configuration.
    """
    import transformers

    class_name, variant = FAMILY_CONFIGS[family]
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
    if class_name == "Qwen3MoeConfig":
        fields |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    config = getattr(transformers, class_name)(**{**fields, **variant, **overrides})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms and biases start as constants: give every parameter something a wrong layout would show.
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    return directory


def write_prompts(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
