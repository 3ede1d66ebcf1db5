"""Every family and every axis through the same laws: proved, equal to masking, exact in its accounts, whole on disk."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as hf_logging

import pared
import tiny
from pared.accounting import account
from pared.axes import Nested
from pared.checkpoint import Checkpoint
from pared.errors import ModelError
from pared.modeling import blocks
from pared.plan import LayerPlan, Plan, from_ranges, to_ranges
from pared.proof import TOLERANCE, proved_layout
from pared.run import Pruned, apply_plan
from pared.structure import Layout
from pared.surgery import cut_model

# What has been proved so far, which must not shrink unseen.
HEADS, WIDTH = ("kv", "query"), ("kv", "query", "ffn")
FLOOR: dict[str, tuple[str, ...]] = dict.fromkeys(tiny.FAMILIES, (*WIDTH, "hidden", "layer")) | {
    "llama-mha": ("kv", "ffn", "hidden", "layer"),
    "llama-mqa-tied": ("query", "ffn", "hidden", "layer"),
    "gpt_neox": ("kv", "ffn", "hidden", "layer"),
    "gpt2": ("kv", "ffn", "hidden", "layer"),
    "bloom": ("kv", "ffn", "hidden", "layer"),
}
# Sizes that the family's own config has no words for: the per-layer form carries them.
NO_WORDS = {"gpt_neox": {"kv", "hidden"}, "gpt2": {"kv", "hidden"}, "bloom": {"kv", "ffn", "hidden"}}
ATTENTION = [f for f in FLOOR if {"kv", "query"} & set(FLOOR[f])]
# OLMo 2 normalises queries and keys over all heads: a head that is cut is missed there, and one that is masked is too.
SEPARATE_HEADS = [f for f in ATTENTION if f != "olmo2"]
OUTPUT = {"gpt_neox": "attention.dense", "gpt2": "attn.c_proj", "bloom": "self_attention.dense"}
DENSE_FFN = [f for f in FLOOR if "ffn" in FLOOR[f] and f != "mixtral"]
RMS_NORMS = ["llama", "llama-mqa-tied", "mistral", "qwen2", "qwen3", "phi3"]
DOWN = {"gpt_neox": "mlp.dense_4h_to_h", "gpt2": "mlp.c_proj", "bloom": "mlp.dense_4h_to_h"}


def widths(family: str, shape: str = "per-layer") -> tuple[str, ...]:
    return tuple(a for a in WIDTH if a in FLOOR[family] and (shape != "uniform" or a not in NO_WORDS.get(family, ())))


def ways() -> Iterator[tuple[str, tuple[str, ...], str]]:
    """(family, structures, shape): what a user may ask of each family."""
    for family, axes in FLOOR.items():
        for shape in ("uniform", "per-layer"):
            if widths(family, shape):
                yield family, widths(family, shape), shape
        for axis in set(axes) - set(WIDTH):
            yield family, (axis,), "per-layer" if axis in NO_WORDS.get(family, ()) else "uniform"


WAYS = sorted(ways())


@lru_cache
def dense(family: str) -> tuple[PreTrainedModel, Layout]:
    model = tiny.model(family)
    return model, proved_layout(model.config)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path, Pruned]]:
    """(family, structures, shape) -> the source on disk, its pruned checkpoint, and the same pruned in memory."""

    @lru_cache
    def checkpoint(family: str) -> Path:
        return tiny.save(dense(family)[0], tmp_path_factory.mktemp(family) / "dense")

    @lru_cache
    def make(family: str, structures: tuple[str, ...], shape: str) -> tuple[Path, Path, Pruned]:
        source = checkpoint(family)
        out = source.with_name(f"{'-'.join(structures)}-{shape}")
        # Half of the widths: an amount at which every config can say the head counts of a uniform shape.
        settings: dict[str, Any] = {
            "structures": structures,
            "shape": shape,
            "remove": 0.5 if {"kv", "query"} & set(structures) else 0.3,
        }
        if structures == ("hidden",):
            settings["remove"] = 0.5
        tiny.cut(source, out=out, **settings)
        return source, out, tiny.cut(source, **settings)

    return make


def plan_of(layout: Layout, layers: list[LayerPlan], hidden: str | None = None) -> Plan:
    now = account(layout)
    return Plan(model_type=layout.model_type, before=now, after=now, layers=layers, hidden=hidden)


@pytest.mark.parametrize(("family", "axis"), [(f, a) for f in FLOOR for a in FLOOR[f]])
def test_what_was_proved_stays_proved(family: str, axis: str) -> None:
    proof = dense(family)[1].proofs[axis]
    assert proof.holds and proof.difference is not None and proof.difference <= TOLERANCE
    assert proof.stock == (axis not in NO_WORDS.get(family, ()))


@pytest.mark.parametrize("family", FLOOR)
def test_cutting_nothing_is_bit_identical(family: str, pruned: Any, tmp_path: Path) -> None:
    model, layout = dense(family)
    nothing = plan_of(layout, [LayerPlan(source=i) for i in range(layout.num_layers)])
    same = cut_model(model, layout, nothing)
    assert tiny.equal_states(same, model) and torch.equal(tiny.logits(same), tiny.logits(model))
    source = Checkpoint.open(pruned(family, ("layer",), "uniform")[0])
    written = Checkpoint.open(apply_plan(source.path, nothing, tmp_path / "out"))
    assert written.tensors.keys() == source.tensors.keys()
    for name, info in source.tensors.items():
        assert written.tensors[name].dtype == info.dtype and torch.equal(written.read(name), source.read(name))


# ---------------------------------------------------------------------------------------------------------------------
# Cutting is masking, seen from outside of the code that cuts and proves


def masked(model: PreTrainedModel, consumer: str, masks: dict[int, Tensor]) -> Tensor:
    """Logits with the given input channels (0 or 1) of a consumer in each layer."""
    handles = []
    for i, layer in enumerate(blocks(model)[1]):
        if i in masks:
            module = layer.get_submodule(consumer)
            handles.append(module.register_forward_pre_hook(lambda m, args, keep=masks[i]: (args[0] * keep,)))
    try:
        return tiny.logits(model)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("family", DENSE_FFN)
def test_cut_ffn_channels_are_silent_channels(family: str) -> None:
    model, layout = dense(family)
    result = tiny.cut(model, structures=("ffn",), shape="per-layer", remove=0.25)
    masks = {}
    for i, layer in enumerate(result.plan.layers):
        masks[i] = torch.zeros(layout.layer_sizes[i]["ffn"])
        kept = layer.keep.get("ffn", f"0-{len(masks[i]) - 1}")
        masks[i][from_ranges(kept)] = 1  # type: ignore[arg-type]
    assert all(m.sum() > 0 for m in masks.values()) and sum(int((m == 0).sum()) for m in masks.values()) > 0
    assert tiny.close(tiny.logits(result.model), masked(model, DOWN.get(family, "mlp.down_proj"), masks))


@pytest.mark.parametrize("family", SEPARATE_HEADS)
def test_cut_heads_are_silent_heads(family: str) -> None:
    model, layout = dense(family)
    heads = tuple(a for a in HEADS if a in FLOOR[family])
    plan = tiny.cut(model, structures=heads, shape="per-layer", remove=0.09).plan
    masks, silent = {}, 0
    for i in range(len(plan.layers)):
        sizes, kept = layout.sizes_at(i), plan.selection(i, layout)
        mask = torch.zeros(sizes["kv"], sizes["query"], sizes["d"])
        groups = kept.get("kv", torch.arange(sizes["kv"]))
        for row, group in enumerate(groups.tolist()):  # type: ignore[union-attr]
            inside = kept.get("query")
            mask[group, inside.index[row] if isinstance(inside, Nested) else slice(None)] = 1
        masks[i] = mask.flatten()
        silent += int((mask == 0).sum())
    assert silent > 0
    assert tiny.close(tiny.logits(cut_model(model, layout, plan)), masked(model, OUTPUT.get(family, "self_attn.o_proj"), masks))


@pytest.mark.parametrize("family", RMS_NORMS)
def test_cut_hidden_channels_leave_the_analytic_rest(family: str) -> None:
    model, layout = dense(family)
    kept = torch.tensor(sorted(set(range(32)) - {0, 3, 4, 17, 18, 19, 30, 31}))
    layers = [LayerPlan(source=i) for i in range(layout.num_layers)]
    result = cut_model(model, layout, plan_of(layout, layers, to_ranges(kept.tolist())))
    keep = torch.zeros(32).index_fill(0, kept, 1)

    def norm(module: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
        # A mean of squares over the kept channels alone; the others are zero here.
        x, eps = args[0], module.variance_epsilon
        return module.weight * x * torch.rsqrt(x.square().sum(-1, keepdim=True) / len(kept) + eps)  # type: ignore[operator]

    def silence(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return out * keep

    handles = [model.get_input_embeddings().register_forward_hook(silence)]
    for name, module in model.named_modules():
        if name.endswith(("o_proj", "down_proj")):
            handles.append(module.register_forward_hook(silence))
        elif name.endswith(("layernorm", "model.norm")):
            handles.append(module.register_forward_hook(norm))
    try:
        want = tiny.logits(model)
    finally:
        for handle in handles:
            handle.remove()
    assert tiny.close(tiny.logits(result), want) and not tiny.close(want, tiny.logits(model))


@pytest.mark.parametrize("family", FLOOR)
def test_a_cut_layer_is_a_skipped_layer(family: str) -> None:
    model, layout = dense(family)
    kept = [0, *range(2, layout.num_layers)]
    result = cut_model(model, layout, plan_of(layout, [LayerPlan(source=i) for i in kept]))

    def skip(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        entered = args[0] if args else kwargs["hidden_states"]
        return (entered, *out[1:]) if isinstance(out, tuple) else entered

    handle = blocks(model)[1][1].register_forward_hook(skip, with_kwargs=True)
    try:
        want = tiny.logits(model)
    finally:
        handle.remove()
    assert tiny.close(tiny.logits(result), want) and not tiny.close(want, tiny.logits(model))
    types = getattr(model.config, "layer_types", None)
    assert getattr(result.config, "layer_types", None) == (types and [types[i] for i in kept])
    assert result.config.num_hidden_layers == len(kept)
    indices = [m.layer_idx for m in blocks(result)[1].modules() if isinstance(getattr(m, "layer_idx", None), int)]
    assert sorted(set(indices)) == (list(range(len(kept))) if indices else [])


def test_a_list_as_long_as_the_model_is_not_taken_for_its_layers() -> None:
    model = tiny.model("llama", eos_token_id=[2, 5, 6])
    layout = proved_layout(model.config)
    result = cut_model(model, layout, plan_of(layout, [LayerPlan(source=0), LayerPlan(source=2)]))
    assert result.config.eos_token_id == [2, 5, 6]


# ---------------------------------------------------------------------------------------------------------------------
# On disk


def stock(path: Path, caplog: pytest.LogCaptureFixture) -> PreTrainedModel:
    """Loaded by transformers alone, which must have nothing to say about it."""
    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity_warning()
    hf_logging.enable_propagation()
    try:
        with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
            warnings.simplefilter("error")
            model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    finally:
        hf_logging.disable_propagation()
        hf_logging.set_verbosity(level)
    assert not caplog.records, caplog.text
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    return model


@pytest.mark.parametrize(("family", "structures", "shape"), WAYS)
def test_what_is_loaded_is_what_was_made(
    family: str, structures: tuple[str, ...], shape: str, pruned: Any, caplog: pytest.LogCaptureFixture
) -> None:
    _, out, memory = pruned(family, structures, shape)
    loaded = pared.load(out)
    assert tiny.equal_states(loaded, memory.model) and torch.equal(tiny.logits(loaded), tiny.logits(memory.model))
    assert Plan.load(out / "plan.json").layers == memory.plan.layers
    if shape == "per-layer":
        with pytest.raises(Exception):  # noqa: B017  (transformers' own, of several kinds; that it refuses is the law)
            AutoModelForCausalLM.from_pretrained(out)
    else:
        model = stock(out, caplog)
        assert tiny.equal_states(model, memory.model) and torch.equal(tiny.logits(model), tiny.logits(memory.model))


@pytest.mark.parametrize(("family", "structures", "shape"), WAYS)
def test_the_account_is_what_the_files_count_to(family: str, structures: tuple[str, ...], shape: str, pruned: Any) -> None:
    source, out, memory = pruned(family, structures, shape)
    plan = memory.plan
    prefix = dense(family)[1].prefix + "."
    for path, counted in ((source, plan.before), (out, plan.after)):
        sizes = {n: tiny.numel(t.shape) for n, t in Checkpoint.open(path).tensors.items()}
        assert counted.params == sum(sizes.values())
        assert counted.block_params == sum(n for name, n in sizes.items() if name.startswith(prefix))
        assert counted.params == sum(p.numel() for p in pared.load(path).parameters())
    assert plan.removed == 1 - plan.after.block_params / plan.before.block_params >= plan.requested
    assert plan.after.layers == memory.model.config.num_hidden_layers


@pytest.mark.parametrize("shape", ["uniform", "per-layer"])
@pytest.mark.parametrize("family", ATTENTION)
def test_the_account_of_the_cache_is_what_generation_holds(family: str, shape: str, pruned: Any) -> None:
    source, out, memory = pruned(family, widths(family, shape) or ("layer",), shape)
    length = tiny.WINDOW - 2  # sliding layers still hold every token
    for path, counted in ((source, memory.plan.before), (out, memory.plan.after)):
        cache = pared.load(path)(input_ids=tiny.tokens(1, length), use_cache=True).past_key_values
        held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
        assert counted.kv_cache * length == held


@pytest.mark.parametrize("family", [f for f in ATTENTION if widths(f, "uniform")])
def test_the_account_of_flops_is_what_a_forward_pass_does(family: str, pruned: Any) -> None:
    length = 8
    source, out, _ = pruned(family, widths(family, "uniform"), "uniform")
    for path in (source, out):
        model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", experts_implementation="eager")
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(input_ids=tiny.tokens(1, length), use_cache=False)
        rotary = sum(sum(ops.values()) for name, ops in counter.get_flop_counts().items() if name.endswith("rotary_emb"))
        used = getattr(model.config, "num_experts_per_tok", None)
        want = account(proved_layout(model.config), context=length, experts_used=used).flops
        assert (counter.get_total_flops() - rotary) / 2 / length == want


def test_a_shape_that_no_config_can_say_is_refused_with_the_way_out() -> None:
    model, layout = dense("gemma2")
    layers = [LayerPlan(source=i, keep={"kv": "0-2"}) for i in range(layout.num_layers)]
    with pytest.raises(ModelError, match="per-layer"):
        cut_model(model, layout, plan_of(layout, layers))


@pytest.mark.parametrize("family", [f for f in FLOOR if widths(f, "uniform")])
def test_a_fifth_comes_off_every_family_by_default(family: str) -> None:
    result = tiny.cut(dense(family)[0], remove=0.2)
    assert result.plan.removed >= 0.2 and result.plan.shape == "uniform"
    assert torch.isfinite(tiny.logits(result.model)).all()


@pytest.mark.parametrize("shape", ["uniform", "per-layer"])
@pytest.mark.parametrize("family", [f for f in FLOOR if widths(f)])
def test_what_was_pruned_can_be_pruned_again(family: str, shape: str, pruned: Any, tmp_path: Path) -> None:
    _, once, first = pruned(family, widths(family, shape) or ("layer",), shape)
    result = tiny.cut(once, out=tmp_path / "twice", shape="per-layer", structures=("ffn",), remove=0.05, seed=1)
    twice = pared.load(tmp_path / "twice")
    assert sum(p.numel() for p in twice.parameters()) == result.plan.after.params < first.plan.after.params
    assert result.plan.before == first.plan.after
    assert torch.isfinite(tiny.logits(twice)).all()
