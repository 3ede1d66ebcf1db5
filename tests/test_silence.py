"""What falls silent with a unit: layouts that shapes can not tell apart, against what the families' own code says."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

import tiny
from pared.discovery import discover

_SMALL: dict[str, Any] = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8}
_THIRDS, _BY_HEAD = "[kv query d | kv d | kv d]", "(kv [query d | d | d])"

# config class -> (settings, tensor in the first block -> its layout, from reading the class's forward)
KNOWN: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "GPT2Config": (
        _SMALL,
        {"attn.c_attn.weight": f"hidden {_THIRDS}", "attn.c_attn.bias": _THIRDS, "attn.c_proj.weight": "(kv query d) hidden"},
    ),
    "BloomConfig": (
        _SMALL,
        {
            "self_attention.query_key_value.weight": f"{_BY_HEAD} hidden",
            "self_attention.query_key_value.bias": _BY_HEAD,
            "self_attention.dense.weight": "hidden (kv query d)",
            "self_attention.dense.bias": "hidden",
            "mlp.dense_h_to_4h.weight": "ffn hidden",
            "mlp.dense_4h_to_h.weight": "hidden ffn",
        },
    ),
    "GPTNeoXConfig": (
        {**_SMALL, "intermediate_size": 96},
        {"attention.query_key_value.weight": f"{_BY_HEAD} hidden", "attention.dense.weight": "hidden (kv query d)"},
    ),
    "MptConfig": (
        {"vocab_size": 64, "d_model": 64, "n_layers": 2, "n_heads": 8},
        {"attn.Wqkv.weight": f"{_THIRDS} hidden", "ffn.up_proj.weight": "ffn hidden"},
    ),
    "GPTBigCodeConfig": (
        {**_SMALL, "n_inner": 96},
        {"attn.c_attn.weight": f"{_THIRDS} hidden", "attn.c_proj.weight": "hidden (kv query d)"},
    ),
    "OPTConfig": (
        {**_SMALL, "ffn_dim": 96, "word_embed_proj_dim": 64},
        {"self_attn.q_proj.weight": "(kv query d) hidden", "self_attn_layer_norm.weight": "hidden", "fc1.weight": "ffn hidden"},
    ),
    "StableLmConfig": (
        {**_SMALL, "num_key_value_heads": 4, "intermediate_size": 96},
        {
            "self_attn.q_proj.weight": "(kv query d) hidden",
            "self_attn.k_proj.weight": "(kv d) hidden",
            "self_attn.o_proj.weight": "hidden (kv query d)",
        },
    ),
}


def config(kind: str, settings: dict[str, Any]) -> Any:
    return getattr(transformers, kind)(**settings, bos_token_id=1, eos_token_id=2, pad_token_id=0)


@pytest.mark.parametrize("kind", KNOWN)
def test_heads_are_told_from_hidden_channels(kind: str) -> None:
    settings, known = KNOWN[kind]
    layout, found = discover(config(kind, settings))
    for i in range(layout.num_layers):
        for name, text in known.items():
            options = found.candidates[f"{layout.prefix}.{i}.{name}"]
            # A bias of queries and keys alone has no gradient of its own: there the proof decides.
            assert text in options and (len(options) == 1 or name.endswith("bias")), (name, options)


@pytest.mark.parametrize(
    ("kind", "argument"), [("BloomConfig", {"alibi": 0}), ("MptConfig", {"position_bias": 0}), ("GPT2Config", {})]
)
def test_arguments_with_an_entry_for_each_head_are_found(kind: str, argument: dict[str, int]) -> None:
    layout, _ = discover(config(kind, KNOWN[kind][0]))
    assert layout.head_arguments == argument


def test_one_head_for_all_queries_is_read_from_the_shapes() -> None:
    layout, _ = discover(config("GPTBigCodeConfig", KNOWN["GPTBigCodeConfig"][0]))
    assert (layout.layer_sizes[0]["kv"], layout.layer_sizes[0]["query"], layout.layer_sizes[0]["d"]) == (1, 8, 8)


def test_nothing_is_left_in_the_weights_that_were_silenced() -> None:
    model = tiny.config("bloom")
    one, two = (discover(model)[1] for _ in range(2))
    assert one.candidates == two.candidates
