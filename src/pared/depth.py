"""Searches over what can go whole: the order in which layers or sublayers go, and the best run of layers to leave out."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pared.blockparts import rebuilt
from pared.calibration import Batch
from pared.criteria import Criterion, Group, Stats
from pared.distributed import total_of
from pared.errors import UsageError
from pared.gradients import next_token_loss
from pared.journal import Journal, reached
from pared.spill import States
from pared.stream import Stream
from pared.structure import SUBLAYERS

Found = dict[tuple[int | None, str], Tensor]
Unit = tuple[int, str]  # a layer, and what of it: "layer", or a kind of sublayer


@dataclass(frozen=True)
class Depth:
    """How far a search goes. layers: so many whole layers; sublayers: until they save `target`.

    saves: (layer, sizes of it that change) -> the amount that saves. protected: layers that stay as they are.
    """

    layers: int = 0
    target: float = math.inf
    saves: Callable[[int, Mapping[str, int]], int] = lambda i, sizes: 1
    protected: frozenset[int] = frozenset()


def without(stream: Stream, block: nn.Module, i: int, kinds: Sequence[str]) -> nn.Module:
    """A block that does without some of its sublayers; it shares the others' tensors."""
    gone: dict[str, Tensor] = {kind: torch.zeros(0, dtype=torch.long) for kind in kinds}
    return rebuilt(stream, block, i, gone, {}, {}) if gone else block


def search_removals(
    stream: Stream,
    criterion: Criterion,
    axes: Sequence[str],
    batches: Sequence[Batch],
    depth: Depth,
    progress: Callable[[str, int, int], None],
    journal: Journal | None = None,
) -> Found:
    """Remove what costs least for what it saves, measure all again, and so on: the order becomes the score.

    One pass over the blocks for each removal: every candidate's hidden states travel side by side. Scores of sublayers,
    divided by what they save, rise in the order in which they went. journal: where each removal is noted, and gone on from.
    """
    out: Found = {}
    layout = stream.layout
    for kinds in (["layer"] if "layer" in axes else [], [a for a in axes if a in SUBLAYERS]):
        if not kinds:
            continue
        whole = kinds == ["layer"]
        units = [(i, k) for i in range(stream.num_layers) for k in kinds if whole or layout.sizes_at(i).get(k)]
        cost = {u: 1 if whole else depth.saves(u[0], {u[1]: 0}) for u in units}
        free = [u for u in units if u[0] not in depth.protected]
        wanted = min(max(1, depth.layers), len(free) - 1) if whole else len(free) - 1
        gone, price = _noted(journal, kinds)
        entered = stream.embed(batches)
        while len(gone) < wanted and (whole or sum(cost[u] for u in gone) < depth.target):
            losses, now = _losses_without(stream, batches, entered, units, gone)
            price = {u: (losses[u] - (0.0 if whole else now)) / cost[u] for u in losses}
            gone.append(min((u for u in price if u in free), key=lambda u: price[u]))
            _note(journal, kinds, gone, price)
            progress("removals", len(gone), wanted)
        for i, kind in units:
            # Losses of later rounds are those of smaller models, so what went keeps its order, below all others.
            rank = gone.index((i, kind)) - len(gone) if (i, kind) in gone else max(0.0, price.get((i, kind), 0.0))
            group = Group(kind, (kind,), 1, i, {}, {}, {}, {})
            value = criterion.function(group, Stats(loss_without=rank * cost[i, kind]))
            if whole:
                out.setdefault((None, "layer"), torch.zeros(stream.num_layers))[i] = value[0]
            else:
                out[i, kind] = value
    return out


def _noted(journal: Journal | None, kinds: Sequence[str]) -> tuple[list[Unit], dict[Unit, float]]:
    """What went before a run stopped, and the last prices of all."""
    found = journal.read("removals") if journal is not None else None
    if found is None or found["of"] != list(kinds):
        return [], {}
    return [(i, k) for i, k in found["gone"]], {(i, k): p for i, k, p in found["price"]}


def _note(journal: Journal | None, kinds: Sequence[str], gone: Sequence[Unit], price: Mapping[Unit, float]) -> None:
    if journal is not None:
        journal.write("removals", {"of": list(kinds), "gone": gone, "price": [[*u, p] for u, p in price.items()]})
        reached("scores of a block")


def _losses_without(
    stream: Stream, batches: Sequence[Batch], entered: States, units: Sequence[Unit], gone: Sequence[Unit]
) -> tuple[dict[Unit, float], float]:
    """Mean loss with each further unit left out, and with none."""
    paths: dict[Unit | None, States] = {None: entered}
    for i in range(stream.num_layers):
        if (i, "layer") in gone:
            continue
        before, lost = paths[None], [k for j, k in gone if j == i]
        with stream.block(i) as block, torch.no_grad():
            module = without(stream, block, i, lost)
            paths = {u: stream.through(module, i, hidden, keep=True) for u, hidden in paths.items()}
            for unit in (u for u in units if u[0] == i and u not in gone):
                if unit[1] == "layer":
                    paths[unit] = before
                else:
                    paths[unit] = stream.through(without(stream, block, i, [*lost, unit[1]]), i, before, keep=True)
    tokens = total_of(sum(b.input_ids.shape[0] * (b.input_ids.shape[1] - 1) for b in batches))
    losses: dict[Unit | None, float] = {}
    with stream.outside(front=False), torch.no_grad():
        for candidate, hidden in paths.items():
            loss = sum(
                float(next_token_loss(stream.logits(h), b.input_ids.to(h.device))) for h, b in zip(hidden, batches, strict=True)
            )
            losses[candidate] = total_of(loss) / tokens
    now = losses.pop(None)
    return {u: loss for u, loss in losses.items() if u is not None}, now


def search_runs(
    stream: Stream, criterion: Criterion, batches: Sequence[Batch], depth: Depth, progress: Callable[[str, int, int], None]
) -> Found:
    """The angle between what enters and what leaves every run of as many layers as go: each layer has the least of the
    runs that it is in, so those of the best run come last. UsageError where no such run is free of protected layers."""
    n = max(1, depth.layers)
    window = deque([stream.embed(batches)], maxlen=n + 1)
    angles: dict[int, float] = {}
    for i in range(stream.num_layers):
        with stream.block(i) as block, torch.no_grad():
            window.append(stream.through(block, i, window[-1], keep=True))
        if len(window) == n + 1 and not depth.protected & set(range(i - n + 1, i + 1)):
            angles[i - n + 1] = angle(window[0], window[-1])
        progress("angles", i + 1, stream.num_layers)
    if not angles:
        raise UsageError(
            f"no {n} layers in a row may all go",
            where="--criterion angular",
            fix="--criterion block_influence, a smaller --remove, or fewer protected layers",
        )
    value = torch.zeros(stream.num_layers)
    for i in range(stream.num_layers):
        own = min((a for start, a in angles.items() if start <= i < start + n), default=1.0)
        value[i] = criterion.function(Group("layer", ("layer",), 1, i, {}, {}, {}, {}), Stats(run_angle=own))[0]
    return {(None, "layer"): value}


def angle(one: States, other: States) -> float:
    """Mean over tokens of arccos(cos(h, h')) / pi (arXiv:2403.17887, eq. 6)."""
    total, tokens = 0.0, 0
    for a, b in zip(one, other, strict=True):
        cosine = torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1).clamp(-1, 1)
        total += float(cosine.arccos().sum()) / math.pi
        tokens += cosine.numel()
    return total_of(total) / total_of(tokens)
