"""Attention: a faster one for bfloat16 on CPUs, and queries, keys and values as one matrix product.

A model stays transformers' own class, with its parameters and their names. What is set here is not saved.
"""

from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.beit.modeling_beit import BeitAttention
from transformers.models.vit.modeling_vit import ViTAttention
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEAttention, eager_attention_forward

CPU_BFLOAT16 = "cpu_bfloat16"  # the name in transformers' `AttentionInterface`
_CHUNK = 2**20  # attention weights per thread: 2 MB, which stay in the cache from one operation to the next


class _ChunkedAttention(torch.autograd.Function):
    """Attention of (M, tokens, channels) queries, keys and values, M being images x heads, some of M at a time.

    Weights have the precision of the queries throughout, and every step overwrites the last. With all M at once, or
    in float32, these are tens of megabytes that go to memory and back at each step.
    """

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
        ctx.scaling, ctx.size = scaling, max(1, _CHUNK * torch.get_num_threads() // (query.shape[1] * key.shape[1]))
        weights, output = (
            query.new_empty(*query.shape[:2], key.shape[1]),
            value.new_empty(*query.shape[:2], value.shape[2]),
        )
        for q, k, v, w, o in _chunks(ctx.size, query, key, value, weights, output):
            torch.baddbmm(w, q, k.mT, beta=0, alpha=scaling, out=w)
            torch.softmax(w, dim=-1, out=w)
            torch.bmm(w, v, out=o)
        ctx.save_for_backward(query, key, value, weights)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, weights = ctx.saved_tensors
        gradients = [torch.empty_like(x) for x in (query, key, value)]
        buffer = torch.empty_like(weights[: ctx.size])
        for q, k, v, w, g, dq, dk, dv in _chunks(ctx.size, query, key, value, weights, gradient, *gradients):
            torch.bmm(w.mT, g, out=dv)
            dw = torch.bmm(g, v.mT, out=buffer[: len(w)])
            torch._softmax_backward_data(dw, w, -1, w.dtype, grad_input=dw)
            torch.baddbmm(dq, dw, k, beta=0, alpha=ctx.scaling, out=dq)
            torch.baddbmm(dk, dw.mT, q, beta=0, alpha=ctx.scaling, out=dk)
        return *gradients, None


def _chunks(size: int, *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


def cpu_bfloat16_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention as `AttentionInterface` asks for it: of (B, heads, tokens, channels) to (B, tokens, heads, channels).

    Of bfloat16 tensors, without mask and dropout, it computes the softmax in bfloat16, too, and returns no weights.
    Others, and those of a graph that is compiled, get transformers' eager attention and its weights.
    """
    plain = attention_mask is None and not dropout and query.dtype is torch.bfloat16
    if not plain or torch.compiler.is_compiling():
        return eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout, **kwargs)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = _ChunkedAttention.apply(*(x.reshape(-1, *x.shape[2:]) for x in (query, key, value)), scaling)
    return output.view(*query.shape[:3], -1).transpose(1, 2), None


AttentionInterface.register(CPU_BFLOAT16, cpu_bfloat16_attention)
AttentionMaskInterface.register(CPU_BFLOAT16, AttentionMaskInterface()["eager"])


def fuse_qkv(model: PreTrainedModel, fused: bool = True) -> None:
    """Compute queries, keys and values of every ViT, ViTMAE and BEiT layer as one matrix product, or as three again.

    The weights are joined in each forward pass, so parameters, their names and gradients stay those of three layers.
    On a GPU the input is read once rather than three times. Outputs differ by rounding.
    """
    for module in model.modules():
        if isinstance(module, ViTAttention | ViTMAEAttention | BeitAttention):
            module.__dict__.pop("forward", None)
            if fused:
                module.forward = MethodType(_fused_forward, module)


def _fused_forward(
    self: nn.Module, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As the `forward` of transformers' attention layers, (B, tokens, hidden size) to the same and the weights."""
    layers = (self.q_proj, self.k_proj, self.v_proj)
    biases = [torch.zeros_like(x.weight[:, 0]) if x.bias is None else x.bias for x in layers]  # a BEiT has two of them
    joint = F.linear(hidden_states, torch.cat([x.weight for x in layers]), torch.cat(biases))
    query, key, value = joint.unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
    attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
    dropout = self.attention_dropout if self.training else 0.0
    output, weights = attention(
        self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
    )
    return self.o_proj(output.flatten(2)), weights
