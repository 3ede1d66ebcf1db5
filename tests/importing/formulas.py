"""What the published models compute, written from their formulas: one row of tokens, one head at a time, plain torch.

Nothing here is shared with the package: this is what it is compared with.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt() * weight


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / (centred.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt() * weight + bias


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """One head: q, k, v [s, d], bias [s, s] (-inf: not seen)."""
    scores = q @ k.T / math.sqrt(q.shape[-1]) + bias
    return torch.softmax(scores, dim=-1) @ v


def causal(s: int) -> Tensor:
    return torch.full((s, s), float("-inf")).triu(1)


# -- Baichuan ----------------------------------------------------------------------------------------------------------


def slopes(n: int) -> list[float]:
    """Of ALiBi, by the published recursion."""

    def power_of_two(m: int) -> list[float]:
        start = 2 ** (-(2 ** -(math.log2(m) - 3)))
        return [start * start**i for i in range(m)]

    if math.log2(n).is_integer():
        return power_of_two(n)
    below = 2 ** math.floor(math.log2(n))
    return power_of_two(below) + slopes(2 * below)[0::2][: n - below]


def half_rotation(x: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
    """Channel i and channel i + n/2 are a pair: x [s, n]."""
    angle = positions[:, None].float() * inv_freq
    one, other = x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]
    return torch.cat([one * angle.cos() - other * angle.sin(), other * angle.cos() + one * angle.sin()], dim=1)


def baichuan(config: dict[str, Any], w: Weights, ids: list[int], *, alibi: bool, norm_head: bool) -> Tensor:
    """Logits [s, vocab]."""
    heads, d, eps = (
        config["num_attention_heads"],
        config["hidden_size"] // config["num_attention_heads"],
        config["rms_norm_eps"],
    )
    s = len(ids)
    inv_freq = 1.0 / (10000 ** (torch.arange(0, d, 2).float() / d))
    x = w["model.embed_tokens.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        h = rms_norm(x, w[at + "input_layernorm.weight"], eps)
        q, k, v = (h @ w[at + "self_attn.W_pack.weight"].T).split(config["hidden_size"], dim=-1)
        out = []
        for n in range(heads):
            qn, kn, vn = (t[:, n * d : (n + 1) * d] for t in (q, k, v))
            if alibi:
                # As published: the slope times the key's own position, the same for every query.
                bias = causal(s) + slopes(heads)[n] * torch.arange(s).float()[None, :]
            else:
                qn, kn = (half_rotation(t, torch.arange(s), inv_freq) for t in (qn, kn))
                bias = causal(s)
            out.append(attend(qn, kn, vn, bias))
        x = x + torch.cat(out, dim=-1) @ w[at + "self_attn.o_proj.weight"].T
        h = rms_norm(x, w[at + "post_attention_layernorm.weight"], eps)
        gate, up = h @ w[at + "mlp.gate_proj.weight"].T, h @ w[at + "mlp.up_proj.weight"].T
        x = x + (silu(gate) * up) @ w[at + "mlp.down_proj.weight"].T
    head = w["lm_head.weight"]
    if norm_head:
        head = head / head.pow(2).sum(dim=1, keepdim=True).sqrt()
    return rms_norm(x, w["model.norm.weight"], eps) @ head.T


# -- ChatGLM2, ChatGLM3, GLM-4 -----------------------------------------------------------------------------------------


def interleaved_rotation(x: Tensor, theta: Tensor, positions: Tensor) -> Tensor:
    """Channels 2i and 2i + 1 of the first half are a pair, and a complex number; the second half stays: x [s, d]."""
    n = x.shape[1] // 2
    turned = torch.view_as_complex(x[:, :n].reshape(len(x), -1, 2).contiguous())
    turned = turned * torch.polar(torch.ones(len(x), n // 2), positions[:, None] * theta)
    return torch.cat([torch.view_as_real(turned).flatten(1), x[:, n:]], dim=1)


def chatglm(config: dict[str, Any], w: Weights, ids: list[int], *, base: float = 1.0, stretch: float = 1.0) -> Tensor:
    """Logits [s, vocab]. base: factor of the rotary base; stretch: what positions are divided by."""
    heads, d, eps, s = config["num_attention_heads"], config["kv_channels"], config["layernorm_epsilon"], len(ids)
    grouped = config["multi_query_attention"]
    kv = config["multi_query_group_num"] if grouped else heads
    n = d // 2
    theta = 1.0 / ((10000 * base) ** (torch.arange(0, n, 2).float() / n))
    positions = torch.arange(s).float() / stretch
    x = w["transformer.embedding.word_embeddings.weight"][ids]
    for i in range(config["num_layers"]):
        at = f"transformer.encoder.layers.{i}."
        h = rms_norm(x, w[at + "input_layernorm.weight"], eps)
        fused = h @ w[at + "self_attention.query_key_value.weight"].T
        if config["add_qkv_bias"]:
            fused = fused + w[at + "self_attention.query_key_value.bias"]
        if grouped:
            q, k, v = fused.split([heads * d, kv * d, kv * d], dim=-1)
            q, k, v = (t.split(d, dim=-1) for t in (q, k, v))
            parts = [(q[j], k[j * kv // heads], v[j * kv // heads]) for j in range(heads)]
        else:
            parts = [tuple(fused[:, j * 3 * d : (j + 1) * 3 * d].split(d, dim=-1)) for j in range(heads)]
        out = []
        for qn, kn, vn in parts:
            # The layer's number divides the queries and multiplies the scores.
            layer = float(i + 1)
            qn, kn = (interleaved_rotation(t, theta, positions) for t in (qn, kn))
            scores = (qn / layer) @ kn.T / math.sqrt(d) * layer
            out.append(torch.softmax(scores + causal(s), dim=-1) @ vn)
        x = x + torch.cat(out, dim=-1) @ w[at + "self_attention.dense.weight"].T
        h = rms_norm(x, w[at + "post_attention_layernorm.weight"], eps)
        gate, up = (h @ w[at + "mlp.dense_h_to_4h.weight"].T).chunk(2, dim=-1)
        x = x + (silu(gate) * up) @ w[at + "mlp.dense_4h_to_h.weight"].T
    x = rms_norm(x, w["transformer.encoder.final_layernorm.weight"], eps)
    return x @ w["transformer.output_layer.weight"].T


# -- ChatGLM-6B --------------------------------------------------------------------------------------------------------


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * x * (1.0 + 0.044715 * x * x)))


def chatglm_6b(config: dict[str, Any], w: Weights, ids: list[int], *, scale_by_layer: bool = True) -> Tensor:
    """Logits [s, vocab] of a prompt with a mask token and BOS. scale_by_layer: as published; it cancels."""
    heads, d, eps, s = config["num_attention_heads"], config["hidden_size"] // config["num_attention_heads"], 1e-5, len(ids)
    context = ids.index(config["bos_token_id"])
    mask_token = config["gmask_token_id"] if config["gmask_token_id"] in ids else config["mask_token_id"]
    place = [*range(context), *[ids.index(mask_token)] * (s - context)]
    block = [0] * context + list(range(1, s - context + 1))
    hidden_from = torch.ones(s, s).triu(1).bool()
    hidden_from[:, :context] = False
    inv_freq = (1.0 / (10000 ** (torch.arange(0, d // 2, 2).float() / (d // 2)))).half().float()
    alpha = math.sqrt(2 * config["num_layers"])

    def matrix(t: Tensor, name: str) -> Tensor:
        return t @ w[name + ".weight"].T + w[name + ".bias"]

    def norm(t: Tensor, name: str) -> Tensor:
        return layer_norm(t, w[name + ".weight"], w[name + ".bias"], eps)

    x = w["transformer.word_embeddings.weight"][ids]
    for i in range(config["num_layers"]):
        at = f"transformer.layers.{i}."
        entered = norm(x, at + "input_layernorm")
        fused = matrix(entered, at + "attention.query_key_value")
        coefficient = float(i + 1) if scale_by_layer else 1.0
        out = []
        for n in range(heads):
            q, k, v = fused[:, n * 3 * d : (n + 1) * 3 * d].split(d, dim=-1)
            q, k = (
                torch.cat(
                    [
                        half_rotation(t[:, : d // 2], torch.tensor(place), inv_freq),
                        half_rotation(t[:, d // 2 :], torch.tensor(block), inv_freq),
                    ],
                    dim=1,
                )
                for t in (q, k)
            )
            scores = q / (math.sqrt(d) * coefficient) @ k.T
            scores = scores.masked_fill(hidden_from, -10000.0) * coefficient
            out.append(torch.softmax(scores, dim=-1) @ v)
        x = entered * alpha + matrix(torch.cat(out, dim=-1), at + "attention.dense")
        between = norm(x, at + "post_attention_layernorm")
        x = between * alpha + matrix(gelu(matrix(between, at + "mlp.dense_h_to_4h")), at + "mlp.dense_4h_to_h")
    return norm(x, "transformer.final_layernorm") @ w["lm_head.weight"].T
