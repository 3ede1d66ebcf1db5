"""Blocks of other sizes: what config.json says of them, and what is built from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tiny
from pared.modeling import skeleton
from pared.per_layer import HEADS, SHAPES, SKIP, SKIPPED, PerLayer, fit_, join, keep_heads_, make_block, split

PARTS: dict[str, dict[str, int | None]] = {"attention": {"attn": 2, "norm": None}, "mlp": {"mlp": 0}}
_ENTRIES = st.dictionaries(st.sampled_from(["num_attention_heads", "intermediate_size"]), st.integers(1, 64), max_size=2)
_SHAPES = st.dictionaries(
    st.sampled_from(["a.weight", "b.bias"]),
    st.lists(st.integers(1, 9), min_size=1, max_size=2).map(tuple),
    min_size=1,
    max_size=2,
)


@given(
    st.dictionaries(st.integers(0, 5), _ENTRIES),
    st.dictionaries(st.integers(0, 5), _SHAPES),
    st.dictionaries(st.integers(0, 5), st.lists(st.integers(0, 7), unique=True)),
    st.dictionaries(st.integers(0, 5), st.lists(st.sampled_from(sorted(PARTS)), unique=True, min_size=1)),
)
def test_what_is_split_from_a_config_is_what_was_joined_to_it(
    own: dict[int, dict[str, int]],
    shapes: dict[int, dict[str, Any]],
    kept: dict[int, list[int]],
    skips: dict[int, list[str]],
) -> None:
    per_layer: PerLayer = {i: dict(e) for i, e in own.items() if e}
    for i, s in shapes.items():
        per_layer.setdefault(i, {})[SHAPES] = s
    for i, kinds in skips.items():
        per_layer.setdefault(i, {}).update({SKIP: kinds, SKIPPED: {kind: PARTS[kind] for kind in kinds}})
    for i, k in kept.items():
        per_layer.setdefault(i, {})[HEADS] = {"kept": k, "of": 8, "arguments": {"alibi": 0}}
    rest, back = split({"model_type": "x", **join(per_layer)})
    assert rest == {"model_type": "x"} and back == per_layer


@pytest.mark.parametrize(
    "module", [nn.Linear(6, 4), nn.Linear(6, 4, bias=False), nn.LayerNorm(6), nn.Conv1d(6, 6, 3, groups=6)]
)
def test_a_module_made_anew_computes_with_its_new_shape(module: nn.Module) -> None:
    block = nn.ModuleDict({"part": module})
    old = block["part"].weight.shape  # type: ignore[union-attr]
    new = (4, *old[1:]) if isinstance(module, nn.LayerNorm | nn.Conv1d) else (3, 5)
    fit_(block, {"part.weight": new})
    part = block["part"]
    assert part.weight.shape == new and (part.bias is None) == (module.bias is None)  # type: ignore[union-attr]
    x = torch.randn(2, 4, 7) if isinstance(module, nn.Conv1d) else torch.randn(2, new[-1])
    assert torch.isfinite(part(x)).all()


def test_heads_of_every_sequence_are_narrowed_alike() -> None:
    class Block(nn.Module):
        def forward(self, x: torch.Tensor, *, alibi: torch.Tensor) -> torch.Tensor:
            return alibi

    block = Block()
    keep_heads_(block, [0, 3], 4, {"alibi": 0})
    alibi = torch.arange(8.0).reshape(8, 1, 1)  # two sequences, one behind the other
    assert block(torch.zeros(1), alibi=alibi).flatten().tolist() == [0, 3, 4, 7]


def test_a_part_that_comes_out_right_is_made_with_the_models_own_hidden_size() -> None:
    model = skeleton(tiny.config("gpt2"))
    like = model.transformer.h[0]
    shapes = {
        "attn.c_attn.weight": (32, 72),
        "attn.c_attn.bias": (72,),
        "attn.c_proj.weight": (24, 32),
        "attn.c_proj.bias": (32,),
    }
    with torch.device("meta"):
        wanted = {n: tuple(p.shape) for n, p in like.state_dict().items()} | shapes
        block = make_block(like, model.config, 0, {"n_head": 3, "n_embd": 24, SHAPES: wanted})
    assert {n: tuple(p.shape) for n, p in block.state_dict().items()} == wanted
    assert (block.attn.num_heads, block.attn.head_dim, block.attn.split_size) == (3, 8, 24)
