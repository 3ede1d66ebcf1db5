"""Proof of a layout: on a tiny random instance of the model's class, removing structures gives the logits of masking them."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel

from pared import modeling
from pared.accounting import account
from pared.axes import Name, Nested, indices
from pared.discovery import Discovered, assemble, discover
from pared.errors import ModelError, ParedError
from pared.miniature import check_logits, probe_ids, random_model
from pared.per_layer import PerLayer
from pared.plan import LayerPlan, Plan, layer_plan, to_ranges
from pared.routing import restricted
from pared.structure import Layout, Proof, with_signatures
from pared.sublayers import prove_sublayers, with_sublayers
from pared.surgery import ConfigRefuses, cut_model, fill, mask_

TOLERANCE = 1e-5


def proved_layout(config: PreTrainedConfig, per_layer: PerLayer | None = None) -> Layout:
    """The layout of a model with this config, each of its axes proved or refused with the reason."""
    key = json.dumps(config.to_dict(), sort_keys=True, default=str), json.dumps(per_layer or {}, sort_keys=True)
    return _proved(config.model_type, *key)


@lru_cache(maxsize=32)
def _proved(model_type: str, config_text: str, per_layer_text: str) -> Layout:
    config, _ = modeling.make_config({**json.loads(config_text), "model_type": model_type})
    per_layer = {int(k): v for k, v in json.loads(per_layer_text).items()}
    layout, found = discover(config, per_layer)
    chosen, proofs = prove(found)
    fixed = layout.before_another_kind() if proofs["layer"].tail else frozenset()
    model = random_model(found.config)
    if len(fixed) > layout.num_layers // 2:  # kinds take turns: all may go in the per-layer form
        base = with_signatures(assemble(found.config, {}, found, model), chosen)
        if (form := _tried(model, base, "layer", found, stock=False)).holds:
            proofs["layer"], fixed = form, frozenset()
    layout = replace(with_signatures(layout, chosen), proofs=proofs, fixed_layers=layout.fixed_layers | fixed)
    parts, whole = prove_sublayers(model, with_signatures(assemble(found.config, {}, found, model), chosen))
    return with_sublayers(replace(layout, proofs=proofs | whole), parts, per_layer)


def prove(found: Discovered) -> tuple[dict[tuple[str, str], str], dict[str, Proof]]:
    """Prove every axis of a tiny instance. Gives the signatures chosen among the candidates, and a proof for each axis."""
    model = random_model(found.config)
    base = assemble(found.config, {}, found, model)
    options: dict[tuple[str, str], list[str]] = {}
    for name, texts in found.candidates.items():
        if base.layer_of(name) is not None and len(texts) > 1:
            options[base.local(name), texts[0]] = texts
    chosen: dict[tuple[str, str], str] = {}
    proofs: dict[str, Proof] = {}
    for axis in prunable_axes(base):
        undecided = {n: t for n, t in options.items() if n not in chosen and any(axis in x for x in t)}
        attempts: list[Proof] = []
        for combination in itertools.product(*undecided.values()):
            trial = {**chosen, **dict(zip(undecided, combination, strict=True))}
            attempts.append(_attempt(model, with_signatures(base, trial), axis, found))
            if attempts[-1].holds:
                chosen = trial
                break
        best = min(attempts, key=lambda p: (not p.holds, p.difference if p.difference is not None else float("inf")))
        if not best.holds and len(attempts) > 1:
            best = replace(best, reason=f"{best.reason}; {len(attempts)} layouts tried")
        proofs[axis] = best
    if not attends(model):  # heads of a recurrence are none that pared knows how to remove
        proofs = {a: p for a, p in proofs.items() if p.holds or a not in ("kv", "query")}
    if _writers(base) < 2 and "ffn" in proofs and not proofs["ffn"].holds and "ffn" not in found.keys:
        del proofs["ffn"]  # something that looked like one, in blocks that have nothing beside a mixer
    if _writers(base) > 1 and not any(a.endswith("ffn") for a in proofs):
        proofs["ffn"] = Proof("ffn", False, None, "no dimension was found that is the channels of its MLPs alone")
    return chosen, proofs


def attends(model: PreTrainedModel) -> bool:
    """Whether a model has softmax attention: it calls torch's, or a softmax over [batch, heads, queries, keys]."""
    seen: list[bool] = []

    class Look(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
            soft = func in (F.softmax, torch.softmax, Tensor.softmax) and args[0].ndim > 3
            seen.append(soft or func is F.scaled_dot_product_attention)
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Look():
        model(input_ids=probe_ids(), use_cache=False)
    return any(seen)


def _writers(layout: Layout) -> int:
    """How many matrices of a block, or stacks of them, write into the residual stream: one where there is only a mixer."""

    def writes(name: str) -> bool:
        dim = layout.consumers.get(name)
        return (
            dim is not None and Name("hidden") in layout.tensors[name].dims and layout.tensors[name].dims[dim] != Name("hidden")
        )

    return max(sum(writes(n) for n in layout.block_tensors(i)) for i in range(layout.num_layers))


def prunable_axes(layout: Layout) -> list[str]:
    """The axes that pared knows how to remove units of and that this model has more than one unit of."""
    inside = set().union(*(layout.tensors[n].axes for i in range(layout.num_layers) for n in layout.block_tensors(i)))
    most = {a: max(s.get(a, 0) for s in layout.layer_sizes) for a in inside}
    widths = sorted(a for a in inside if a.endswith("ffn"))
    return [*(a for a in ("kv", "query", *widths, "expert") if most.get(a, 0) > 1), "hidden", "layer", "vocab"]


def _attempt(model: PreTrainedModel, layout: Layout, axis: str, found: Discovered) -> Proof:
    """Prove one axis as a stock config says it, or else in the per-layer form."""
    first = _tried(model, layout, axis, found, stock=True)
    if first.holds or axis == "vocab":
        return first
    if axis == "layer":
        fixed = layout.fixed_layers | layout.before_another_kind()
        second = (
            _tried(model, replace(layout, fixed_layers=fixed), axis, found, stock=True)
            if fixed > layout.fixed_layers
            else first
        )
        if second.holds:
            return replace(second, tail=True)
        third = _tried(model, layout, axis, found, stock=False)
        return third if third.holds else first
    second = _tried(model, layout, axis, found, stock=False)
    # Where no config says the sizes, what the other form fails on is the reason.
    return second if second.holds or first.difference is None else first


def _tried(model: PreTrainedModel, layout: Layout, axis: str, found: Discovered, *, stock: bool) -> Proof:
    if axis == "hidden":
        for name, why in found.unexplained.items():
            # In the per-layer form a block is made with the sizes that it had, whatever they follow from.
            if stock or layout.layer_of(name) is None:
                return Proof(axis, False, None, why, stock)
    layout = replace(layout, proofs={axis: Proof(axis, True, stock=stock)})
    try:
        difference = max(_differences(model, layout, axis, stock=stock))
    except ParedError as error:
        return Proof(axis, False, None, error.what, stock)
    except (*modeling.REJECTED, RuntimeError, IndexError, AssertionError) as error:
        return Proof(axis, False, None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", stock)
    if difference <= TOLERANCE:
        return Proof(axis, True, difference, "", stock)
    return Proof(axis, False, difference, f"cutting and masking differ by {difference:.1e}", stock)


def _differences(model: PreTrainedModel, layout: Layout, axis: str, *, stock: bool) -> list[float]:
    """What cutting and masking differ by in each trial: of layers, with one of every kind removed."""
    found: list[float] = []
    refused: ModelError | None = None
    for going in _one_of_each(layout) if axis == "layer" else [None]:
        plan = trial_plan(layout, axis, going)
        if not stock:
            plan = plan.model_copy(update={"shape": "per-layer"})
        try:
            cut = cut_model(model, layout, plan)
        except ConfigRefuses as error:  # it can not do without this layer, its only one with attention
            refused = error
            continue
        found.append(compare(model, cut, layout, plan, axis))
    if refused is not None and not found:
        raise refused
    return found


def trial_plan(layout: Layout, axis: str, going: int | None = None) -> Plan:
    """A random part of the units of one axis removed, others in every layer, and of the axes whose sizes hang on it.

    going: of layers, the one that is removed.

    Raises ModelError where none can go.
    """
    generator = torch.Generator().manual_seed(1)

    def some(n: int, kept: int, runs: int = 1) -> Tensor:
        rows = [torch.randperm(n // runs, generator=generator)[: kept // runs] + r * (n // runs) for r in range(runs)]
        return torch.cat(rows).sort().values

    leader = layout.follows.get(axis, (axis, 1))[0]
    members = {leader: 1, **{a: factor for a, (of, factor) in layout.follows.items() if of == leader}}
    runs = layout.runs.get(axis, 1)

    layers = [LayerPlan(source=i) for i in range(layout.num_layers)]
    hidden = vocab = None
    if axis == "vocab":
        vocab = to_ranges(some(layout.sizes["vocab"], layout.sizes["vocab"] * 3 // 4).tolist())
    elif axis == "layer":
        going = _one_of_each(layout)[0] if going is None else going
        layers = [layer for layer in layers if layer.source != going]
    elif axis == "hidden":
        hidden = to_ranges(some(layout.sizes["hidden"], layout.sizes["hidden"] * 3 // 4).tolist())
    else:
        for i, layer in enumerate(layers):
            sizes = layout.sizes_at(layer.source)
            picked: dict[str, Tensor | Nested] = {}
            for member, factor in members.items():
                if (n := sizes.get(member)) is None:
                    continue
                one = n // factor
                kept = factor * (one - runs * max(1, one // runs // 4))
                if kept < layout.least.get(member, 1):
                    raise ModelError(f"none of {n} can go: {layout.least[member]} have to stay")
                parent = layout.parents.get(member)
                if parent is None:
                    picked[member] = some(n, kept, runs)
                else:
                    picked[member] = Nested(parent, torch.stack([some(n, kept) for _ in range(sizes[parent])]))
            layers[i] = layer_plan(i, picked, sizes)
    nothing = account(layout)
    return Plan(model_type=layout.model_type, before=nothing, after=nothing, hidden=hidden, vocab=vocab, layers=layers)


def _one_of_each(layout: Layout) -> list[int]:
    """Layers that can go: of each kind the first from the middle on, and the first and the last of all."""
    able = [i for i in range(layout.num_layers) if i not in layout.fixed_layers]
    kinds: dict[tuple[str, ...], int] = {}
    for i in sorted(able, key=lambda i: (i < layout.num_layers // 2, i)):
        kinds.setdefault(tuple(layout.local(n) for n in layout.block_tensors(i)), i)
    if not able:
        raise ModelError("no layer can go: others read from each of them")
    return list(dict.fromkeys([*kinds.values(), able[-1], able[0]]))


def compare(dense: PreTrainedModel, cut: PreTrainedModel, layout: Layout, plan: Plan, axis: str) -> float:
    """Largest difference between the logits of the cut model and of its masked reference, relative to the largest logit."""
    kept = plan.selection(None, layout).get("vocab")
    vocab = torch.arange(layout.sizes["vocab"]) if not isinstance(kept, Tensor) else kept
    # Tokens by their new ids; of a vocabulary that is cut, only those that stay have one.
    new = probe_ids() % len(vocab)
    reference = modeling.skeleton(dense.config, dtype=torch.float32)
    tied = set(getattr(dense, "all_tied_weights_keys", {}) or {})
    fill(reference, {k: v for k, v in dense.state_dict().items() if k not in tied})
    modeling.fill_buffers(reference, reference)
    removed: dict[int, Tensor] = {}
    if axis == "layer":
        _skip_layers(reference, layout, plan)
    elif axis != "vocab":
        mask_(reference, layout, plan)
        _restrict_norms(reference, cut, layout, plan)
        removed = _removed_experts(layout, plan)
    with torch.no_grad(), restricted(reference, layout, removed):
        want = reference(input_ids=vocab[new], use_cache=False).logits[..., vocab]
        got = cut(input_ids=new, use_cache=False).logits
    check_logits(want)
    return float((want - got).abs().max() / want.abs().max().clamp(min=1.0))


def _removed_experts(layout: Layout, plan: Plan) -> dict[int, Tensor]:
    """Layer of the dense model -> the experts that a plan removes there."""
    out: dict[int, Tensor] = {}
    for i, layer in enumerate(plan.layers):
        kept = plan.selection(i, layout).get("expert")
        if isinstance(kept, Tensor):
            gone = torch.ones(layout.sizes_at(layer.source)["expert"], dtype=torch.bool)
            gone[kept] = False
            out[layer.source] = gone.nonzero()[:, 0]
    return out


def _skip_layers(model: PreTrainedModel, layout: Layout, plan: Plan) -> None:
    _, layers = modeling.blocks(model)
    for i in set(range(layout.num_layers)) - {layer.source for layer in plan.layers}:
        original = layers[i].forward

        def skip(*args: Any, _original: Callable[..., Any] = original, **kwargs: Any) -> Any:
            out = _original(*args, **kwargs)
            entered = args[0] if args else kwargs["hidden_states"]
            if not isinstance(out, tuple | list):
                return entered
            # A state that blocks hand on beside the hidden states goes past as well.
            passed = [
                a if isinstance(a, Tensor) and isinstance(o, Tensor) and a.shape == o.shape else o
                for a, o in zip(args[1:], out[1:], strict=False)
            ]
            return (entered, *passed, *out[1 + len(passed) :])

        layers[i].forward = skip


def _restrict_norms(reference: PreTrainedModel, cut: PreTrainedModel, layout: Layout, plan: Plan) -> None:
    """Norms over a cut axis renormalise: in the reference they see the kept channels only, as in the cut model.

    Their weights are the dense model's own: a cut model may carry a factor in one norm that it undoes elsewhere.
    Everything around them stays masked, so the proof still covers every other tensor.
    """
    where = {layer.source: i for i, layer in enumerate(plan.layers)}
    for name, module in reference.named_modules():
        if "norm" not in type(module).__name__.lower() or any(True for _ in module.children()):
            continue
        own = dict(module.named_parameters(recurse=False, prefix=name))
        layer = layout.layer_of(name + ".")
        if any(p.ndim != 1 for p in own.values()):
            continue
        signature = layout.tensors[next(iter(own))] if own else None
        keep = plan.selection(None if layer is None else where[layer], layout)
        sizes = layout.sizes_at(layer)
        if signature is not None:
            kept = indices(signature.dims[0], sizes, keep, own[next(iter(own))].shape[0])
        else:
            kept = keep.get("hidden") if isinstance(keep.get("hidden"), Tensor) else None  # type: ignore[assignment]
        if kept is not None:
            place = name if layer is None else f"{layout.prefix}.{where[layer]}.{layout.local(name)}"
            twin = copy.deepcopy(cut.get_submodule(place))
            with torch.no_grad():
                for leaf, p in twin.named_parameters(recurse=False):
                    p.copy_(own[f"{name}.{leaf}"][kept])
            full = own[next(iter(own))].shape[0] if own else layout.sizes["hidden"]
            _see_only(module, twin, kept, full)


def _see_only(module: nn.Module, twin: nn.Module, kept: Tensor, full: int) -> None:
    original = module.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if x.shape[-1] != full:  # a norm without weights, over something else
            return original(x, *args, **kwargs)
        out = torch.zeros_like(x)
        out[..., kept] = twin(x[..., kept], *args, **kwargs)
        return out

    module.forward = forward
