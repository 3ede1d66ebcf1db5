"""What a run would take, said without reading weights: memory, disk, bytes, operations, hours on stated hardware."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from math import inf, prod
from pathlib import Path
from typing import Any

import torch

from pared.footprint import Footprint, footprint
from pared.hardware import Hardware
from pared.process import resident_bytes
from pared.recipe import Recipe, make_recipe
from pared.report.inspection import Described, describe
from pared.resolve import DEFAULT_SEQ_LEN, compute_dtype, resolve, scored_axes
from pared.resources import Limits, Resources, choose, largest_batch
from pared.source import Source
from pared.structure import Layout


def predicted(need: Footprint, resources: Resources, hardware: Hardware) -> dict[str, Any]:
    """The record of a prediction: bytes, operations, hours, and the same stage by stage."""
    spill = need.spill(resources.room)
    return {
        "peak": resources.peak,
        "batch": resources.batch,
        "spill": spill,
        "read": need.read,
        "read_over_weights": round(need.read / need.source, 2),
        "written": need.written,
        "flops": need.flops,
        "solve_flops": need.solves + need.inverted,
        "touched": need.touched,
        "hours": round(hardware.seconds(need, spill) / 3600, 5),
        "hardware": {name: value for name, value in asdict(hardware).items() if value != inf},
        "least": need.peak(1, 0),
        "stages": [
            {"name": s.name, "memory": s.fixed + resources.batch * s.row, "states": s.states, "read": s.read, "flops": s.flops}
            for s in need.stages
        ],
    }


def need_of(
    source: Source | Described, recipe: Recipe, *, stored: torch.dtype, samples: int, seq_len: int, writes: bool, base: int
) -> Footprint | None:
    """What a resolved recipe takes on a model; None where nothing but the vocabulary is pruned."""
    axes = scored_axes(source.layout, recipe)
    if not axes:
        return None
    return footprint(
        source.layout,
        recipe,
        axes,
        experts_used=source.experts_used,
        compute=compute_dtype(recipe) or stored,
        stored=stored,
        samples=samples,
        seq_len=seq_len,
        writes=writes,
        base=base,
    )


def predict(
    model: str | Path,
    *,
    base: Mapping[str, Any] | None = None,
    limits: Limits | None = None,
    hardware: Hardware | None = None,
    cold: bool = False,
    **settings: Any,
) -> dict[str, Any] | None:
    """What `pared.prune` of a model would take: a directory, of which config.json is enough, or a hub id.

    None where nothing but the vocabulary is pruned.

    settings: as for `prune`. hardware: None measures this machine. cold:
    whether what this process has done and holds up to now is what a run begins with. Raises ResourceError where the limits
    are too low, with the least that would do.
    """
    found = describe(model)
    start, resident = (time.process_time(), resident_bytes()) if cold else (0.0, 0)
    source = Source(None, None, None, found.config, found.per_layer, found.layout)
    recipe = resolve(make_recipe(dict(base or {}), **settings), source)
    seq_len = recipe.seq_len or DEFAULT_SEQ_LEN
    need = need_of(source, recipe, stored=found.dtype, samples=recipe.windows, seq_len=seq_len, writes=True, base=resident)
    if need is None:
        return None
    resources = choose(
        need, limits or Limits(), largest_batch(recipe, recipe.windows, seq_len), device=recipe.device, check=False
    )
    if hardware is None:
        sizes = (resources.batch * seq_len, found.layout.sizes["hidden"], _widest(found.layout))
        hardware = Hardware.here(compute_dtype(recipe) or found.dtype, found.dtype, sizes, recipe.device, start)
    return {"model_type": found.config.model_type, **predicted(need, resources, hardware)}


def _widest(layout: Layout) -> int:
    """The width of the largest matrix of a block, its other one that of the hidden states."""
    names = layout.block_tensors(0)
    return max(prod(layout.shapes[n][-2:]) for n in names) // layout.sizes["hidden"]
