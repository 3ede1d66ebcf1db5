"""Plans: they say the same after a round trip, fit one model only, and one after the other are one plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

import pared
import tiny
from pared.accounting import account
from pared.compose import compose
from pared.errors import UsageError
from pared.modeling import make_config
from pared.plan import LayerPlan, Plan, from_ranges, to_ranges
from pared.proof import proved_layout
from pared.run import apply_plan
from pared.structure import Layout
from pared.surgery import cut_model

DENSE = tiny.model("llama")
LAYOUT = proved_layout(DENSE.config)


def plan_of(keep: dict[str, Any] | None = None, **fields: Any) -> Plan:
    now = account(LAYOUT)
    layers = [LayerPlan(source=i, keep=keep or {}) for i in range(LAYOUT.num_layers)]
    return Plan(**{"model_type": "llama", "before": now, "after": now, "layers": layers, **fields})


def layout_of(model: PreTrainedModel) -> Layout:
    return proved_layout(*make_config(model.config.to_dict()))


@given(st.sets(st.integers(0, 60)))
def test_ranges_come_back(units: set[int]) -> None:
    text = to_ranges(sorted(units))
    assert from_ranges(text).tolist() == sorted(units)
    runs = sum(1 for u in units if u - 1 not in units)
    assert len(text.split()) == runs


@pytest.mark.parametrize(
    "text", ["a", "1-", "-1", "3-1", "2 1", "1 1", "0-3 3", "1.5", "٣", "0-99999999", "0-99999999999999999999"]
)
def test_text_that_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        from_ranges(text)


@given(
    st.lists(st.dictionaries(st.sampled_from(["kv", "ffn"]), st.sets(st.integers(0, 9), min_size=1)), min_size=1, max_size=4),
    st.floats(0, 1),
    st.none() | st.just("0-3 7"),
)
def test_a_plan_is_the_same_after_json(keeps: list[dict[str, set[int]]], removed: float, hidden: str | None) -> None:
    layers = [LayerPlan(source=i, keep={a: to_ranges(sorted(u)) for a, u in k.items()}) for i, k in enumerate(keeps)]
    plan = plan_of(layers=layers, removed=removed, hidden=hidden, provenance={"seed": 3, "recipe": {"remove": 0.2}})
    assert Plan.model_validate_json(plan.to_json()) == plan


def test_a_real_plan_is_the_same_after_saving(tmp_path: Path) -> None:
    plan = tiny.cut(DENSE, structures=("kv", "query"), shape="per-layer", remove=0.1, dry_run=True).plan
    assert any(isinstance(rows, list) for layer in plan.layers for rows in layer.keep.values())
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"{}", b"[" * 5000, {"extra": 1}, {"format": "pared-plan/9"}, {"layers": 3}],
)
def test_what_is_no_plan_is_refused_with_its_place(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(
        content if isinstance(content, bytes) else json.dumps({**json.loads(plan_of().to_json()), **content}).encode()
    )
    with pytest.raises(UsageError) as error:
        Plan.load(path)
    assert error.value.where == path


def test_a_plan_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(UsageError, match="can not read"):
            Plan.load(path)


@pytest.mark.parametrize(
    "keep",
    [
        {"ffn": "40-48"},
        {"ffn": ""},
        {"ffn": "5-2"},
        {"expert": "0"},
        {"nonsense": "0"},
        {"ffn": ["0-3", "1-4"]},
        {"query": ["0", "1"]},
        {"query": ["0", "1", "0", "0-1"]},
        {"kv": "0-2", "query": ["0", "1", "0", "0"]},
        {"query": []},
        {"query": ["0", "1", "2", "0"]},
    ],
)
def test_units_that_the_model_does_not_have_are_refused(keep: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        plan_of(keep).check(LAYOUT)
    with pytest.raises(UsageError):
        cut_model(DENSE, LAYOUT, plan_of(keep))


@pytest.mark.parametrize("layers", [[], [LayerPlan(source=3)], [LayerPlan(source=0)] * 0])
def test_layers_that_the_model_does_not_have_are_refused(layers: list[LayerPlan]) -> None:
    with pytest.raises(UsageError, match="layer"):
        plan_of(layers=layers).check(LAYOUT)


@pytest.mark.parametrize(
    "changes",
    [
        {"intermediate_size": 64},
        {"intermediate_size": 40},
        {"num_hidden_layers": 4},
        {"num_key_value_heads": 2},
        {"hidden_size": 64},
        {"head_dim": 8},
        {"vocab_size": 72},
        {"tie_word_embeddings": True},
    ],
)
def test_a_model_of_other_shapes_is_refused_and_nothing_written(changes: dict[str, Any], tmp_path: Path) -> None:
    plan = tiny.cut(DENSE, structures=("ffn",), remove=0.3, dry_run=True).plan
    other = tiny.save(tiny.model("llama", **changes), tmp_path / "other")
    with pytest.raises(UsageError, match="plan"):
        apply_plan(other, plan, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["other"]


def test_another_family_is_refused() -> None:
    with pytest.raises(UsageError, match="mistral"):
        plan_of().check(proved_layout(tiny.config("mistral")))


def test_a_sibling_of_the_same_base_is_cut_at_the_same_places(tmp_path: Path) -> None:
    plan = tiny.cut(DENSE, shape="per-layer", remove=0.3, dry_run=True).plan
    sibling = tiny.model("llama", seed=7)
    out = pared.load(apply_plan(tiny.save(sibling, tmp_path / "sibling"), plan, tmp_path / "out"))
    assert tiny.equal_states(out, cut_model(sibling, LAYOUT, plan))
    assert Plan.load(tmp_path / "out" / "plan.json").provenance["applied_to"] == "sibling"


WAYS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"structures": ("kv", "query")}, {"structures": ("kv", "query")}),
    ({"structures": ("query",)}, {"structures": ("kv",)}),
    ({"structures": ("kv",)}, {"structures": ("query",)}),
    ({"structures": ("kv", "query", "ffn")}, {"structures": ("kv", "query", "ffn")}),
    ({"structures": ("layer",)}, {"structures": ("kv", "query", "ffn")}),
    ({"structures": ("kv", "query", "ffn")}, {"structures": ("layer",)}),
    ({"structures": ("hidden",)}, {"structures": ("hidden", "ffn")}),
    ({"structures": ("ffn", "hidden")}, {"structures": ("kv", "query", "layer")}),
    ({"structures": ("layer",)}, {"structures": ("layer",)}),
]


SHAPED = [(*way, "uniform") for way in WAYS] + [(*way, "per-layer") for way in WAYS[:4]]


@pytest.mark.parametrize(("one", "two", "shape"), SHAPED)
@pytest.mark.parametrize("family", ["mistral", "mixtral"])
def test_two_plans_in_one_do_what_they_do_one_after_the_other(
    family: str, one: dict[str, Any], two: dict[str, Any], shape: str
) -> None:
    dense = tiny.model(family, num_hidden_layers=4, num_attention_heads=16)
    layout = proved_layout(dense.config)
    settings = {"shape": shape, "remove": 0.1}
    first = tiny.cut(dense, **{**settings, **one})
    second = tiny.cut(first.model, **{**settings, **two, "seed": 1})
    assert first.model is not None and second.model is not None
    both = compose(first.plan, second.plan, layout, layout_of(first.model))
    both.check(layout)
    assert both.before == first.plan.before
    at_once = cut_model(dense, layout, both)
    assert tiny.equal_states(at_once, second.model)
    assert torch.equal(tiny.logits(at_once), tiny.logits(second.model))


@pytest.mark.parametrize("settings", [{"shape": "per-layer"}, {"structures": ("layer",)}, {"structures": ("ffn", "hidden")}])
def test_in_steps_the_whole_amount_goes(settings: dict[str, Any], tmp_path: Path) -> None:
    dense = tiny.model("mistral", num_hidden_layers=4)
    result = tiny.cut(tiny.save(dense, tmp_path / "dense"), criterion="l1", remove=0.4, iterative_steps=3, **settings)
    assert result.model is not None and result.plan.removed >= 0.4 == result.plan.requested
    left = account(layout_of(result.model))
    assert result.plan.after == left and result.plan.before == account(proved_layout(dense.config))
    assert tiny.equal_states(result.model, cut_model(dense, proved_layout(dense.config), result.plan))
