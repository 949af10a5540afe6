"""Linear layers and norms, cut over tensor ranks as Transformer Engine cuts them."""

import torch
from torch.nn.functional import linear, rms_norm


class _Module(torch.nn.Module):
    """What all have: `_extra_state`, empty without FP8, in every state dict."""

    def get_extra_state(self):
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state):
        pass


class RMSNorm(_Module):
    def __init__(self, *, hidden_size, eps, sequence_parallel, zero_centered_gamma, params_dtype, device):
        super().__init__()
        assert not zero_centered_gamma
        self.eps = eps
        self.weight = _parameter(hidden_size, dtype=params_dtype, device=device)
        self.weight.sequence_parallel = sequence_parallel

    def forward(self, x):
        return rms_norm(x, self.weight.shape, self.weight, self.eps)


class LayerNorm(_Module):
    """Never made: no model here has one."""


class Linear(_Module):
    """[s, b, in] -> [s, b, out]; "column" cuts out, "row" in, None neither."""

    def __init__(
        self,
        in_features,
        out_features,
        *,
        sequence_parallel=False,
        fuse_wgrad_accumulation=False,
        tp_group=None,
        tp_size=1,
        get_rng_state_tracker=None,
        rng_tracker_name=None,
        init_method=None,
        bias=True,
        return_bias=False,
        params_dtype=None,
        parallel_mode=None,
        device="cuda",
        ub_name=None,
    ):
        super().__init__()
        assert not fuse_wgrad_accumulation and not return_bias
        self.tp_group, self.tp_size, self.parallel_mode = tp_group, tp_size, parallel_mode
        self.sequence_parallel = tp_size > 1 and sequence_parallel
        self.in_features = in_features // (tp_size if parallel_mode == "row" else 1)
        self.out_features = out_features // (tp_size if parallel_mode == "column" else 1)
        self.use_bias = bias
        self.weight = _parameter(self.out_features, self.in_features, dtype=params_dtype, device=device)
        _mark_cut(self.weight, 1 if parallel_mode == "row" else 0)
        # Without a bias: an empty tensor that is no parameter.
        self.bias = torch.empty(0, dtype=params_dtype, device=device)
        if bias:
            self.bias = _parameter(self.out_features, dtype=params_dtype, device=device)
            if parallel_mode == "column":
                _mark_cut(self.bias, 0)

    def forward(self, x, is_first_microbatch=None):
        return self._multiply(x)

    def _multiply(self, x):
        bias = self.bias if self.use_bias else None
        if self.parallel_mode is None or self.tp_size == 1:
            return linear(x, self.weight, bias)
        from megatron.core import tensor_parallel as mappings

        group = self.tp_group
        if self.parallel_mode == "column":
            if self.sequence_parallel:
                x = mappings.gather_from_sequence_parallel_region(x, group=group)
            else:
                x = mappings.copy_to_tensor_model_parallel_region(x, group=group)
            return linear(x, self.weight, bias)
        assert bias is None
        if self.sequence_parallel:
            return mappings.reduce_scatter_to_sequence_parallel_region(linear(x, self.weight), group=group)
        return mappings.reduce_from_tensor_model_parallel_region(linear(x, self.weight), group=group)


class LayerNormLinear(Linear):
    """RMSNorm, then a Linear: the norm's weight is `layer_norm_weight`."""

    def __init__(
        self,
        in_features,
        out_features,
        *,
        eps,
        normalization,
        return_layernorm_output,
        zero_centered_gamma,
        params_dtype,
        device,
        **options,
    ):
        super().__init__(in_features, out_features, params_dtype=params_dtype, device=device, **options)
        assert normalization == "RMSNorm" and not return_layernorm_output and not zero_centered_gamma
        self.eps = eps
        self.layer_norm_weight = _parameter(in_features, dtype=params_dtype, device=device)
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel

    def forward(self, x, is_first_microbatch=None):
        return self._multiply(rms_norm(x, self.layer_norm_weight.shape, self.layer_norm_weight, self.eps))


class GroupedLinear(_Module):
    """One product an expert of this rank, on its share of the tokens: weights `weight0`, `weight1`, ..."""

    def __init__(
        self,
        num_gemms,
        in_features,
        out_features,
        *,
        sequence_parallel=False,
        fuse_wgrad_accumulation=False,
        tp_group=None,
        tp_size=1,
        get_rng_state_tracker=None,
        rng_tracker_name=None,
        init_method=None,
        bias=True,
        return_bias=False,
        params_dtype=None,
        parallel_mode=None,
        device="cuda",
        ub_name=None,
    ):
        super().__init__()
        # Megatron-core's dispatcher does all communication: it asks for no cut where there is any.
        assert tp_size == 1 and not bias and not fuse_wgrad_accumulation
        self.num_gemms, self.use_bias = num_gemms, bias
        self.fp8 = self.fp8_calibration = False
        self.fp8_meta = {"fp8_checkpoint": False}
        for expert in range(num_gemms):
            weight = _parameter(out_features, in_features, dtype=params_dtype, device=device)
            _mark_cut(weight, 1 if parallel_mode == "row" else 0)
            self.register_parameter(f"weight{expert}", weight)

    def init_fp8_metadata(self, num_gemms=1):
        pass

    def forward(self, x, m_splits, is_first_microbatch=None):
        """[tokens, in] -> [tokens, out], the first m_splits[0] tokens by expert 0, and so on."""
        assert sum(m_splits) == x.size(0)
        parts = x.split(m_splits)
        return torch.cat([linear(part, getattr(self, f"weight{i}")) for i, part in enumerate(parts)])


def _parameter(*shape, dtype, device):
    return torch.nn.Parameter(torch.empty(*shape, dtype=dtype, device=device))


def _mark_cut(tensor, dimension):
    tensor.tensor_model_parallel, tensor.partition_dim, tensor.partition_stride = True, dimension, 1
