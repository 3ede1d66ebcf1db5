"""Attention and MLPs as wholes: which parts of a block each is made of, and the proof that a block runs without it.

Nothing is known of the families here either. The parts of a block that hold heads (or FFN channels, or experts) are
replaced by stand-ins that give zeros; norms and other parts whose weights then make no difference go with them. What is
left has to give the logits of the same block with all weights of those parts at zero, with a cache and without.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from pared import modeling
from pared.accounting import account
from pared.errors import ParedError
from pared.miniature import probe_ids
from pared.per_layer import SKIP, PerLayer, skip_
from pared.plan import LayerPlan, Plan
from pared.structure import SUBLAYERS, Layout, Proof, sublayer_of
from pared.surgery import cut_model

TOLERANCE = 1e-5
Parts = dict[str, int | None]


def prove_sublayers(model: PreTrainedModel, layout: Layout) -> tuple[dict[str, Parts], dict[str, Proof]]:
    """Find and prove both kinds on a small instance: the parts of each kind that holds, and a proof of each that there is."""
    parts: dict[str, Parts] = {}
    proofs: dict[str, Proof] = {}
    for kind in SUBLAYERS:
        try:
            found = _parts(model, layout, kind)
            if not found:
                continue
            difference = _difference(model, layout, kind, found)
        except ParedError as error:
            proofs[kind] = Proof(kind, False, None, error.what, stock=False)
        except (*modeling.REJECTED, RuntimeError, IndexError, AssertionError) as error:
            said = str(error).splitlines()[0] if str(error) else ""
            proofs[kind] = Proof(kind, False, None, f"a block does not run without it: {type(error).__name__}: {said}", False)
        else:
            holds = difference <= TOLERANCE
            reason = "" if holds else f"cutting and masking differ by {difference:.1e}"
            proofs[kind] = Proof(kind, holds, difference, reason, stock=False)
            if holds:
                parts[kind] = found
    return parts, proofs


def with_sublayers(layout: Layout, parts: Mapping[str, Parts], per_layer: PerLayer) -> Layout:
    """The layout with a unit of each proved kind in every layer that has it; 0 in those that have lost it already."""
    sizes = []
    for i, own in enumerate(layout.layer_sizes):
        gone = per_layer.get(i, {}).get(SKIP, ())
        had = {kind for kind, names in parts.items() if any(part in names for part in _own(layout, kind, i))}
        sizes.append({**own, **{kind: 0 if kind in gone else 1 for kind in parts if kind in gone or kind in had}})
    return replace(layout, sublayers=dict(parts), layer_sizes=tuple(sizes))


def _own(layout: Layout, kind: str, layer: int) -> list[str]:
    """The parts of a block that hold the heads or the channels of a kind."""
    names = [n for n in layout.block_tensors(layer) if any(sublayer_of(a) == kind for a in layout.tensors[n].axes)]
    return list(dict.fromkeys(layout.local(n).split(".", 1)[0] for n in names))


def _parts(model: PreTrainedModel, layout: Layout, kind: str) -> Parts:
    """What stands for each part of the sublayer: how many things a part returned, None for one that hands its input on."""
    layers = modeling.blocks(model)[1]
    owners = {i: _own(layout, kind, i) for i in range(layout.num_layers)}
    if not any(owners.values()):
        return {}
    hidden = layout.sizes["hidden"]
    found: Parts = {}

    def see(part: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            several = isinstance(output, tuple | list)
            first = output[0] if several else output
            ends = isinstance(first, Tensor) and first.shape[-1] == hidden
            found[part] = (len(output) if several else 0) if ends else None

        return hook

    handles = [layers[i].get_submodule(p).register_forward_hook(see(p)) for i, own in owners.items() for p in own]
    try:
        _logits(model)
    finally:
        for handle in handles:
            handle.remove()
    if any(p not in found for own in owners.values() for p in own):
        raise RuntimeError("a part of it is not called as a module")
    trial = copy.deepcopy(model)
    blocks = modeling.blocks(trial)[1]
    for i, block in enumerate(blocks):
        skip_(block, {p: found[p] for p in owners[i]}, i)
    before = _logits(trial)
    for part in dict.fromkeys(n for i, own in owners.items() if own for n in blocks[i]._modules):
        holders = [b for i, b in enumerate(blocks) if owners[i] and part not in owners[i] and part in b._modules]
        weights = [p for b in holders for p in b.get_submodule(part).parameters()]
        if not weights:
            continue
        kept = [p.detach().clone() for p in weights]
        with torch.no_grad():
            for p in weights:
                p.mul_(-0.5).add_(0.3)
            if torch.equal(_logits(trial), before):
                found[part] = None
            for p, value in zip(weights, kept, strict=True):
                p.copy_(value)
    return found


def _difference(model: PreTrainedModel, layout: Layout, kind: str, parts: Parts) -> float:
    """Largest difference of logits, relative to the largest, between blocks without the sublayer and with its weights at
    zero, in the first layer (which says how many tokens a cache holds) and others, all at once and through a cache."""
    having = [i for i in range(layout.num_layers) if _own(layout, kind, i)]
    going = having[:-1] or having
    proved = with_sublayers(replace(layout, proofs={kind: Proof(kind, True, stock=False)}), {kind: parts}, {})
    layers = [LayerPlan(source=i, skip=[kind] if i in going else []) for i in range(layout.num_layers)]  # type: ignore[list-item]
    nothing = account(proved)
    plan = Plan(model_type=layout.model_type, shape="per-layer", before=nothing, after=nothing, layers=layers)
    cut = cut_model(model, proved, plan)
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for i in going:
            block = modeling.blocks(masked)[1][i]
            for part in _own(layout, kind, i):
                for p in block.get_submodule(part).parameters():
                    p.zero_()
    want = _logits(masked)
    off = max(float((got - want).abs().max()) for got in (_logits(cut), _cached(cut)))
    return off / max(1.0, float(want.abs().max()))


@torch.no_grad()
def _logits(model: PreTrainedModel) -> Tensor:
    return model(input_ids=probe_ids(), use_cache=False).logits


@torch.no_grad()
def _cached(model: PreTrainedModel) -> Tensor:
    """The same logits, the last tokens one by one through a cache."""
    ids = probe_ids()
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    cache, logits = DynamicCache(config=model.config), []
    for part in (ids[:, :-2], ids[:, -2:-1], ids[:, -1:]):
        logits.append(model(input_ids=part, use_cache=True, **{name: cache}).logits)
    return torch.cat(logits, 1)
