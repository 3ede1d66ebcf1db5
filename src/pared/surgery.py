"""Cutting: slice tensors as the plan says, rewrite the config, rebuild the model from its own classes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from pared import modeling
from pared.axes import Selection, indices, names, parse, size, take, zero_
from pared.discovery import miniature_of
from pared.errors import ModelError
from pared.families import STAND_INS
from pared.per_layer import BIASES, NUMBERS, PER_LAYER, SHAPES, SKIP, SKIPPED, UNCHECKED, PerLayer, make_block
from pared.per_layer import HEADS as KEPT_HEADS
from pared.plan import Plan, kept_sizes
from pared.scales import at_hidden, last_norm
from pared.structure import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    Layout,
    block_entries,
    config_entries,
    raw_key,
    resize,
    size_key,
    sizes_of,
    with_layers,
)
from pared.vocabulary import remap_ids

# Reads tensors by name; and the same, of a model in another basis.
Read = Callable[[str], Tensor]
Turned = Callable[[Read], Read]


class ConfigRefuses(ModelError):
    """The validators of a config class do not accept the sizes."""


def target_config(layout: Layout, config: PreTrainedConfig, plan: Plan) -> tuple[PreTrainedConfig, PerLayer]:
    """The config that says what the plan leaves, and its per-layer entries (empty for a uniform shape).

    Raises ModelError where the family's config, or that of a family with the same block, can not say it.
    """
    shapes = [{a: n for a, n in plan.sizes(i, layout).items() if a not in layout.sizes} for i in range(len(plan.layers))]
    together = {a: n for s in shapes for a, n in s.items()}
    shared = kept_sizes(plan.selection(None, layout))
    if layout.sizes["hidden"] != getattr(config, HIDDEN):
        shared.setdefault("hidden", layout.sizes["hidden"])  # lost before, past the validators of the class
    sources = [layer.source for layer in plan.layers]
    data = with_layers(config, config_entries(config), sources)
    if (new := plan.numbering(layout)) is not None:
        data = remap_ids(data, new, "config.json")
    if plan.rotated:
        data["tie_word_embeddings"] = False
    if said := {int(i): e for i, e in (data.get(PER_LAYER) or {}).items()}:  # of families that say it by themselves
        data[PER_LAYER] = {i: said[source] for i, source in enumerate(sources) if source in said}
    changed = {a for i, own in enumerate(shapes) for a in own if own[a] != layout.layer_sizes[sources[i]].get(a)}
    axes = changed | shared.keys() | ({"layer"} if len(sources) < layout.num_layers else set())
    stock = all(layout.proofs[a].stock for a in axes if a in layout.proofs) and not layout.numbers and not layout.biases
    stock = stock and layout.sizes["hidden"] == getattr(config, HIDDEN)
    stock = stock and all(own.get(kind) != 0 for own in shapes for kind in layout.sublayers)
    if getattr(config, "is_heterogeneous", False):
        together = {a: n for a, n in together.items() if a in changed}  # what else they differ in is the family's own way
    if stock and all(together[a] == n for s in shapes for a, n in s.items() if a in together):
        # The layers' own sizes say what a config leaves open; where it says a size, that is what may have to change.
        dense = {a: n for i in sources for a, n in layout.layer_sizes[i].items()} | sizes_of(config, layout.keys)
        try:
            changes = resize(config, layout.keys, {**_changed(together, dense), **shared})
            return _build(config, {**data, **changes}), {}
        except ModelError:
            if plan.shape == "uniform":
                raise
    elif not stock and plan.shape == "uniform":
        raise ModelError(f"a {config.model_type} config can not say these sizes", fix="--shape per-layer")
    changes = resize(config, layout.keys, shared)
    if shared and "d" not in layout.keys and "d" in shapes[0] and not getattr(config, HEAD_DIM, None):
        changes[HEAD_DIM] = shapes[0]["d"]  # rotary tables outside of the blocks would follow the hidden size
    try:
        target, unchecked = _build(config, {**data, **changes}), {}
    except ModelError:
        # The class ties the hidden size to inner widths. Blocks have those for themselves, so it need not be told.
        if raw_key(config, HIDDEN) not in changes:
            raise
        said, used = getattr(config, HIDDEN), changes.pop(raw_key(config, HIDDEN))
        target, unchecked = _build(config, {**data, **changes}), {raw_key(config, HIDDEN): [said, used]}
        setattr(target, HIDDEN, used)
    entries: PerLayer = {}
    numbered = _numbers_entry(layout, sources) if "layer" in axes or layout.numbers else None
    hidden = layout.block_hidden or (layout.sizes["hidden"] if "hidden" in shared else None)
    for i, sizes in enumerate(shapes):
        own = block_entries(config, layout.keys, sizes, hidden)
        entries[i] = {k: v for k, v in own.items() if v != getattr(target, k, None)}
        entries[i] |= _heads_entry(layout, config, sources[i], plan.selection(i, layout))
        entries[i] |= _skip_entry(layout, config, sizes) | _biases_entry(layout, sources[i], sizes)
        if numbered:
            entries[i][NUMBERS] = numbered
        if unchecked:
            entries[i][UNCHECKED] = unchecked
    _say_apart(layout, target, entries)
    _add_shapes(layout, plan, target, entries)
    return target, {i: own for i, own in entries.items() if own}


def _numbers_entry(layout: Layout, sources: list[int]) -> dict[str, Any] | None:
    """The numbers that layers are made as, where their class derives something from them."""
    if not layout.numbers and layout.proofs["layer"].stock:
        return None
    before = layout.numbers or tuple(range(layout.num_layers))
    return {"of": layout.numbered_of or layout.num_layers, "numbers": [before[i] for i in sources]}


def _heads_entry(layout: Layout, config: PreTrainedConfig, source: int, keep: Selection) -> dict[str, Any]:
    """Which heads a block keeps, by their index in the model as it was first, where arguments have an entry for each."""
    if not layout.head_arguments:
        return {}
    sizes, total = layout.sizes_at(source), getattr(config, HEADS)
    at = indices(parse("(kv query)").dims[0], sizes, keep, sizes["kv"] * sizes["query"])
    before = layout.kept_heads.get(source) or list(range(total))
    kept = before if at is None else [before[h] for h in at.tolist()]
    return {} if len(kept) == total else {KEPT_HEADS: {"kept": kept, "of": total, "arguments": layout.head_arguments}}


def _skip_entry(layout: Layout, config: PreTrainedConfig, sizes: Mapping[str, int]) -> dict[str, Any]:
    """The sublayers that a block does without, and which parts of it they are.

    Their sizes are said to be 0 too: a model that does not read `skip` then refuses to be built, rather than invent weights.
    """
    gone = [kind for kind in layout.sublayers if sizes.get(kind) == 0]
    axes = {"attention": ["kv", "query"], "mlp": [a for a in layout.keys if a.endswith("ffn") and a in sizes]}
    said = [size_key(config, layout.keys.get(a, HEADS if a == "query" else ""))[0] for kind in gone for a in axes[kind]]
    zero = {raw_key(config, key): 0 for key in said if key}
    return {SKIP: gone, SKIPPED: {kind: layout.sublayers[kind] for kind in gone}, **zero} if gone else {}


def _biases_entry(layout: Layout, source: int, sizes: Mapping[str, int]) -> dict[str, Any]:
    """The matrices of a block that have a bias of the per-layer form, as far as the block has them."""
    names = [f"{layout.prefix}.{source}.{n}" for n in layout.biases.get(source, ())]
    stay = [layout.local(n) for n in layout.remaining(names, sizes)]
    return {BIASES: stay} if stay else {}


def _say_apart(layout: Layout, target: PreTrainedConfig, entries: PerLayer) -> None:
    """Have a stock model refuse layers that differ from its own by nothing but biases, which it would leave out unsaid.

    It refuses what layers say otherwise than the model does: so the model says another size than all of them.
    """
    if not any(BIASES in own for own in entries.values()) or any(k in target.to_dict() for e in entries.values() for k in e):
        return
    widths = [k for a, k in layout.keys.items() if a.endswith("ffn")]
    if not widths:
        raise ModelError(f"a {target.model_type} config has no size by which to say that its layers have biases of their own")
    key = raw_key(target, size_key(target, widths[0])[0])
    said = getattr(target, key)
    for own in entries.values():
        own[key] = said
    setattr(target, key, 2 * said)


def rebuilt(
    block: nn.Module, model: PreTrainedModel, layout: Layout, layer: int, keep: Selection, tensors: Mapping[str, Tensor]
) -> nn.Module:
    """A block of the class of `block`, cut: made from its own config and given these tensors, by their name inside it."""
    config = model.config
    sizes = {**layout.sizes_at(layer), **kept_sizes(keep)}
    entries = {**block_entries(config, layout.keys, sizes, layout.block_hidden), **_heads_entry(layout, config, layer, keep)}
    entries |= _skip_entry(layout, config, sizes) | _biases_entry(layout, layer, sizes)
    stays = layout.remaining([f"{layout.prefix}.{layer}.{n}" for n in tensors], sizes)
    tensors = {n: tensors[n] for n in map(layout.local, stays)}
    if numbered := _numbers_entry(layout, list(range(layout.num_layers))) if layout.numbers else None:
        entries[NUMBERS] = numbered
    entries[SHAPES] = {n: tuple(t.shape) for n, t in tensors.items()}
    with torch.device("meta"):
        made = make_block(block, config, layer, entries)
    for name, value in tensors.items():
        owner, _, leaf = name.rpartition(".")
        part = made.get_submodule(owner)
        if leaf in part._parameters:
            part._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        else:
            part._buffers[leaf] = value
    modeling.fill_buffers(model, made, next(block.parameters()).device)
    return made


def _add_shapes(layout: Layout, plan: Plan, target: PreTrainedConfig, entries: PerLayer) -> None:
    """Note the tensors whose shape is another than the block's class gives them under the layer's config."""
    made = modeling.skeleton(target, entries)
    _, layers = modeling.blocks(made)
    for i, layer in enumerate(plan.layers):
        got = {n: tuple(p.shape) for n, p in layers[i].state_dict().items()}
        sizes = plan.sizes(i, layout)
        wanted = {}
        for name in layout.block_tensors(layer.source):
            dims = zip(layout.tensors[name].dims, layout.shapes[name], strict=True)
            shape = tuple(n if not names(node) else size(node, sizes) or n for node, n in dims)
            if got.get(layout.local(name)) not in (None, shape):
                wanted[layout.local(name)] = shape
        if wanted:
            entries[i][SHAPES] = wanted


def written_as(layout: Layout, config: PreTrainedConfig, sizes: Mapping[str, int], hidden: int | None) -> str | None:
    """The model type whose config can say a uniform shape: the family's own, a stand-in's, or None."""
    now = {a: n for a, n in sizes.items() if any(n != own[a] for own in layout.layer_sizes if a in own)}
    now |= {} if hidden is None else {"hidden": hidden}
    if not all(layout.proofs[a].stock for a in now if a in layout.proofs):
        return None
    try:
        return str(_build(config, {**config.to_dict(), **resize(config, layout.keys, now)}).model_type)
    except ModelError:
        return None


def _changed(sizes: Mapping[str, int], dense: Mapping[str, int]) -> dict[str, int]:
    changed = {a: n for a, n in sizes.items() if n != dense[a]}
    if changed.keys() & {"kv", "query"}:
        changed |= {a: sizes[a] for a in ("kv", "query") if a in sizes}
    return changed


def _build(config: PreTrainedConfig, data: dict[str, Any]) -> PreTrainedConfig:
    try:
        return type(config).from_dict(data)
    except modeling.REJECTED as error:
        stand_in = STAND_INS.get(config.model_type)
        if stand_in is None or any(getattr(config, flag, False) for flag in stand_in.unless):
            raise ConfigRefuses(
                f"a {config.model_type} config can not say these sizes: {error}",
                fix="choose another amount, or --shape per-layer",
            ) from error
        data = {**data, **stand_in.set, "model_type": stand_in.model_type, "architectures": [stand_in.architecture]}
        return CONFIG_MAPPING[stand_in.model_type].from_dict(data)


def new_name(layout: Layout, name: str, layer: int) -> str:
    """A block tensor's name after its block has become number `layer`."""
    return f"{layout.prefix}.{layer}.{layout.local(name)}"


def cut_block(
    layout: Layout, plan: Plan, layer: int, read: Callable[[str], Tensor], changed: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The tensors of the result's block `layer`, by their new names, cut from what `read` gives for the old ones.

    changed: tensors, cut already, that take the place of some, by their name inside the block.
    """
    source = plan.layers[layer].source
    keep, sizes = plan.selection(layer, layout), layout.sizes_at(source)
    out: dict[str, Tensor] = {}
    for name in layout.remaining(layout.block_tensors(source), plan.sizes(layer, layout)):
        if name not in layout.tied:
            new = (changed or {}).get(layout.local(name))
            old = read(name)
            value = take(old, layout.tensors[name], sizes, keep) if new is None else new.to(old.dtype)
            out[new_name(layout, name, layer)] = value
    return out


def cut_outside(layout: Layout, plan: Plan, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """The tensors outside of the blocks, cut."""
    keep = plan.selection(None, layout)
    names = [n for n in layout.tensors if layout.layer_of(n) is None and n not in layout.tied]
    return {n: take(read(n), layout.tensors[n], layout.sizes, keep) for n in names}


def keep_scale(
    result: PreTrainedModel, layout: Layout, config: PreTrainedConfig, state: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Tensors outside of the blocks, changed so that scales which follow from the hidden size make no difference.

    config: of the model that is cut. The embeddings take up the ratio of their scales; where the head shares them, the
    last norm takes it back, and it takes up the ratio of what stands between it and the head.
    """
    new, old = getattr(result.config, HIDDEN), layout.sizes["hidden"]
    if not layout.scales_follow_hidden or new == old:
        return state
    small = miniature_of(config)
    before, after = at_hidden(small, old), at_hidden(small, new)
    ratio = before.embeddings / after.embeddings
    embedding = next(n for n, m in result.named_modules() if m is result.get_input_embeddings()) + ".weight"
    out = {**state, embedding: (state[embedding].double() * ratio).to(state[embedding].dtype)}
    outward = before.head / after.head / (ratio if layout.tied else 1.0)
    if outward != 1.0:
        if (norm := last_norm(result)) is None:
            raise ModelError("the scale of the logits follows the hidden size, and no last norm can make up for it")
        offset = norm_offset(result.get_submodule(norm))
        for leaf, at_rest in (("weight", offset), ("bias", 0.0)):
            if (name := f"{norm}.{leaf}") in state:
                out[name] = ((state[name].double() + at_rest) * outward - at_rest).to(state[name].dtype)
    return out


def norm_offset(norm: nn.Module) -> float:
    """What a norm adds to its weight before multiplying: 1 for Gemma's, 0 for the others."""
    probe = copy.deepcopy(norm).to_empty(device="cpu").float()
    with torch.no_grad():
        for p in probe.parameters():
            p.zero_()
        return 0.0 if bool((probe(torch.ones(1, p.numel())) == 0).all()) else 1.0


def cut_model(model: PreTrainedModel, layout: Layout, plan: Plan) -> PreTrainedModel:
    """The pruned model, made in memory; the given one is left as it is."""
    return cut_refitted(model, layout, plan, None)[0]


def cut_refitted(
    model: PreTrainedModel,
    layout: Layout,
    plan: Plan,
    refitted: Iterator[Any] | None,
    turned: Turned = lambda read: read,
) -> tuple[PreTrainedModel, Plan]:
    """The same with blocks that were refitted, and the plan with the units that they kept. refitted, turned: as in
    output.write_pruned."""
    plan.check(layout)
    read = turned(model.state_dict().__getitem__)
    cut = cut_outside(layout, plan, read)
    for i in range(len(plan.layers)):
        done = next(refitted) if refitted is not None else None
        if done is not None:
            plan = plan.with_layer(i, done.layer)
        cut.update(cut_block(layout, plan, i, read, done.tensors if done is not None else None))
    config, _ = modeling.make_config(model.config.to_dict())
    return assemble(config, layout, plan, cut, generation_config=model.generation_config), plan


def assemble(
    config: PreTrainedConfig, layout: Layout, plan: Plan, state: Mapping[str, Tensor], *, generation_config: Any = None
) -> PreTrainedModel:
    """A model from cut tensors. Raises ModelError where its classes, built from the new config, want other shapes."""
    target, per_layer = target_config(layout, config, plan)
    result = modeling.skeleton(target, per_layer, dtype=next(iter(state.values())).dtype)
    state = keep_scale(result, layout, config, dict(state))
    fill(result, state, frozen=False)
    modeling.fill_buffers(result, result, next(iter(state.values())).device)
    if generation_config is not None and result.can_generate():
        if (new := plan.numbering(layout)) is not None:
            generation_config = type(generation_config).from_dict(
                remap_ids(generation_config.to_dict(), new, "generation_config")
            )
        result.generation_config = generation_config
    return result


def fill(model: PreTrainedModel, state: Mapping[str, Tensor], *, frozen: bool = True) -> None:
    """Assign tensors to a model on the meta device, each under its own name, private copies of none."""
    wanted = model.state_dict()
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    if odd := [n for n in wanted.keys() ^ state.keys() if n not in tied]:
        raise ModelError(f"the model built from the new config and the cut tensors disagree on {sorted(odd)[0]}")
    for name, tensor in state.items():
        if tuple(wanted[name].shape) != tuple(tensor.shape):
            raise ModelError(
                f"the config can not express this shape: {name} is {list(tensor.shape)}, "
                f"its class makes {list(wanted[name].shape)}",
                fix="choose other structures",
            )
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if leaf in module._parameters:
            grad = tensor.is_floating_point() and not frozen
            module._parameters[leaf] = nn.Parameter(
                tensor.detach().clone(memory_format=torch.contiguous_format), requires_grad=grad
            )
        else:
            module._buffers[leaf] = tensor.clone()
    model.tie_weights()


def mask_(model: PreTrainedModel, layout: Layout, plan: Plan) -> None:
    """Set every removed entry of the named axes to zero, in place: what cutting must be equal to (layers aside)."""
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    for i, layer in enumerate(plan.layers):
        keep = plan.selection(i, layout)
        _zero(layout, layout.block_tensors(layer.source), state, layout.sizes_at(layer.source), keep)
    outside = [n for n in layout.tensors if layout.layer_of(n) is None]
    _zero(layout, outside, state, layout.sizes, plan.selection(None, layout))


def _zero(layout: Layout, names: Iterable[str], state: Mapping[str, Tensor], sizes: Mapping[str, int], keep: Selection) -> None:
    for name in names:
        if name in layout.tied or name not in state:
            continue
        with torch.no_grad():
            zero_(state[name], layout.tensors[name], sizes, keep)
