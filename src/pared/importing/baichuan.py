"""Baichuan and Baichuan 2: the 7B models become Llama, the 13B models, which have ALiBi, a class of our own.

W_pack holds the rows of queries, keys and values one after the other. Baichuan 2 normalises the rows of its output
head before it uses them (NormHead), which is done here once.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from pared.checkpoint import Checkpoint
from pared.errors import ModelError
from pared.importing.published import Conversion, Move, Settings, modelling_code
from pared.models.baichuan import alibi_slopes

NAMES = "Baichuan-7B and -13B, Baichuan2-7B and -13B"
_ROTARY = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_THETA = 10000.0
# Rows that are in fp32 at a time while they are normalised.
_ROWS = 4096


def recognises(config: dict[str, Any]) -> bool:
    return config.get("model_type") == "baichuan"


def convert(checkpoint: Checkpoint) -> Conversion:
    """What becomes of each tensor. ModelError for settings that the published formula does not have."""
    settings, code = Settings(checkpoint), modelling_code(checkpoint)
    hidden, ffn = settings.size("hidden_size"), settings.size("intermediate_size")
    layers, heads, vocab = settings.size("num_hidden_layers"), settings.size("num_attention_heads"), settings.size("vocab_size")
    if hidden % heads:
        raise ModelError(f"{heads} heads do not divide {hidden} channels", where=checkpoint.path / "config.json")
    normalised = _second(settings, code)
    rotary = _has_rotary(checkpoint, code)
    tied = settings.flag("tie_word_embeddings", default=False)
    if tied and normalised:
        raise ModelError(
            "the output head is normalised and shared with the embeddings, which are not",
            where=checkpoint.path / "config.json",
            fix="only the published formulas are imported; see docs/importing.md",
        )
    settings.only("hidden_act", "silu", why="the published models have SiLU")
    config = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "max_position_embeddings": settings.size("max_position_embeddings", "model_max_length", default=4096),
        "rms_norm_eps": settings.number("rms_norm_eps", default=1e-6),
        "tie_word_embeddings": tied,
        **settings.tokens("bos_token_id", "eos_token_id", "pad_token_id"),
    }
    settings.ignore("model_max_length", "z_loss_weight", "max_position_embeddings")
    settings.finish()
    made: dict[str, Tensor] = {}
    if rotary:
        rope = {"rope_parameters": {"rope_type": "default", "rope_theta": _THETA}}
        kind = {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "mlp_bias": False,
            **rope,
        }
    else:
        kind = {"model_type": "baichuan_alibi", "architectures": ["BaichuanAlibiForCausalLM"]}
        made = {f"model.layers.{i}.self_attn.alibi_slopes": alibi_slopes(heads) for i in range(layers)}
    family = f"Baichuan{' 2' if normalised else ''} with {'rotary positions' if rotary else 'ALiBi'}"
    notes = ("The rows of the output head are normalised, as Baichuan 2 does before it uses them.",) if normalised else ()
    return Conversion(
        family=family,
        config={**kind, **config},
        moves=(
            *_moves(hidden, ffn, layers),
            *_head(vocab, hidden, normalised, tied and "lm_head.weight" not in checkpoint.tensors),
        ),
        derived=_ROTARY.pattern,
        made=made,
        notes=notes,
    )


def _second(settings: Settings, code: str) -> bool:
    """Whether this is Baichuan 2: its code has a NormHead, its config a weight of the z loss, and its vocabulary a size."""
    if code:
        return "NormHead" in code
    return settings.optional("z_loss_weight") is not None or settings.size("vocab_size") == 125696


def _has_rotary(checkpoint: Checkpoint, code: str) -> bool:
    """Whether positions are rotary (7B) or ALiBi (13B), from the published code, the tensors, or the config.

    Only the configs of the rotary models have max_position_embeddings; those of the others say model_max_length alone.
    """
    frequencies = [n for n in checkpoint.tensors if _ROTARY.fullmatch(n)]
    for name in frequencies:
        saved = checkpoint.read(name).float()
        want = _THETA ** -(torch.arange(len(saved)).float() / len(saved))
        if not torch.allclose(saved, want, rtol=1e-2):
            raise ModelError(
                f"{name} is not of base {_THETA:g}",
                where=checkpoint.path,
                fix="only the published formulas are imported; see docs/importing.md",
            )
    if code:
        alibi, rotary = "alibi" in code.lower(), "RotaryEmbedding" in code
        if alibi != rotary:
            return rotary
    config = checkpoint.config
    if not frequencies and "max_position_embeddings" not in config and "model_max_length" not in config:
        raise ModelError(
            "nothing says whether its positions are rotary (7B) or ALiBi (13B)",
            where=checkpoint.path / "config.json",
            fix="put the checkpoint's own modeling_baichuan.py beside it: it is read, not run",
        )
    return bool(frequencies) or "max_position_embeddings" in config


def _moves(hidden: int, ffn: int, layers: int) -> list[Move]:
    def same(name: str, *shape: int) -> Move:
        return Move(name, shape, (name,))

    moves = [same("model.norm.weight", hidden)]
    for i in range(layers):
        at = f"model.layers.{i}"
        moves += [
            Move(
                f"{at}.self_attn.W_pack.weight",
                (3 * hidden, hidden),
                tuple(f"{at}.self_attn.{p}_proj.weight" for p in "qkv"),
                lambda t: t.chunk(3),
            ),
            same(f"{at}.self_attn.o_proj.weight", hidden, hidden),
            same(f"{at}.mlp.gate_proj.weight", ffn, hidden),
            same(f"{at}.mlp.up_proj.weight", ffn, hidden),
            same(f"{at}.mlp.down_proj.weight", hidden, ffn),
            same(f"{at}.input_layernorm.weight", hidden),
            same(f"{at}.post_attention_layernorm.weight", hidden),
        ]
    return moves


def _head(vocab: int, hidden: int, normalised: bool, absent: bool) -> list[Move]:
    embedding = Move("model.embed_tokens.weight", (vocab, hidden), ("model.embed_tokens.weight",))
    if absent:
        return [embedding]
    split = _normalise if normalised else Move.split
    return [embedding, Move("lm_head.weight", (vocab, hidden), ("lm_head.weight",), split)]


def _normalise(head: Tensor) -> tuple[Tensor]:
    """Every row divided by its Euclidean norm, in place: head [vocab, hidden]."""
    for rows in head.split(_ROWS):
        rows.copy_(torch.nn.functional.normalize(rows.float()))
    return (head,)
