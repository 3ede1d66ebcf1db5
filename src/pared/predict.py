"""What a run would take, said without reading weights: memory, disk, bytes, operations, hours on stated hardware."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pared.errors import UsageError
from pared.footprint import Footprint, footprint
from pared.recipe import Recipe, make_recipe
from pared.report.inspection import Described, describe
from pared.resolve import DEFAULT_SEQ_LEN, compute_dtype, resolve, scored_axes
from pared.resources import Limits, Resources, choose, largest_batch
from pared.source import Source


@dataclass(frozen=True)
class Hardware:
    """Operations a second, in what blocks run in and in float64, and bytes a second from and to the disk."""

    flops: float
    solve_flops: float
    read: float
    write: float
    said: str

    @classmethod
    def parse(cls, text: str) -> Hardware:
        """ "60e12,20e12,2e9,1e9": the four numbers. UsageError for anything else."""
        try:
            flops, solves, read, write = (float(part) for part in text.split(","))
            if min(flops, solves, read, write) <= 0:
                raise ValueError
        except ValueError as error:
            raise UsageError(
                f"{text!r} does not describe hardware",
                where="--hardware",
                fix="FLOPS,FP64_FLOPS,READ,WRITE, by the second: --hardware 60e12,20e12,2e9,1e9",
            ) from error
        return cls(flops, solves, read, write, "as given")

    @classmethod
    def here(cls, dtype: torch.dtype, device: str = "cpu") -> Hardware:
        """This machine: products measured for a moment; the disk is taken to do 0.5 GB a second either way."""
        return cls(_speed(dtype, device), _speed(torch.float64, device), 0.5e9, 0.5e9, "measured here, disk 0.5 GB/s")


def _speed(dtype: torch.dtype, device: str, n: int = 1536) -> float:
    """Of a square matrix product."""
    a = torch.ones(n, n, dtype=dtype, device=device)
    best = 0.0
    for _ in range(3):
        started = time.perf_counter()
        float((a @ a)[0, 0])
        best = max(best, 2.0 * n**3 / (time.perf_counter() - started))
    return best


def predicted(need: Footprint, resources: Resources, hardware: Hardware) -> dict[str, Any]:
    """The record of a prediction: bytes, operations, hours, and the same stage by stage."""
    spill = need.spill(resources.room)
    seconds = need.flops / hardware.flops + need.solves / hardware.solve_flops
    seconds += need.read / hardware.read + (need.written + spill) / hardware.write
    return {
        "peak": resources.peak,
        "batch": resources.batch,
        "spill": spill,
        "read": need.read,
        "read_over_weights": round(need.read / need.source, 2),
        "written": need.written,
        "flops": need.flops,
        "solve_flops": need.solves,
        "hours": round(seconds / 3600, 3),
        "hardware": asdict(hardware),
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
    resident: int = 0,
    **settings: Any,
) -> dict[str, Any] | None:
    """What `pared.prune` of a model would take: a directory, of which config.json is enough, or a hub id.

    None where nothing but the vocabulary is pruned.

    settings: as for `prune`. resident: bytes that the process holds before. Raises ResourceError where the limits are too
    low, with the least that would do.
    """
    found = describe(model)
    source = Source(None, None, None, found.config, found.per_layer, found.layout)
    recipe = resolve(make_recipe(dict(base or {}), **settings), source)
    seq_len = recipe.seq_len or DEFAULT_SEQ_LEN
    need = need_of(source, recipe, stored=found.dtype, samples=recipe.samples, seq_len=seq_len, writes=True, base=resident)
    if need is None:
        return None
    resources = choose(
        need, limits or Limits(), largest_batch(recipe, recipe.samples, seq_len), device=recipe.device, check=False
    )
    speed = hardware or Hardware.here(compute_dtype(recipe) or found.dtype, recipe.device)
    return {"model_type": found.config.model_type, **predicted(need, resources, speed)}
