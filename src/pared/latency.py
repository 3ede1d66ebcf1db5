"""Times of blocks at other sizes, measured on the device at hand: the table that `--allocate latency` decides by."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pared.blockparts import rebuilt
from pared.budget import Budget, Sizes
from pared.budget.select import select
from pared.budget.timed import Times
from pared.budget.uniform import ladder
from pared.calibration import Batch
from pared.distributed import once
from pared.durable import write_whole
from pared.errors import UsageError
from pared.estimate import Progress, silent
from pared.process import now
from pared.scores import Scores
from pared.stream import Stream

# Sizes of an FFN that are timed, of each axis of attention, and runs of each of which the shortest counts.
WIDTHS, HEADS, RUNS = 16, 4, 5


@dataclass(frozen=True)
class Workload:
    """What is timed: a forward pass over batch x context tokens."""

    batch: int
    context: int


def times_for(stream: Stream, budget: Budget, load: Workload, file: Path | None, progress: Progress = silent) -> Times:
    """The table for a model and a workload: from the file where it stands there, else measured, and added to the file."""
    if odd := [a for a in budget.axes if a not in ("kv", "query", *budget.width_axes)]:
        raise UsageError(
            f"--allocate latency times heads and FFN channels, not {', '.join(odd)}",
            where="--structures",
            fix="--structures kv,query,ffn",
        )
    limit = getattr(stream.model.config.get_text_config(), "max_position_embeddings", None)
    load = Workload(load.batch, min(load.context, limit or load.context))

    def found() -> dict[str, Any]:
        key = json.loads(json.dumps(_key(stream, budget, load)))
        known = _read(file)
        for entry in known:
            if entry["of"] == key:
                return entry["seconds"]
        made = json.loads(json.dumps(_record(_measure(stream, budget, load, progress))))
        if file is not None:
            write_whole(file, json.dumps([*known, {"of": key, "seconds": made}], indent=1))
        return made

    return _times(once(found))


def _read(file: Path | None) -> list[dict[str, Any]]:
    if file is None or not file.exists():
        return []
    try:
        known = json.loads(file.read_text())
        if all({"of", "seconds"} == entry.keys() for entry in known):
            return known
    except (ValueError, AttributeError, OSError):
        pass
    raise UsageError("not a file of measured times", where=file, fix="name another --latency-table, or remove it")


def _record(times: Times) -> dict[str, Any]:
    return {"like": times.like, "whole": [*times.whole.items()], "parts": [*times.parts.items()]}


def _times(found: Mapping[str, Any]) -> Times:
    parts = {k: [[(sizes, t) for sizes, t in options] for options in own] for k, own in found["parts"]}
    return Times(tuple(found["like"]), dict(found["whole"]), parts)


def _key(stream: Stream, budget: Budget, load: Workload) -> dict[str, Any]:
    """What the times depend on."""
    device, like = stream.device, _like(stream, budget)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    kinds = {
        k: [budget.layout.sizes_at(k), sorted(budget.layout.shapes[n] for n in budget.layout.block_tensors(k))] for k in like
    }
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": str(stream.dtype or stream.model.dtype),
        "attention": stream.model.config._attn_implementation,
        "model_type": budget.layout.model_type,
        "workload": [load.batch, load.context],
        "axes": [*budget.axes],
        "steps": {a: budget.step(a) for a in budget.axes},
        "blocks": {str(k): v for k, v in kinds.items()},
        "like": like,
    }


def _like(stream: Stream, budget: Budget) -> list[int]:
    """For each layer, the first one of its kind: of the same tensors, and the same kind of attention."""
    kinds = getattr(stream.model.config.get_text_config(), "layer_types", None) or [""] * stream.num_layers
    return [
        next(j for j in range(i + 1) if kinds[i] == kinds[j] and (i == j or budget.same_block(i, j)))
        for i in range(stream.num_layers)
    ]


def _measure(stream: Stream, budget: Budget, load: Workload, progress: Progress) -> Times:
    vocab = stream.layout.sizes["vocab"]
    ids = torch.arange(load.batch * load.context).remainder(vocab).reshape(load.batch, load.context)
    hidden = stream.embed([Batch(ids, None)])[0]
    like = _like(stream, budget)
    whole: dict[int, float] = {}
    parts: dict[int, list[list[tuple[Sizes, float]]]] = {}
    kinds = sorted(set(like))
    for done, i in enumerate(kinds, 1):
        with stream.block(i) as block, torch.no_grad():
            options = _options(budget, i)
            at = [(p, k) for p, sizes in enumerate(options) for k in range(1, len(sizes))]
            best = dict.fromkeys([None, *at], float("inf"))
            for _ in range(RUNS):  # in turns, so that what else the machine does meets all sizes alike
                best[None] = min(best[None], _seconds(stream, block, i, hidden))
                for p, k in at:
                    cut = _cut(stream, block, i, options[p][k])
                    best[p, k] = min(best[p, k], _seconds(stream, cut, i, hidden))
            whole[i] = best[None]
            parts[i] = [[(s, best[p, k] if k else whole[i]) for k, s in enumerate(sizes)] for p, sizes in enumerate(options)]
        progress("times", done, len(kinds))
    return Times(tuple(like), whole, parts)


def _options(budget: Budget, layer: int) -> list[list[Sizes]]:
    """The sizes of each part of a block that are timed, its full sizes first."""
    full = {a: n for a, n in budget.layout.sizes_at(layer).items() if budget.layout.holders(a, layer)}
    heads = [a for a in ("kv", "query") if a in budget.axes and a in full]
    out: list[list[Sizes]] = []
    if heads:
        levels = [_thin(budget.levels(a, full[a]), HEADS) for a in heads]
        out.append([dict(zip(heads, own, strict=True)) for own in itertools.product(*levels)])
    for axis in (a for a in budget.width_axes if a in full):
        rungs = ladder(full[axis], budget.step(axis))
        out.append([budget.layout.with_followers({axis: n}) for n in _thin(rungs, WIDTHS)])
    return out


def _thin(levels: Sequence[int], most: int) -> list[int]:
    """At most so many of some levels, the first and the last among them."""
    if len(levels) <= most:
        return list(levels)
    return [levels[round(k * (len(levels) - 1) / (most - 1))] for k in range(most)]


def _cut(stream: Stream, block: nn.Module, i: int, sizes: Sizes) -> nn.Module:
    """A block with its first units of some axes."""
    full = stream.layout.sizes_at(i)
    zero = Scores({(i, a): torch.zeros(full[a] * full.get(stream.layout.parents.get(a, ""), 1)) for a in sizes})
    return rebuilt(stream, block, i, select(stream.layout, zero, i, sizes), {}, {})


def _seconds(stream: Stream, block: nn.Module, i: int, hidden: Tensor) -> float:
    stream.run(block, i, hidden)  # warms up
    started = now(hidden.device)
    stream.run(block, i, hidden)
    return now(hidden.device) - started
