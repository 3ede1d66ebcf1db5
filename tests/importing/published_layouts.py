"""Small checkpoints in the exact layouts that were published: names, shapes, dtypes, config keys, shards with an index."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import formulas

VOCAB, LAYERS = 64, 3
BOS, GMASK, MASK, PAD = 60, 61, 62, 3
INDEX = "model.safetensors.index.json"

_BAICHUAN = {
    "architectures": ["BaichuanForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_baichuan.BaichuanConfig",
        "AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM",
    },
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "hidden_act": "silu", "initializer_range": 0.02},
    **{"hidden_size": 48, "intermediate_size": 40, "num_attention_heads": 6, "num_hidden_layers": LAYERS},
    **{"model_type": "baichuan", "rms_norm_eps": 1e-06, "tie_word_embeddings": False, "torch_dtype": "bfloat16"},
    **{"transformers_version": "4.29.2", "use_cache": True, "vocab_size": VOCAB},
}
_CHATGLM = {
    "architectures": ["ChatGLMModel"],
    "auto_map": {
        "AutoConfig": "configuration_chatglm.ChatGLMConfig",
        "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
    },
    **{"add_bias_linear": False, "add_qkv_bias": True, "apply_query_key_layer_scaling": True, "attention_dropout": 0.0},
    **{"apply_residual_connection_post_layernorm": False, "attention_softmax_in_fp32": True, "bias_dropout_fusion": True},
    **{"ffn_hidden_size": 40, "fp32_residual_connection": False, "hidden_dropout": 0.0, "hidden_size": 32, "kv_channels": 8},
    **{"layernorm_epsilon": 1e-05, "model_type": "chatglm", "multi_query_attention": True, "multi_query_group_num": 2},
    **{"num_attention_heads": 4, "num_layers": LAYERS, "original_rope": True, "padded_vocab_size": VOCAB},
    **{"post_layer_norm": True, "rmsnorm": True, "seq_length": 128, "use_cache": True, "torch_dtype": "float16"},
    **{"transformers_version": "4.27.1", "tie_word_embeddings": False, "eos_token_id": 2, "pad_token_id": 0},
}
_CHATGLM_6B = {
    "_name_or_path": "THUDM/chatglm-6b",
    "architectures": ["ChatGLMModel"],
    "auto_map": {
        "AutoConfig": "configuration_chatglm.ChatGLMConfig",
        "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
        "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    },
    **{"bos_token_id": BOS, "eos_token_id": 63, "mask_token_id": MASK, "gmask_token_id": GMASK, "pad_token_id": PAD},
    **{"hidden_size": 32, "inner_hidden_size": 48, "layernorm_epsilon": 1e-05, "max_sequence_length": 128},
    **{"model_type": "chatglm", "num_attention_heads": 4, "num_layers": LAYERS, "position_encoding_2d": True},
    **{"torch_dtype": "float16", "transformers_version": "4.23.1", "use_cache": True, "vocab_size": VOCAB},
}


@dataclass(frozen=True)
class Variant:
    """One published model at a small size: its config, its tensors, its formula, and what it should become."""

    config: dict[str, Any]
    shapes: Callable[[dict[str, Any]], dict[str, tuple[int, ...]]]
    formula: Callable[[dict[str, Any], dict[str, Tensor], list[int]], Tensor]
    dtype: torch.dtype
    becomes: str
    files: dict[str, str] = field(default_factory=dict)

    def weights(self, dtype: torch.dtype | None = None, seed: int = 0) -> dict[str, Tensor]:
        """Random tensors of a size at which every one of them matters."""
        g = torch.Generator().manual_seed(seed)
        out = {}
        for name, shape in self.shapes(self.config).items():
            if name.endswith("inv_freq"):
                n = shape[0]
                value = 10000.0 ** -(torch.arange(n) / n)
            else:
                noise = torch.randn(shape, generator=g)
                centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                value = centre + 0.1 * noise if len(shape) == 1 else noise * 1.5 * shape[-1] ** -0.5
            out[name] = value.to(dtype or self.dtype)
        return out

    def write(self, path: Path, dtype: torch.dtype | None = None, **changes: Any) -> Path:
        """The checkpoint in two shards. changes: settings that differ; None leaves one out."""
        config = {k: v for k, v in {**self.config, **changes}.items() if v is not None}
        return write(path, config, self.weights(dtype), self.files)

    def logits(self, ids: list[int], weights: dict[str, Tensor] | None = None) -> Tensor:
        return self.formula(self.config, weights or self.weights(torch.float32), ids)


def write(path: Path, config: dict[str, Any], weights: dict[str, Tensor], files: dict[str, str] | None = None) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config, indent=2))
    for name, text in (files or {}).items():
        (path / name).write_text(text)
    names = list(weights)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({n: weights[n] for n in part}, path / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: file for file, part in shards.items() for n in part}}
    (path / INDEX).write_text(json.dumps(index))
    return path


def _baichuan(c: dict[str, Any], *, rotary: bool) -> dict[str, tuple[int, ...]]:
    h, f = c["hidden_size"], c["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c["vocab_size"], h)}
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}."
        shapes |= {at + "self_attn.W_pack.weight": (3 * h, h), at + "self_attn.o_proj.weight": (h, h)}
        if rotary:
            shapes[at + "self_attn.rotary_emb.inv_freq"] = (h // c["num_attention_heads"] // 2,)
        shapes |= {at + "mlp.gate_proj.weight": (f, h), at + "mlp.down_proj.weight": (h, f), at + "mlp.up_proj.weight": (f, h)}
        shapes |= {at + "input_layernorm.weight": (h,), at + "post_attention_layernorm.weight": (h,)}
    return shapes | {"model.norm.weight": (h,), "lm_head.weight": (c["vocab_size"], h)}


def _chatglm(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    h, f, d, v = c["hidden_size"], c["ffn_hidden_size"], c["kv_channels"], c["padded_vocab_size"]
    heads = c["num_attention_heads"]
    rows = (heads + 2 * c["multi_query_group_num"]) * d if c["multi_query_attention"] else 3 * heads * d
    shapes: dict[str, tuple[int, ...]] = {"transformer.embedding.word_embeddings.weight": (v, h)}
    shapes["transformer.rotary_pos_emb.inv_freq"] = (d // 4,)
    for i in range(c["num_layers"]):
        at = f"transformer.encoder.layers.{i}."
        shapes |= {at + "input_layernorm.weight": (h,), at + "self_attention.query_key_value.weight": (rows, h)}
        if c["add_qkv_bias"]:
            shapes[at + "self_attention.query_key_value.bias"] = (rows,)
        shapes |= {at + "self_attention.dense.weight": (h, heads * d), at + "post_attention_layernorm.weight": (h,)}
        shapes |= {at + "mlp.dense_h_to_4h.weight": (2 * f, h), at + "mlp.dense_4h_to_h.weight": (h, f)}
    return shapes | {"transformer.encoder.final_layernorm.weight": (h,), "transformer.output_layer.weight": (v, h)}


def _chatglm_6b(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    h, f = c["hidden_size"], c["inner_hidden_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "lm_head.weight": (c["vocab_size"], h),
        "transformer.word_embeddings.weight": (c["vocab_size"], h),
    }
    shapes |= {"transformer.final_layernorm.weight": (h,), "transformer.final_layernorm.bias": (h,)}
    for i in range(c["num_layers"]):
        at = f"transformer.layers.{i}."
        for name, shape in (
            ("attention.query_key_value", (3 * h, h)),
            ("attention.dense", (h, h)),
            ("mlp.dense_h_to_4h", (f, h)),
            ("mlp.dense_4h_to_h", (h, f)),
            ("input_layernorm", (h,)),
            ("post_attention_layernorm", (h,)),
        ):
            shapes |= {f"{at}{name}.weight": shape, f"{at}{name}.bias": shape[:1]}
        shapes[at + "attention.rotary_emb.inv_freq"] = (h // c["num_attention_heads"] // 4,)
    return shapes


_ROTARY, _ALIBI = partial(_baichuan, rotary=True), partial(_baichuan, rotary=False)
_7B = {**_BAICHUAN, "architectures": ["BaiChuanForCausalLM"], "max_position_embeddings": 128}
_13B = {**_BAICHUAN, "_from_model_config": True, "gradient_checkpointing": [False], "model_max_length": 128}
_2 = {"z_loss_weight": 0, "model_max_length": 128}
_SAYS_BASE = {"modeling_chatglm.py": "        base = base * self.rope_ratio\n"}
_SAYS_POSITIONS = {
    "modeling_chatglm.py": "        seq_idx = torch.arange(seq_len, dtype=dtype, device=device) / self.rope_ratio\n"
}
_F16, _BF16 = torch.float16, torch.bfloat16

VARIANTS = {
    "baichuan-7b": Variant(_7B, _ROTARY, partial(formulas.baichuan, alibi=False, norm_head=False), _BF16, "llama"),
    "baichuan2-7b": Variant({**_7B, **_2}, _ROTARY, partial(formulas.baichuan, alibi=False, norm_head=True), _BF16, "llama"),
    "baichuan-13b": Variant(_13B, _ALIBI, partial(formulas.baichuan, alibi=True, norm_head=False), _BF16, "baichuan_alibi"),
    "baichuan2-13b": Variant(
        {**_13B, **_2}, _ALIBI, partial(formulas.baichuan, alibi=True, norm_head=True), _BF16, "baichuan_alibi"
    ),
    "chatglm2-6b": Variant(_CHATGLM, _chatglm, formulas.chatglm, _F16, "glm"),
    "chatglm2-6b-32k": Variant(
        {**_CHATGLM, "rope_ratio": 16}, _chatglm, partial(formulas.chatglm, stretch=16), _F16, "glm", _SAYS_POSITIONS
    ),
    "chatglm3-6b-32k": Variant(
        {**_CHATGLM, "rope_ratio": 50}, _chatglm, partial(formulas.chatglm, base=50), _F16, "glm", _SAYS_BASE
    ),
    "glm-4-9b": Variant(
        {
            **_CHATGLM,
            "rope_ratio": 500,
            "layernorm_epsilon": 1.5625e-07,
            "eos_token_id": [2, 5, 6],
            "torch_dtype": "bfloat16",
            "num_hidden_layers": LAYERS,
            "attn_implementation": "sdpa",
        },
        _chatglm,
        partial(formulas.chatglm, base=500),
        _BF16,
        "glm",
        _SAYS_BASE,
    ),
    "chatglm-multi-head": Variant({**_CHATGLM, "multi_query_attention": False}, _chatglm, formulas.chatglm, _F16, "glm"),
    "chatglm-no-bias": Variant({**_CHATGLM, "add_qkv_bias": False, "kv_channels": 12}, _chatglm, formulas.chatglm, _F16, "glm"),
    "chatglm-6b": Variant(_CHATGLM_6B, _chatglm_6b, formulas.chatglm_6b, _F16, "chatglm_6b"),
}
NATIVE = ("baichuan-13b", "baichuan2-13b", "chatglm-6b")


def prompt(name: str, length: int = 11, seed: int = 0) -> list[int]:
    """Tokens, none of them special; the first ChatGLM's prompt ends with its two marks and the beginning of an answer."""
    ids = torch.randint(7, 60, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [*ids[:-3], GMASK, BOS, ids[-1]] if name == "chatglm-6b" else ids
