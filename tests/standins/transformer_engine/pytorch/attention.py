"""DotProductAttention by a written-out softmax: padded rows (sbhd) and packed ones (thd).

Legend: s = positions, b = rows, t = packed tokens, h = query heads of this rank, g = its key-value heads,
d = size of a head.
"""

import torch


class DotProductAttention(torch.nn.Module):
    def __init__(
        self,
        num_attention_heads,
        kv_channels,
        *,
        num_gqa_groups,
        attention_dropout,
        attn_mask_type,
        sequence_parallel,
        tp_size,
        get_rng_state_tracker,
        tp_group,
        layer_number,
        attention_type,
        softmax_scale,
    ):
        super().__init__()
        assert attention_dropout == 0.0 and attention_type == "self" and attn_mask_type == "causal"
        self.heads, self.groups = num_attention_heads // tp_size, num_gqa_groups // tp_size
        self.scale = softmax_scale or kv_channels**-0.5

    def forward(
        self,
        query,
        key,
        value,
        attention_mask,
        *,
        attn_mask_type,
        qkv_format="sbhd",
        cu_seqlens_q=None,
        cu_seqlens_kv=None,
        cu_seqlens_q_padded=None,
        cu_seqlens_kv_padded=None,
        max_seqlen_q=None,
        max_seqlen_kv=None,
    ):
        """[s, b, h, d] -> [s, b, h·d], or [t, h, d] -> [t, h·d]; key and value have g heads."""
        assert attention_mask is None and query.size(-2) == self.heads and key.size(-2) == self.groups
        if qkv_format == "sbhd":
            assert attn_mask_type == "causal" and cu_seqlens_q is None
            return self._attend(query, key, value).flatten(2)
        assert qkv_format == "thd" and attn_mask_type == "padding_causal"
        assert cu_seqlens_q.dtype == torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_kv)
        assert torch.equal(cu_seqlens_q, cu_seqlens_q_padded) and torch.equal(
            cu_seqlens_kv, cu_seqlens_kv_padded
        )
        lengths = cu_seqlens_q.diff().tolist()
        assert max_seqlen_q == max_seqlen_kv == max(lengths) and sum(lengths) == query.size(0)
        rows = zip(*(x.unsqueeze(1).split(lengths) for x in (query, key, value)), strict=True)
        return torch.cat([self._attend(q, k, v).squeeze(1) for q, k, v in rows]).flatten(1)

    def _attend(self, query, key, value):
        key, value = (x.repeat_interleave(self.heads // self.groups, dim=2) for x in (key, value))
        scores = torch.einsum("sbhd,tbhd->bhst", query, key) * self.scale
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        return torch.einsum("bhst,tbhd->sbhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), value)
