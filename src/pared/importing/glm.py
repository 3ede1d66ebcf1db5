"""ChatGLM2, ChatGLM3 and GLM-4 as they were published (model type "chatglm"): they become transformers' own `glm`.

Both rotate interleaved pairs of the first half of every head and split gate from up in one matrix; names and the layout
of the fused queries, keys and values differ.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from pared.checkpoint import Checkpoint
from pared.errors import ModelError
from pared.importing.published import Conversion, Move, Settings, modelling_code

NAMES = "ChatGLM2-6B, ChatGLM3-6B, GLM-4-9B"
_STRANGE = "the class of transformers that has this formula, GLM, can not say so"
# The code divides queries by the layer's number and multiplies the scores with it again; the others change the rounding.
_NUMERICS = ("apply_query_key_layer_scaling", "attention_softmax_in_fp32", "bias_dropout_fusion", "hidden_dropout")


def recognises(config: dict[str, Any]) -> bool:
    return config.get("model_type") == "chatglm" and "ffn_hidden_size" in config


def convert(checkpoint: Checkpoint) -> Conversion:
    """What becomes of each tensor. ModelError for settings that `glm` can not express."""
    settings = Settings(checkpoint)
    hidden, ffn = settings.size("hidden_size"), settings.size("ffn_hidden_size")
    layers, heads = settings.size("num_layers", "num_hidden_layers"), settings.size("num_attention_heads")
    vocab = settings.size("padded_vocab_size", "vocab_size")
    d = settings.size("kv_channels", default=hidden // heads)
    grouped = settings.flag("multi_query_attention", default=False)
    groups = settings.size("multi_query_group_num", default=1)
    kv = groups if grouped else heads
    if heads % kv or d % 4:
        raise ModelError(f"{heads} heads of {d} channels in {kv} groups make no GLM", where=checkpoint.path / "config.json")
    settings.only("rmsnorm", True, why=f"LayerNorm is asked for, and {_STRANGE}")
    settings.only(
        "apply_residual_connection_post_layernorm", False, why=f"the residual is taken after the norm, and {_STRANGE}"
    )
    settings.only("post_layer_norm", True, why=f"the final norm is left out, and {_STRANGE}")
    settings.only("add_bias_linear", False, why=f"all matrices have a bias, and {_STRANGE}")
    settings.only("fp32_residual_connection", False, why=f"the residual is kept in fp32, and {_STRANGE}")
    settings.only("original_rope", True, why=f"the rotation is another one, and {_STRANGE}")
    settings.only("interleaved_qkv", False, why=f"queries, keys and values are interleaved, and {_STRANGE}")
    settings.only("pre_seq_len", None, why=f"a trained prefix stands before every text, and {_STRANGE}")
    settings.only("quantization_bit", 0, None, why="the weights are quantised; import the unquantised checkpoint")
    bias = settings.flag("add_qkv_bias", default=False)
    tied = settings.flag("tie_word_embeddings", default=False)
    tokens = settings.tokens("bos_token_id", "eos_token_id", "pad_token_id")
    if tokens["eos_token_id"] is None:
        raise ModelError(
            "the config names no eos_token_id",
            where=checkpoint.path / "config.json",
            fix="put it there: without one GLM takes its own, which is none of this vocabulary",
        )
    config = {
        "model_type": "glm",
        "architectures": ["GlmForCausalLM"],
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": d,
        "hidden_act": "silu",
        "attention_bias": bias,
        "attention_dropout": settings.optional("attention_dropout", 0.0),
        "max_position_embeddings": settings.size("seq_length", default=2048),
        "rms_norm_eps": settings.number("layernorm_epsilon", default=1e-5),
        "rope_parameters": _rope(checkpoint, settings.number("rope_ratio", default=1.0)),
        "tie_word_embeddings": tied,
        **tokens,
    }
    settings.ignore(*_NUMERICS, "prefix_projection", "vocab_size", "num_hidden_layers")
    settings.finish()
    return Conversion(
        family="ChatGLM2, ChatGLM3 or GLM-4",
        config=config,
        moves=tuple(_moves(config, grouped, absent=tied and "transformer.output_layer.weight" not in checkpoint.tensors)),
        derived=r"transformer\.rotary_pos_emb\.inv_freq",
    )


def _rope(checkpoint: Checkpoint, ratio: float) -> dict[str, Any]:
    """rope_ratio multiplies the base (ChatGLM3, GLM-4) or divides positions (ChatGLM2-32k): only the code says which."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    if ratio == 1.0:
        return rope
    code = modelling_code(checkpoint)
    if re.search(r"\*\s*self\.rope_ratio", code):
        return {**rope, "rope_theta": 10000.0 * ratio}
    if re.search(r"/\s*self\.rope_ratio", code):
        return {**rope, "rope_type": "linear", "factor": ratio}
    raise ModelError(
        f"rope_ratio is {ratio:g}, and nothing says whether it stretches the base (ChatGLM3, GLM-4) or positions (ChatGLM2)",
        where=checkpoint.path / "config.json",
        fix="put the checkpoint's own modeling_chatglm.py beside it: it is read, not run",
    )


def _moves(config: dict[str, Any], grouped: bool, *, absent: bool) -> list[Move]:
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, kv, d = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    rows = (heads + 2 * kv) * d
    old, new = "transformer.encoder", "model"
    moves = [
        Move("transformer.embedding.word_embeddings.weight", (vocab, hidden), (f"{new}.embed_tokens.weight",)),
        Move(f"{old}.final_layernorm.weight", (hidden,), (f"{new}.norm.weight",)),
    ]
    if not absent:
        moves.append(Move("transformer.output_layer.weight", (vocab, hidden), ("lm_head.weight",)))
    split = _one_after_another(heads, kv, d) if grouped else _by_head(heads)
    for i in range(config["num_hidden_layers"]):
        a, b = f"{old}.layers.{i}", f"{new}.layers.{i}"
        fused = [("weight", (rows, hidden)), *([("bias", (rows,))] if config["attention_bias"] else [])]
        moves += [
            Move(
                f"{a}.self_attention.query_key_value.{leaf}",
                shape,
                tuple(f"{b}.self_attn.{p}_proj.{leaf}" for p in "qkv"),
                split,
            )
            for leaf, shape in fused
        ]
        moves += [
            Move(f"{a}.{one}.weight", shape, (f"{b}.{other}.weight",))
            for one, other, shape in (
                ("input_layernorm", "input_layernorm", (hidden,)),
                ("self_attention.dense", "self_attn.o_proj", (hidden, heads * d)),
                ("post_attention_layernorm", "post_attention_layernorm", (hidden,)),
                ("mlp.dense_h_to_4h", "mlp.gate_up_proj", (2 * ffn, hidden)),
                ("mlp.dense_4h_to_h", "mlp.down_proj", (hidden, ffn)),
            )
        ]
    return moves


def _one_after_another(heads: int, kv: int, d: int) -> Callable[[Tensor], Sequence[Tensor]]:
    """Rows of all queries, then of all keys, then of all values."""
    return lambda t: t.split([heads * d, kv * d, kv * d])


def _by_head(heads: int) -> Callable[[Tensor], Sequence[Tensor]]:
    """Without multi-query attention: rows of each head's query, key and value together."""
    return lambda t: [part.flatten(0, 1) for part in t.unflatten(0, (heads, 3, -1)).unbind(1)]
