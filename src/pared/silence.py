"""What falls silent with a unit: structure seen in gradients instead of in shapes.

When the columns of a consumer (o_proj, down_proj) that read one unit are set to zero, nothing that only serves this unit
can change the logits any more: its gradients become exactly zero. So the rows of q, k and v that belong to a head show
up, interleaved as they may be, also where heads and hidden size are tied in the config and shapes can not tell them apart.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from pared import modeling
from pared.axes import Signature, coordinates, names, parse, size
from pared.errors import ModelError
from pared.miniature import Miniature, probe_ids, random_model
from pared.per_layer import blocks
from pared.structure import HEADS, Layout, raw_key

# (tensor, dimension) -> the texts that it may have.
Tied = dict[tuple[str, int], list[str]]
_HEADS = [
    parse(t)
    for t in ("(kv query d)", "(kv d)", "[kv query d | kv d | kv d]", "(kv [query d | d | d])", "[kv d | kv d]", "(kv 2 d)")
]
_FFN = [parse(t) for t in ("ffn", "[ffn | ffn]", "(ffn 2)")]
_THREE = "[hidden | hidden | hidden]"
_HIDDEN, _UNKNOWN = parse("hidden").dims[0], parse("_").dims[0]


def tied_axes(config: PreTrainedConfig, layout: Layout, candidates: Mapping[str, list[str]]) -> Tied:
    """What can be said of dimensions that shapes leave open, in the random instance of `config`, whose layout this is.

    Where heads have no size of their own in the config, every hidden-sized dimension may hold heads. An FFN whose width
    no key of the config says is found here too, as the axis "ffn".
    """
    model = random_model(config)
    out: Tied = {}
    seen: set[tuple[str, ...]] = set()
    for i in range(layout.num_layers):
        held, sizes = layout.block_tensors(i), layout.sizes_at(i)
        kind = tuple(layout.local(n) for n in held)
        if kind in seen:
            continue
        seen.add(kind)
        probe = _Probe(model, layout, i)
        for name in [n for n in held if n in layout.consumers and len(layout.shapes[n]) == 2]:
            dim = layout.consumers[name]
            if layout.tensors[name].dims[1 - dim] != _HIDDEN:
                continue  # what reads heads or FFN channels writes to the residual stream
            node, heads = layout.tensors[name].dims[dim], size(_HEADS[0].dims[0], sizes) if "kv" in sizes else None
            if node == _HIDDEN and layout.shapes[name][dim] == heads and max(sizes["kv"], sizes["query"]) > 1:
                _find_heads(probe, name, dim, out)
            if node == _UNKNOWN and "ffn" not in layout.keys:
                _find_ffn(probe, name, dim, out)
            if node == _HEADS[0].dims[0] and layout.sizes["hidden"] == heads:
                _find_norms(probe, name, dim, out)
    # What was found in one layer holds in every layer of its kind.
    for (name, dim), texts in list(out.items()):
        for j in range(layout.num_layers) if layout.layer_of(name) is not None else ():
            twin = f"{layout.prefix}.{j}.{layout.local(name)}"
            if layout.shapes.get(twin) == layout.shapes[name]:
                out.setdefault((twin, dim), texts)
    if "d" not in layout.keys:
        _rest(layout, candidates, out)
    return out


class _Probe:
    """Gradients of one block's tensors, as they are and with some columns silenced."""

    def __init__(self, model: PreTrainedModel, layout: Layout, layer: int) -> None:
        self.layout, self.layer, self.model = layout, layer, model
        named = dict(model.named_parameters())
        self.parameters = {n: named[n] for n in layout.block_tensors(layer) if n in named and named[n].is_floating_point()}
        self.alive = {n: g != 0 for n, g in self._gradients().items()}

    def _gradients(self) -> dict[str, Tensor]:
        ids = probe_ids()
        with torch.enable_grad():
            for p in self.parameters.values():
                p.requires_grad_(True)
            logits = self.model(input_ids=ids, use_cache=False).logits
            weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(4))
            found = torch.autograd.grad((logits * weight).sum(), list(self.parameters.values()), allow_unused=True)
        for p in self.parameters.values():
            p.requires_grad_(False)
        return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(self.parameters.items(), found, strict=True)}

    def silenced(self, name: str, dim: int, columns: Tensor) -> dict[tuple[str, int], set[int]]:
        """(tensor, dimension) -> positions that serve nothing but the given columns of a consumer."""
        weight = self.parameters[name]
        with torch.no_grad():
            kept = weight.detach().clone()
            weight.index_fill_(dim, columns, 0)
        try:
            now = self._gradients()
        finally:
            with torch.no_grad():
                weight.copy_(kept)
        out = {}
        for n, g in now.items():
            dead = self.alive[n] & (g == 0)
            for d in range(g.ndim) if n != name and bool(dead.any()) else ():
                others = [k for k in range(g.ndim) if k != d]
                silent = dead.all(dim=others) if others else dead
                if bool(silent.any()):
                    out[n, d] = set(silent.nonzero()[:, 0].tolist())
        return out


def _find_heads(probe: _Probe, name: str, dim: int, out: Tied) -> None:
    """Whether a consumer's input holds heads, and where in the other tensors they stand."""
    sizes = probe.layout.sizes_at(probe.layer)
    axis = "kv" if sizes["kv"] > 1 else "query"
    _find(probe, name, dim, _HEADS, sizes, axis, out)


def _find_norms(probe: _Probe, name: str, dim: int, out: Tied) -> None:
    """Norms over all heads right before their consumer, whose classes take the hidden size to be the same."""
    layout, sizes = probe.layout, probe.layout.sizes_at(probe.layer)
    beside = [
        n
        for n in layout.block_tensors(probe.layer)
        if layout.tensors[n].text == "hidden" and _module(_module(n)) == _module(_module(name)) and _module(n) != _module(name)
    ]
    if beside:
        first = _positions(_HEADS[0], sizes, "kv" if sizes["kv"] > 1 else "query")
        found = probe.silenced(name, dim, first)
        out.update({(n, 0): [_HEADS[0].text] for n in beside if found.get((n, 0)) == set(first.tolist())})


def _find_ffn(probe: _Probe, name: str, dim: int, out: Tied) -> None:
    _find(probe, name, dim, _FFN, {"ffn": probe.layout.shapes[name][dim]}, "ffn", out)


def _find(
    probe: _Probe, name: str, dim: int, signatures: list[Signature], sizes: Mapping[str, int], axis: str, out: Tied
) -> None:
    """Silence the first unit of an axis in a consumer's input, and match what falls silent with the signatures."""
    layout = probe.layout
    found = probe.silenced(name, dim, _positions(signatures[0], sizes, axis))
    matched = {
        place: texts
        for place, s in found.items()
        if (texts := _matching(signatures, sizes, axis, s, layout.shapes[place[0]][place[1]]))
    }
    # A norm right before a matrix falls silent with the matrix's columns too; units have a matrix that makes them.
    if any(n in layout.consumers and d != layout.consumers[n] for n, d in matched):
        out[name, dim] = [signatures[0].text]
        out.update(matched)


def _positions(signature: Signature, sizes: Mapping[str, int], axis: str) -> Tensor:
    """Where the first unit of an axis stands along a signature of one dimension."""
    return (coordinates(signature.dims[0], sizes)[axis] == 0).nonzero()[:, 0]


def _matching(signatures: list[Signature], sizes: Mapping[str, int], axis: str, silent: set[int], extent: int) -> list[str]:
    """The signature whose first unit stands exactly where positions fell silent."""
    fits = (s for s in signatures if size(s.dims[0], sizes) == extent and set(_positions(s, sizes, axis).tolist()) == silent)
    return [s.text for s in fits][:1]


def _rest(layout: Layout, candidates: Mapping[str, list[str]], out: Tied) -> None:
    """Hidden-sized dimensions that nothing fell silent in. A bias follows its matrix. What stands beside a consumer of
    heads may hold heads all the same (queries that are normalised over all heads), which the proof decides."""
    readers = {name for name, dim in out if layout.consumers.get(name) == dim}
    beside = {_module(_module(name)) for name in readers}
    for name, texts in candidates.items():
        for dim, node in enumerate(layout.tensors[name].dims):
            if (name, dim) in out:
                continue
            twin = f"{_module(name)}.weight"
            if name.endswith(".bias") and len(layout.shapes.get(twin, ())) == 2 and twin in layout.consumers:
                made = (twin, 1 - layout.consumers[twin])
                if made in out or node == _HIDDEN:
                    out[name, dim] = out.get(made, ["hidden"])
                continue
            if node != _HIDDEN:
                if names(node) & {"kv", "query"} and _module(_module(name)) not in beside and layout.layer_of(name) is not None:
                    # A multiple of the hidden size, by chance that of all heads.
                    out[name, dim] = (
                        [_THREE] if size(parse(_THREE).dims[0], layout.sizes) == layout.shapes[name][dim] else ["_"]
                    )
                continue
            inner = _module(_module(name)) in beside and name not in readers and layout.consumers.get(name) != dim
            out[name, dim] = ["hidden", "(kv query d)"] if inner and any("kv" in t for t in texts) else ["hidden"]


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def head_arguments(small: Miniature, base: PreTrainedConfig) -> dict[str, int]:
    """Arguments of a block that have an entry for each head (ALiBi), and the dimension that they stand in.

    Found by doubling the number of heads: the dimension that doubles, and nothing else, counts them.
    """
    heads = raw_key(base, HEADS)
    try:
        few = _arguments(base)
        many = _arguments(small.make(**{heads: 2 * getattr(base, HEADS)}))
    except (*modeling.REJECTED, ModelError, RuntimeError, IndexError):
        return {}
    out = {}
    for name, shape in few.items():
        other = many.get(name, ())
        moved = [d for d in range(len(shape)) if len(other) == len(shape) and other[d] != shape[d]]
        if len(moved) == 1 and other[moved[0]] == 2 * shape[moved[0]]:
            out[name] = moved[0]
    return out


def _arguments(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that the first block is called with by name."""
    model = random_model(config)
    seen: dict[str, tuple[int, ...]] = {}

    def look(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        seen.update({k: tuple(v.shape) for k, v in kwargs.items() if isinstance(v, Tensor)})

    handle = blocks(model)[1][0].register_forward_pre_hook(look, with_kwargs=True)
    try:
        with torch.no_grad():
            model(input_ids=probe_ids(), use_cache=False)
    finally:
        handle.remove()
    return seen
