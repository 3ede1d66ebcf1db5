"""The graph that llama.cpp computes for its architectures `llama` and `deci`, in torch, over the tensors of a GGUF file.

What is written as one of the two is proved against it first: a model whose logits differ is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """Of one block: query heads, KV heads (both 0 without attention), FFN channels (0 without an FFN)."""

    heads: int
    kv_heads: int
    ffn: int


def interleave(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of a query or key projection [heads * head_dim, ...] from halves side by side to pairs side by side.

    transformers rotates entry i of a head with entry i + head_dim / 2, `llama` and `deci` entry 2i with entry 2i + 1.
    """
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).reshape(rows.shape)


def logits(
    tensors: Mapping[str, Tensor], blocks: list[Sizes], head_dim: int, eps: float, inv_freq: Tensor, ids: Tensor
) -> Tensor:
    """ids [b, s] -> logits [b, s, vocab]. tensors: by their names in the file; inv_freq: [head_dim / 2]."""
    angle = torch.arange(ids.shape[1])[:, None] * inv_freq[None]
    turn = torch.polar(torch.ones_like(angle), angle)  # [s, head_dim / 2]
    x = tensors["token_embd.weight"][ids]
    for i, sizes in enumerate(blocks):
        own = {n.removeprefix(f"blk.{i}."): t for n, t in tensors.items() if n.startswith(f"blk.{i}.")}
        if sizes.heads:
            x = x + _attention(own, sizes, head_dim, turn, _norm(x, own["attn_norm.weight"], eps))
        if sizes.ffn:
            h = _norm(x, own["ffn_norm.weight"], eps)
            x = x + _linear(own, "ffn_down", F.silu(_linear(own, "ffn_gate", h)) * _linear(own, "ffn_up", h))
    head = tensors.get("output.weight", tensors["token_embd.weight"])
    return _norm(x, tensors["output_norm.weight"], eps) @ head.T


def _attention(own: Mapping[str, Tensor], sizes: Sizes, head_dim: int, turn: Tensor, h: Tensor) -> Tensor:
    def heads(name: str, count: int) -> Tensor:
        return _linear(own, name, h).unflatten(-1, (count, head_dim)).transpose(1, 2)  # [b, heads, s, head_dim]

    q = _rotate(heads("attn_q", sizes.heads), turn)
    k = _rotate(heads("attn_k", sizes.kv_heads), turn)
    y = F.scaled_dot_product_attention(q, k, heads("attn_v", sizes.kv_heads), is_causal=True, enable_gqa=True)
    return _linear(own, "attn_output", y.transpose(1, 2).flatten(2))


def _rotate(x: Tensor, turn: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


def _linear(own: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, own[f"{name}.weight"], own.get(f"{name}.bias"))


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)
