"""config.json of a few well-known models, for plans made without a checkpoint at hand.

Only what decides sizes is given; a test holds the parameter counts to transformers'. Standard library only.
"""

from __future__ import annotations

from typing import Any


def _config(name: str, **fields: Any) -> dict[str, Any]:
    return {"architectures": [name], "rms_norm_eps": 1e-6, "tie_word_embeddings": False, **fields}


def _dense(
    name: str, vocab: int, layers: int, hidden: int, ffn: int, heads: int, length: int, **more: Any
) -> dict[str, Any]:
    return _config(
        name,
        vocab_size=vocab,
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_attention_heads=heads,
        max_position_embeddings=length,
        **{"num_key_value_heads": 8, **more},
    )


_QWEN2, _QWEN3, _LLAMA = "Qwen2ForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM"
_EXPERTS = {"num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "head_dim": 128}

# fmt: off
KNOWN_MODELS: dict[str, dict[str, Any]] = {
    "qwen2.5-math-1.5b": _dense(_QWEN2, 151936, 28, 1536, 8960, 12, 4096, num_key_value_heads=2,
                                tie_word_embeddings=True),
    "qwen2.5-math-7b": _dense(_QWEN2, 152064, 28, 3584, 18944, 28, 4096, num_key_value_heads=4),
    "qwen2.5-7b": _dense(_QWEN2, 152064, 28, 3584, 18944, 28, 131072, num_key_value_heads=4),
    "qwen2.5-14b": _dense(_QWEN2, 152064, 48, 5120, 13824, 40, 131072),
    "qwen2.5-32b": _dense(_QWEN2, 152064, 64, 5120, 27648, 40, 131072),
    "qwen2.5-72b": _dense(_QWEN2, 152064, 80, 8192, 29568, 64, 131072),
    "qwen3-32b": _dense(_QWEN3, 151936, 64, 5120, 25600, 64, 40960, head_dim=128),
    "qwen3-30b-a3b": _dense("Qwen3MoeForCausalLM", 151936, 48, 2048, 6144, 32, 40960, num_key_value_heads=4,
                            moe_intermediate_size=768, **_EXPERTS),
    "qwen3-235b-a22b": _dense("Qwen3MoeForCausalLM", 151936, 94, 4096, 12288, 64, 40960,
                              num_key_value_heads=4, moe_intermediate_size=1536, **_EXPERTS),
    "llama-3.1-8b": _dense(_LLAMA, 128256, 32, 4096, 14336, 32, 131072),
    "llama-3.1-70b": _dense(_LLAMA, 128256, 80, 8192, 28672, 64, 131072),
    "llama-3.1-405b": _dense(_LLAMA, 128256, 126, 16384, 53248, 128, 131072),
}
# fmt: on
