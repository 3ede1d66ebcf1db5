"""Bias slots: what is added changes nothing until it is fitted, is fitted exactly, counted, and said by the config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import pared
import tiny
from pared.errors import UsageError
from pared.modeling import blocks
from pared.per_layer import BIASES, split
from pared.recipe import load_recipe, make_recipe
from pared.run import apply_plan
from pared.slots import with_slots
from pared.source import Source
from pared.stream import observed
from pared.walk import EPSILON

IDS = tiny.tokens(7)  # so few that no sequences of random tokens are fitted to beside them
SHAPES = ["uniform", "per-layer"]


def pruned(model: Any, **settings: Any) -> Any:
    plain = {"calibration": IDS, "remove": 0.2, "align": 1, "batch": 4, "criterion": "wanda_sp", "add_bias": True}
    return pared.prune(model, **{**plain, **settings})


def recipe(shape: str, **settings: Any) -> Any:
    return make_recipe(shape=shape, compensate="sequential", **settings)


CONSUMERS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


@torch.no_grad()
def first_block(model: PreTrainedModel, weights: dict[str, Tensor] | None = None) -> dict[str, tuple[Tensor, Tensor]]:
    """Means over all tokens, float64, of what enters and leaves the consumers of the first block.

    weights: of the tokens, by the consumer's name; None: all count alike.
    """
    block, names = blocks(model)[1][0], list(CONSUMERS)
    sums: dict[str, list[Tensor]] = {n: [] for n in names}
    with observed(block, names, lambda name, a, _: sums[name].append(a.double())):
        model(input_ids=IDS, use_cache=False)
    out = {}
    for name in names:
        module = block.get_submodule(name.removesuffix(".weight"))
        a = torch.cat(sums[name])
        a = a.mean(0) if weights is None else weights[name] @ a / weights[name].sum()
        bias = 0.0 if module.bias is None else module.bias.double()
        out[name] = a, module.weight.double() @ a + bias
    return out


@torch.no_grad()
def weights_of_tokens(model: PreTrainedModel) -> dict[str, Tensor]:
    """What each token counts for in the refit of the first block's consumers: one over the mean square of the stream that
    they add to, float64."""
    seen: dict[str, Tensor] = {}
    layers = blocks(model)[1]
    readers = {"self_attn.o_proj.weight": layers[0].post_attention_layernorm, "mlp.down_proj.weight": layers[1]}
    hooks = [m.register_forward_pre_hook(lambda _, args, n=n: seen.update({n: args[0]})) for n, m in readers.items()]
    model(input_ids=IDS, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {n: 1 / (h.double().square().mean(-1).flatten() + EPSILON) for n, h in seen.items()}


@pytest.mark.parametrize(
    ("family", "shape"), [("llama", "uniform"), ("llama", "per-layer"), ("qwen2", "per-layer"), ("mixtral", "per-layer")]
)
def test_biases_of_zeros_change_nothing(family: str, shape: str, tmp_path: Path) -> None:
    model = tiny.model(family)
    for source in (Source.open(model), Source.open(tiny.save(model, tmp_path / "dense"))):
        wide = with_slots(source, recipe(shape))
        added = wide.layout.added
        assert added and all(n.endswith(".bias") for n in added)
        got = wide.resident(torch.float32)
        assert all(torch.count_nonzero(got.get_parameter(n)) == 0 for n in added)
        assert torch.equal(tiny.logits(got), tiny.logits(model))
        assert {n for n in wide.layout.tensors if n not in source.layout.tensors} == added
        if source.checkpoint is not None and wide.checkpoint is not None:
            assert wide.checkpoint.digest() == source.checkpoint.digest(), "a plan is made for the model as it lies on disk"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", ["bias", "refit", "sequential"])
@pytest.mark.parametrize(("structures", "name"), [("kv", "self_attn.o_proj.weight"), ("ffn", "mlp.down_proj.weight")])
def test_the_fitted_bias_makes_up_for_the_mean(shape: str, mode: str, structures: str, name: str) -> None:
    model = tiny.model("llama")
    settings = {"shape": shape, "structures": structures, "allocate": "uniform"}
    weights = None if mode == "bias" else weights_of_tokens(model)
    _, want = first_block(model, weights)[name]
    _, got = first_block(pruned(model, compensate=mode, **settings).model, weights)[name]
    _, plain = first_block(pruned(model, compensate="none", add_bias=False, **settings).model, weights)[name]
    assert torch.allclose(got, want, atol=1e-6) and not torch.allclose(plain, want, atol=1e-3)


def test_flap_adds_what_the_removed_inputs_gave_on_average() -> None:
    model = tiny.model("llama")
    done = pared.prune(model, calibration=IDS, base=load_recipe("flap"), structures=["ffn"], remove=0.2)
    name = "mlp.down_proj.weight"
    mean, _ = first_block(model)[name]
    gone = torch.ones(len(mean), dtype=torch.bool)
    gone[done.plan.selection(0, Source.open(model).layout)["ffn"]] = False
    w = blocks(model)[1][0].get_parameter(name).double()
    bias = blocks(done.model)[1][0].mlp.down_proj.bias.double()
    assert done.plan.biases and torch.allclose(bias, w[:, gone] @ mean[gone], atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_added_counts(family: str, shape: str, tmp_path: Path) -> None:
    model = tiny.model(family)
    of = {"structures": "kv", "remove": 0.02} if family == "mixtral" else {}
    if (family, shape) == ("mixtral", "uniform"):
        with pytest.raises(UsageError, match="no switch"):
            pruned(model, shape=shape, **of)
        return
    live = pruned(model, shape=shape, compensate="sequential", **of)
    assert live.plan.before.params == sum(p.numel() for p in model.parameters())
    assert live.plan.after.params == sum(p.numel() for p in live.model.parameters())
    assert live.plan.removed >= live.plan.requested and live.plan.biases
    source = tiny.save(model, tmp_path / "dense")
    written = pruned(source, shape=shape, compensate="sequential", out=tmp_path / "out", **of)
    assert written.plan.after == live.plan.after
    assert tiny.equal_states(pared.load(tmp_path / "out"), live.model)
    assert "biases that the base model lacks" in (tmp_path / "out" / "README.md").read_text()
    # A plan holds no weights: where it is applied there is nothing to put into the biases.
    apply_plan(source, written.plan, tmp_path / "applied")
    assert not any(n.endswith("o_proj.bias") for n in pared.load(tmp_path / "applied").state_dict())


def test_a_uniform_result_is_a_stock_checkpoint(tmp_path: Path) -> None:
    source = tiny.save(tiny.model("llama"), tmp_path / "dense")
    pruned(source, out=tmp_path / "out", compensate="sequential")
    stock, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert stock.config.attention_bias and stock.config.mlp_bias and type(stock).__module__.startswith("transformers.")
    assert torch.equal(tiny.logits(stock), tiny.logits(pared.load(tmp_path / "out")))


def test_a_stock_model_refuses_layers_that_have_biases_of_their_own_alone(tmp_path: Path) -> None:
    source = tiny.save(tiny.model("mistral"), tmp_path / "dense")
    pruned(source, out=tmp_path / "out", shape="per-layer", allocate="uniform", structures="ffn", compensate="bias")
    _, entries = split(pared.load(tmp_path / "out").config.to_dict())
    assert all(own[BIASES] == ["mlp.down_proj", "self_attn.o_proj"] for own in entries.values())
    assert len({own["intermediate_size"] for own in entries.values()}) == 1, "only the biases tell the layers from stock ones"
    with pytest.raises(RuntimeError, match="intermediate_size"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_biases_stay_where_more_is_pruned(tmp_path: Path) -> None:
    first = pruned(tiny.model("llama"), shape="per-layer", compensate="sequential").model
    again = pruned(first, shape="per-layer", add_bias=False, compensate="none", structures="ffn").model
    names = [n for n in first.state_dict() if n.endswith("o_proj.bias")]
    assert names and all(torch.equal(first.state_dict()[n], again.state_dict()[n]) for n in names)
    narrow = pared.prune(first, remove=0.2, criterion="l2", structures="hidden", shape="per-layer", compensate="none").model
    hidden = narrow.config.hidden_size
    assert hidden < first.config.hidden_size and all(narrow.state_dict()[n].shape == (hidden,) for n in names)


def test_what_can_not_be_is_refused_before_it_is_computed() -> None:
    with pytest.raises(UsageError, match="no switch for a bias in"):
        pruned(tiny.model("mistral"), compensate="bias")
    with pytest.raises(UsageError, match="stay zero"):
        pruned(tiny.model("llama"), compensate="none")
