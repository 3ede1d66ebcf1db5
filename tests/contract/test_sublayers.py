"""Blocks without their attention or their MLP: proved, equal to silencing it, exact in the accounts, whole on disk."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import pared
import pared.modeling
import tiny
from pared.accounting import account
from pared.checkpoint import Checkpoint
from pared.errors import ModelError, UsageError
from pared.modeling import blocks
from pared.plan import LayerPlan, Plan
from pared.proof import TOLERANCE, proved_layout
from pared.run import apply_plan
from pared.structure import Layout
from pared.surgery import cut_model
from pared.verify import verify

KINDS = ("attention", "mlp")
FAMILIES = [f for f in tiny.FAMILIES if f != "bloom"]
# What writes each sublayer's output into the residual stream, where it is not called o_proj and down_proj.
ENDS = {
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "mixtral": ("self_attn.o_proj", "mlp.experts"),
}


@lru_cache
def dense(family: str) -> tuple[PreTrainedModel, Layout]:
    model = tiny.model(family)
    return model, proved_layout(model.config)


def plan_of(layout: Layout, skips: list[list[Any]]) -> Plan:
    layers = [LayerPlan(source=i, skip=s) for i, s in enumerate(skips)]
    now, after = account(layout), account(layout, [(i, dict.fromkeys(s, 0)) for i, s in enumerate(skips)])
    return Plan(model_type=layout.model_type, shape="per-layer", before=now, after=after, layers=layers)


def without(family: str, kind: str) -> Plan:
    """The first layer, which caches count tokens by, and another lose the sublayer."""
    layout = dense(family)[1]
    return plan_of(layout, [[kind] if i in (0, layout.num_layers - 1) else [] for i in range(layout.num_layers)])


def silenced(model: PreTrainedModel, ends: dict[int, str]) -> Tensor:
    """Logits with the named module of each layer giving zeros."""
    layers = blocks(model)[1]
    handles = [
        layers[i].get_submodule(n).register_forward_hook(lambda m, a, out: torch.zeros_like(out)) for i, n in ends.items()
    ]
    try:
        return tiny.logits(model)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
class TestEveryFamily:
    def test_is_proved_for_the_per_layer_form_alone(self, family: str, kind: str) -> None:
        proof = dense(family)[1].proofs[kind]
        assert proof.holds and proof.difference is not None and proof.difference <= TOLERANCE and not proof.stock

    def test_cutting_is_silencing(self, family: str, kind: str) -> None:
        model, layout = dense(family)
        plan = without(family, kind)
        end = ENDS.get(family, ("self_attn.o_proj", "mlp.down_proj"))[KINDS.index(kind)]
        want = silenced(model, {i: end for i, layer in enumerate(plan.layers) if layer.skip})
        assert tiny.close(tiny.logits(cut_model(model, layout, plan)), want)
        assert not tiny.close(tiny.logits(model), want, 1e-3)

    def test_what_is_left_is_what_was_counted(self, family: str, kind: str) -> None:
        model, layout = dense(family)
        plan = without(family, kind)
        cut = cut_model(model, layout, plan)
        left = sum(p.numel() for p in blocks(cut)[1].parameters())
        assert left == plan.after.block_params < plan.before.block_params
        assert (plan.after.kv_cache < plan.before.kv_cache) == (kind == "attention")
        assert account(proved_layout(*_as_written(cut))) == plan.after

    def test_a_cache_changes_nothing(self, family: str, kind: str) -> None:
        model, layout = dense(family)
        cut = cut_model(model, layout, without(family, kind))
        settings: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        ids = tiny.tokens(2, 2 * tiny.WINDOW)
        with_cache, plain = (cut.generate(ids, use_cache=use, **settings) for use in (True, False))
        assert torch.equal(with_cache, plain)


def _as_written(model: PreTrainedModel) -> tuple[Any, Any]:
    return pared.modeling.make_config(model.config.to_dict())


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen3", "mixtral"])
def test_the_checkpoint_is_whole(family: str, tmp_path: Path) -> None:
    model, layout = dense(family)
    plan = plan_of(layout, [["attention"], ["mlp"], *[[] for _ in range(layout.num_layers - 2)]])
    out = apply_plan(tiny.save(model, tmp_path / "dense"), plan, tmp_path / "out")
    assert verify(out) == []
    want = tiny.logits(cut_model(model, layout, plan))
    loaded = pared.load(out)
    assert torch.equal(tiny.logits(loaded), want)
    remote = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32).eval()
    assert torch.equal(tiny.logits(remote), want)
    assert json.loads((out / "config.json").read_text())["per_layer_config"]["0"]["skip"] == ["attention"]
    with pytest.raises(Exception, match="per-layer attribute"):  # rather than invent the weights that are not there
        AutoModelForCausalLM.from_pretrained(out, trust_remote_code=False)
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert tiny.equal_states(pared.load(again), loaded)


def test_a_model_that_has_lost_some_loses_others(tmp_path: Path) -> None:
    first = tiny.cut(tiny.model("llama"), structures=("attention",), shape="per-layer", remove=0.1)
    second = tiny.cut(first.model, structures=("mlp", "kv", "ffn"), shape="per-layer", remove=0.2, out=tmp_path / "out")
    assert [layer.skip for layer in first.plan.layers].count(["attention"]) == 1
    skipped = [own.skip for own in pared.load(tmp_path / "out").config.per_layer_config]
    assert ["attention"] in [[k for k in s if k == "attention"] for s in skipped]
    written = Checkpoint.open(tmp_path / "out")
    counted = sum(tiny.numel(t.shape) for t in written.tensors.values())
    assert counted == second.plan.after.params
    assert verify(tmp_path / "out") == []


def test_a_layer_that_would_lose_everything_goes_whole() -> None:
    model, layout = dense("llama")
    result = tiny.cut(model, structures=KINDS, shape="per-layer", remove=0.5, seed=1)
    kept = {layer.source for layer in result.plan.layers}
    assert all(len(layer.skip) < 2 for layer in result.plan.layers)
    gone = set(range(layout.num_layers)) - kept
    whole = plan_of(layout, [["attention", "mlp"] if i in gone else [] for i in range(layout.num_layers)])
    layers = [
        layer if i in gone else next(x for x in result.plan.layers if x.source == i) for i, layer in enumerate(whole.layers)
    ]
    assert tiny.close(
        tiny.logits(result.model), tiny.logits(cut_model(model, layout, whole.model_copy(update={"layers": layers})))
    )


@pytest.mark.parametrize("criterion", ["taylor", "obs-fisher"])
@pytest.mark.parametrize("share", [0.15, 0.3, 0.6])
def test_depth_and_width_meet_one_budget(share: float, criterion: str) -> None:
    result = tiny.cut(
        tiny.model("llama"),
        structures=("attention", "mlp", "kv", "query", "ffn"),
        shape="per-layer",
        remove=share,
        criterion=criterion,
        align=1,
    )
    channel = 3 * 32 / result.plan.before.block_params  # the finest step there is
    assert share <= result.plan.removed < share + channel
    assert sum(p.numel() for p in blocks(result.model)[1].parameters()) == result.plan.after.block_params


def test_a_uniform_shape_can_not_lose_them() -> None:
    for settings in ({"shape": "uniform"}, {"shape": "per-layer", "allocate": "uniform"}):
        with pytest.raises((ModelError, UsageError), match="attention"):
            tiny.cut(tiny.model("llama"), structures=("attention",), **settings)


def test_what_can_not_be_skipped_is_refused_with_the_reason() -> None:
    model, layout = dense("bloom")  # its sublayers add the residual stream themselves
    assert all(not layout.proofs[kind].holds and layout.proofs[kind].reason for kind in KINDS)
    with pytest.raises(ModelError, match="can not be removed"):
        tiny.cut(model, structures=("attention",), shape="per-layer")
    with pytest.raises(UsageError, match="can not do without"):
        plan_of(layout, [["attention"], [], []]).check(layout)


def test_a_config_that_does_not_say_which_parts_are_skipped_is_refused(tmp_path: Path) -> None:
    path = tiny.save(tiny.model("llama"), tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "per_layer_config": {"1": {"skip": ["attention"]}}}))
    with pytest.raises(ModelError, match="which parts"):
        pared.load(path)
