"""Tiny random models of every family, with weights of a size at which every part of them matters."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from pared.accounting import account
from pared.budget.trials import ENOUGH
from pared.modeling import blocks, hf_quiet, load
from pared.plan import LayerPlan, Plan
from pared.run import Pruned, prune
from pared.structure import Layout

VOCAB, WINDOW = 64, 6
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SHARED = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "max_position_embeddings": 64, **_TOKENS}
_GQA = {**_SHARED, "intermediate_size": 48, "num_attention_heads": 8, "num_key_value_heads": 4}
_OWN_HEAD_SIZE = {**_GQA, "head_dim": 8}  # heads * head_dim != hidden_size
_ALTERNATING = {
    "num_hidden_layers": 4,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
}
_BY_HEADS = {**_SHARED, "num_attention_heads": 4}

# name -> (config class, settings). Every family that pared supports by name, and the variants of attention.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _GQA),
    "llama-3-kv": ("LlamaConfig", {**_GQA, "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3}),
    "llama-mha": ("LlamaConfig", {**_GQA, "num_key_value_heads": 8}),
    "llama-mqa-tied": ("LlamaConfig", {**_GQA, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama-biases": ("LlamaConfig", {**_GQA, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralConfig", {**_OWN_HEAD_SIZE, "sliding_window": WINDOW}),
    "qwen2": ("Qwen2Config", {**_GQA, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", _OWN_HEAD_SIZE),
    "gemma": ("GemmaConfig", _OWN_HEAD_SIZE),
    "gemma2": ("Gemma2Config", {**_OWN_HEAD_SIZE, **_ALTERNATING}),
    "gemma3_text": ("Gemma3TextConfig", {**_OWN_HEAD_SIZE, **_ALTERNATING}),
    "phi3": ("Phi3Config", _GQA),
    "glm": ("GlmConfig", _OWN_HEAD_SIZE),
    "glm4": ("Glm4Config", _OWN_HEAD_SIZE),
    "olmo2": ("Olmo2Config", _GQA),
    "gpt_neox": ("GPTNeoXConfig", {**_BY_HEADS, "intermediate_size": 48}),
    "gpt2": ("GPT2Config", {**_BY_HEADS, "n_inner": None}),
    "bloom": ("BloomConfig", _BY_HEADS),
    "mixtral": ("MixtralConfig", {**_OWN_HEAD_SIZE, "num_local_experts": 3, "num_experts_per_tok": 2}),
}

_MOE = {**_SHARED, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 40, "num_experts_per_tok": 2}
_HALF_DENSE = {**_MOE, "moe_intermediate_size": 24, "n_routed_experts": 6}  # of 40 channels where there are no experts
_SIGMOID = {**_HALF_DENSE, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "head_dim": 8}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
_GROUPED = {"n_routed_experts": 12, "n_group": 3, "topk_group": 2}

# Mixtures of experts, as FAMILIES: routers of softmax and of sigmoid, with correction biases, groups, shared experts.
EXPERTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral-6": ("MixtralConfig", {**_MOE, "num_local_experts": 6}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {
            **_MOE,
            "num_experts": 6,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 32,
            "decoder_sparse_step": 1,
        },
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**_MOE, "num_local_experts": 6, "moe_intermediate_size": 24, "mlp_only_layers": [1], "norm_topk_prob": True},
    ),
    "olmoe": ("OlmoeConfig", {**_MOE, "num_experts": 6}),
    "deepseek_v2": (
        "DeepseekV2Config",
        {**_HALF_DENSE, **_LATENT, "num_key_value_heads": 4, "n_shared_experts": 2, "first_k_dense_replace": 1, "head_dim": 4},
    ),
    "deepseek_v2-groups": (
        "DeepseekV2Config",
        {
            **_HALF_DENSE,
            **_LATENT,
            **_GROUPED,
            "num_key_value_heads": 4,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
            "topk_method": "group_limited_greedy",
            "head_dim": 4,
        },
    ),
    "deepseek_v3": ("DeepseekV3Config", {**_SIGMOID, **_LATENT, **_GROUPED, "num_key_value_heads": 4, "head_dim": 4}),
    "gpt_oss": (
        "GptOssConfig",
        {
            **_MOE,
            "num_local_experts": 6,
            "head_dim": 8,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "granitemoe": ("GraniteMoeConfig", {**_MOE, "num_local_experts": 6}),
    "phimoe": ("PhimoeConfig", {**_MOE, "num_local_experts": 6}),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        {
            **_SHARED,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 40,
            "moe_intermediate_size": 24,
            "moe_num_experts": 6,
            "moe_k": 2,
            "moe_num_shared_experts": 2,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 2,
        },
    ),
    "glm4_moe": ("Glm4MoeConfig", _SIGMOID),
    "dots1": ("Dots1Config", _SIGMOID),
    "hunyuan_v1_moe": (
        "HunYuanMoEV1Config",
        {**_SHARED, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 40, "num_experts": 6}
        | {"moe_topk": 2, "head_dim": 8},
    ),
    "minimax": (
        "MiniMaxConfig",
        {**_MOE, "num_local_experts": 6, "head_dim": 8, "layer_types": ["full_attention"] * 3},
    ),
    "exaone_moe": ("ExaoneMoeConfig", {**_MOE, "num_experts": 6, "moe_intermediate_size": 24, "num_shared_experts": 1}),
}


def config(family: str, **changes: Any) -> PreTrainedConfig:
    kind, settings = FAMILIES[family] if family in FAMILIES else EXPERTS[family]
    return getattr(transformers, kind)(**{**settings, **changes})


def model(family: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model in fp32 and eval mode."""
    with hf_quiet():
        built = AutoModelForCausalLM.from_config(config(family, **changes), dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in built.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(noise * p.shape[-1] ** -0.5 if p.ndim > 1 else p + 0.1 * noise)
    return built


def heads_unproved() -> PreTrainedModel:
    """A model whose heads lie in four partitions (CodeGen), as no layout that is tried has them."""
    settings = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 8, "rotary_dim": 4, "n_positions": 64}
    return AutoModelForCausalLM.from_config(transformers.CodeGenConfig(**settings)).eval()


def tokens(rows: int = 6, length: int = 16, *, seed: int = 3) -> Tensor:
    """Token ids int64 [rows, length], no special ones among them."""
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(built: PreTrainedModel, ids: Tensor | None = None) -> Tensor:
    """Logits [rows, length, vocab] of tokens that reach beyond the sliding windows."""
    return built(input_ids=tokens(2, 3 * WINDOW) if ids is None else ids, use_cache=False).logits


def save(built: PreTrainedModel, path: Path) -> Path:
    """A checkpoint on disk, as transformers writes it."""
    with hf_quiet():
        built.save_pretrained(path)
    return path


def cut(source: PreTrainedModel | Path, **settings: Any) -> Pruned:
    """Prune by random scores and without compensation, unless the settings say otherwise."""
    return prune(source, **{"calibration": tokens(), "criterion": "random", "compensate": "none", "remove": 0.2, **settings})


def narrow(built: PreTrainedModel, folder: Path, *, shape: str = "uniform") -> Path:
    """A checkpoint with a fifth less, hidden channels among it: the model, whose matrices are changed for this, writes to three
    quarters of its residual stream's directions."""
    size = built.config.hidden_size
    inside = torch.linalg.qr(torch.randn(size, 3 * size // 4, generator=torch.Generator().manual_seed(7))).Q
    with torch.no_grad():
        for name, weight in built.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.copy_(inside @ (inside.T @ weight))
            elif "embed_tokens" in name:
                weight.copy_(weight @ inside @ inside.T)
    out = folder / "narrow"
    settings = {"shape": shape, "remove": 0.2, "calibration": tokens(ENOUGH, 12), "reconstruct": 0, "search_steps": 1}
    done = prune(save(built, folder / "dense"), out=out, **settings)
    assert done.plan.rotated and load(out).config.hidden_size < size
    return out


def close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> bool:
    """Equal to within the tolerance, relative to the largest entry."""
    return got.shape == want.shape and bool((got - want).abs().max() <= tolerance * want.abs().max().clamp(min=1e-30))


def equal_states(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def numel(shape: Iterable[int]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total


@torch.no_grad()
def hidden_states(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, ...]:
    """What enters each block, and what leaves the last one."""
    seen: list[Tensor] = []
    handles = [b.register_forward_pre_hook(lambda m, args: seen.append(args[0])) for b in blocks(model)[1]]
    handles.append(blocks(model)[1][-1].register_forward_hook(lambda m, args, out: seen.append(out)))
    model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return tuple(seen)


def skipping(layout: Layout, skips: list[Any], sources: list[int] | None = None) -> Plan:
    """A plan whose layers, or those of `sources`, do without the sublayers in `skips`."""
    layers = [LayerPlan(source=i, skip=skips[i]) for i in sources or range(layout.num_layers)]
    now = account(layout)
    return Plan(model_type=layout.model_type, shape="per-layer", before=now, after=now, layers=layers)
