"""Exact counts of what a model is made of: parameters, multiply-adds and cache, from signatures alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict

from pared.structure import Layout

AMOUNTS = ("params", "block-params", "flops", "kv-cache")


class Account(BaseModel):
    """Counts of one model.

    params: entries of all tensors, tied ones once. block_params: those inside the decoder blocks.
    flops: multiply-adds for one token, attending to `context` earlier ones. kv_cache: cache entries for one token.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    params: int
    block_params: int
    flops: int
    kv_cache: int
    context: int
    layers: int

    def amount(self, of: str) -> int:
        return int(getattr(self, of.replace("-", "_")))


def account(
    layout: Layout,
    layers: Sequence[tuple[int, Mapping[str, int]]] | None = None,
    *,
    hidden: int | None = None,
    vocab: int | None = None,
    context: int = 1024,
    experts_used: int | None = None,
) -> Account:
    """Count a model as it is, or as it would be.

    layers: for each layer of the result (source layer, axis sizes that differ from the source's); None: as it is, without
    what is added to it.
    hidden, vocab: other numbers of hidden channels and of tokens. experts_used: experts that each token visits.
    """
    changed = {a: n for a, n in (("hidden", hidden), ("vocab", vocab)) if n is not None}
    chosen = [(i, {}) for i in range(layout.num_layers)] if layers is None else layers
    outside = [n for n in layout.tensors if layout.layer_of(n) is None and n not in layout.tied]
    shared = {**layout.sizes, **changed}
    if "layer" in shared:
        shared["layer"] = len(chosen)
    params = sum(layout.parameters(n, shared) for n in outside)
    head = shared["hidden"] * shared["vocab"]
    block_params = flops = cache = 0
    for source, own in chosen:
        sizes = {**layout.sizes_at(source), **own, **changed}
        names = layout.block_tensors(source)
        names = names if layers is not None else [n for n in names if n not in layout.added]
        p, f = block_count(layout, source, sizes, context=context, experts_used=experts_used, names=names)
        block_params, flops, cache = block_params + p, flops + f, cache + cache_entries(layout, source, sizes)
    return Account(
        params=params + block_params,
        block_params=block_params,
        flops=flops + head,
        kv_cache=cache,
        context=context,
        layers=len(chosen),
    )


def block_count(
    layout: Layout,
    source: int,
    sizes: Mapping[str, int],
    *,
    context: int = 1024,
    experts_used: int | None = None,
    names: Sequence[str] | None = None,
) -> tuple[int, int]:
    """Parameters and multiply-adds for one token of one block under the given axis sizes. names: the block's, if known."""
    params = flops = 0
    names = layout.remaining(layout.block_tensors(source) if names is None else list(names), sizes)
    for name in names:
        n = layout.parameters(name, sizes)
        params += n
        # Routers are matrices too, though of no class that says so.
        if name in layout.consumers or (len(layout.shapes[name]) == 2 and name.endswith(".weight")):
            routed = (
                "expert" in layout.tensors[name].axes
                and layout.tensors[name].dims_of("expert") == [0]
                and len(layout.shapes[name]) == 3
            )
            flops += n * min(experts_used or sizes["expert"], sizes["expert"]) // sizes["expert"] if routed else n
    if cache_entries(layout, source, sizes, names):
        flops += 2 * sizes["kv"] * sizes["query"] * sizes["d"] * context
    return params, flops


def cache_entries(layout: Layout, source: int, sizes: Mapping[str, int], names: Sequence[str] | None = None) -> int:
    """Entries that the key-value cache holds for one token in one block; 0 where nothing says that it attends."""
    names = layout.remaining(layout.block_tensors(source) if names is None else list(names), sizes)
    attends = any({"kv", "d"} <= layout.tensors[n].axes for n in names)
    return 2 * sizes["kv"] * sizes["d"] if attends else 0
