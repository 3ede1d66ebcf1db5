"""Trials: how far a model of given sizes is from the dense one, measured end to end on sequences kept aside.

Every candidate's blocks are cut, refitted from dense statistics and run; candidates travel through the blocks side by
side, so that each block is read once. What is compared is KL(dense || candidate), in nats per token.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pared import process
from pared.budget import Sizes
from pared.budget.levels import Levels, Selection, measure_levels
from pared.calibration import Batch, together
from pared.distributed import own_rows, total_of
from pared.estimate import Progress, silent
from pared.rotation import Rotation, find_rotation
from pared.spill import States
from pared.stages import Remembered
from pared.stream import Stream
from pared.turned import TurnedStream
from pared.unlikely import with_scrambled
from pared.walk import Method, Walk

Shape = Mapping[int, Sizes]  # layer -> units left of each axis that shrinks
Key = tuple[tuple[str, int], ...]
# (layer, block, dense hidden states that enter it) -> what leaves it of those that only levels need, the levels.
LevelsAt = Callable[[int, nn.Module, States], tuple[States, Levels]]

# Bytes of second moments that are kept between trials; where a model's are more, they are measured each time.
KEPT = 2 << 30
# Tokens whose logits are there at once: with a large vocabulary they are the largest tensor of all.
FEW = 128
# Uniform shapes whose loss is within this factor of the least are compared once more, so many of them at most.
NEAR, MOST_NEAR = 1.2, 3
# Sequences of calibration from which on they are. With fewer that would cost more than all else, and trials are brief.
ENOUGH = 64


@dataclass(frozen=True)
class Split:
    """How many of a calibration's sequences trials take; those that judge without what `with_scrambled` adds.

    few, many: fitted to and judged on as the walk does. measured, compared: what uniform shapes are fitted to on dense inputs,
    and judged on. again: fitted to as the walk does where uniform shapes come near each other; 0: they are not.
    brief: few uniform shapes are tried.
    """

    few: int
    many: int
    measured: int
    compared: int
    again: int

    @property
    def brief(self) -> bool:
        return self.again == 0


def split_rows(n: int) -> Split:
    """Of so many sequences."""
    few, many = max(1, min(n // 2, max(8, n // 16))), max(1, min(n // 4, max(8, n // 8)))
    if n < ENOUGH:
        return Split(few, many, max(1, n // 8), max(1, 3 * n // 32), 0)
    return Split(few, many, n // 8, min(many, n // 8), 3 * n // 16)


class Judges:
    """Ways to say how far shapes are from the dense model, in nats of KL per token, on sequences of the calibration.

    quick: refits on dense inputs, one pass over the candidates' own blocks; enough to tell most uniform shapes apart.
    sequential: as the walk that follows, on few sequences; where layers differ, what later ones repair counts.
    uniform: the former, and those that come near the best as the latter does.
    All are judged on the calibration's text and on some of its tokens in random order as well, which tells what a shape
    loses on text of another kind.
    narrowed: as the former two of those are compared, where hidden channels go as well; `turn` comes before.
    power: as in `Scores`: what weighs errors where the latter chooses units. brief: few uniform shapes are worth trying.
    turned: the model in a basis that hidden channels are cut in, where they may go. progress: hears of all but `sequential`.
    """

    def __init__(
        self,
        stream: Stream,
        axes: Sequence[str],
        rows: Sequence[Batch],
        batch: int,
        power: Mapping[tuple[int, str], Tensor] | None = None,
        progress: Progress = silent,
    ) -> None:
        split = split_rows(len(rows))
        many, compared = split.many, split.compared
        self.stream, self.axes, self.progress = stream, axes, progress
        self.turned: TurnedStream | None = None
        # Rows that are judged by come first, those that are fitted to after them; a single row has to do for both.
        self.judged = together(own_rows(with_scrambled(rows[:many])), batch)
        self.fit = together(own_rows(rows[many : many + split.few] or rows[:1]), batch)
        # Shapes that are alike everywhere differ by more than the noise of few sequences.
        self.compared = together(own_rows(with_scrambled(rows[:compared])), batch)
        self.measured = together(own_rows(rows[compared : compared + split.measured] or rows[:1]), batch)
        self.again = together(own_rows(rows[compared : compared + split.again]), batch)
        self.brief = split.brief
        self._levels: dict[int, Levels] = {}
        self._power = power or {}
        self._near: dict[tuple[tuple[int, Key], ...], float] = {}  # the loss of uniform shapes that were compared once more

    def turn(self) -> Rotation:
        """Find the basis that `narrowed` cuts hidden channels in, from what it fits to. ModelError where there is none.

        That is a part of the tokens: enough to tell whether channels go, not to cut them by.
        """
        basis = find_rotation(self.stream, self.again, self.progress, "trial rotation")
        self.turned = TurnedStream(self.stream, basis)
        return basis

    def quick(self, shapes: Sequence[Shape]) -> list[float]:
        skip = len(self.measured)

        def levels(i: int, block: nn.Module, dense: States) -> tuple[States, Levels]:
            return measure_levels(self.stream, block, i, dense[:skip], self.axes)

        told = functools.partial(self.progress, "trials")
        return score_shapes(self.stream, levels, shapes, [], self.compared, only_seen=self.measured, progress=told)

    def uniform(self, shapes: Sequence[Shape]) -> list[float]:
        losses = self.quick(shapes)
        least = min(losses)
        near = [k for k in sorted(range(len(shapes)), key=losses.__getitem__) if losses[k] <= NEAR * least][:MOST_NEAR]
        if len(near) < 2 or self.brief or not 0 < least < math.inf:
            return losses

        found = self._walked(self.stream, [shapes[k] for k in near], self.again, self.compared, name="near trials")
        self._near = {_written(shapes[k]): loss for k, loss in zip(near, found, strict=True)}
        # On the scale of the others, which lose more than the best of these.
        for k, loss in zip(near, found, strict=True):
            losses[k] = loss * least / max(found[0], math.ulp(0.0))
        return losses

    def sequential(self, shapes: Sequence[Shape], share: float, hidden: int | None = None) -> list[float]:
        """hidden: of all shapes, where channels of the residual stream go as well."""
        judged = self.judged[: max(1, round(share * len(self.judged)))]
        if hidden is None or self.turned is None:
            return self._walked(self.stream, shapes, self.fit, judged, self._power, self._levels)
        shapes = [{i: {**own, "hidden": hidden} for i, own in shape.items()} for shape in shapes]
        return self._walked(self.turned, shapes, self.fit, judged, self.turned.rotation.power(self._power), self._levels)

    def narrowed(self, shapes: Sequence[Shape]) -> list[float]:
        assert self.turned is not None
        name = "narrower trials" if all(_hidden(shape, 0) for shape in shapes) else "narrow trials"
        # With every channel there another basis is no other model: those that were compared so already are not again.
        new = [shape for shape in shapes if _written(shape) not in self._near]
        found = iter(self._walked(self.turned, new, self.again, self.compared, name=name) if new else ())
        return [self._near[key] if (key := _written(shape)) in self._near else next(found) for shape in shapes]

    def _walked(
        self,
        stream: Stream,
        shapes: Sequence[Shape],
        fit: Sequence[Batch],
        judged: Sequence[Batch],
        power: Mapping[tuple[int, str], Tensor] | None = None,
        kept: dict[int, Levels] | None = None,
        *,
        name: str | None = None,
    ) -> list[float]:
        """As the walk refits. kept: where levels that fit into memory stay from one call to the next. name: for progress."""

        def levels(i: int, block: nn.Module, dense: States) -> tuple[States, Levels]:
            if kept is not None and i in kept:
                return stream.pool.store(), kept[i]
            own = {name: value for (layer, name), value in (power or {}).items() if layer == i}
            _, made = measure_levels(stream, block, i, dense[: len(fit)], self.axes, own)
            if kept is not None and stream.num_layers * made.nbytes <= KEPT:
                kept[i] = made
            return stream.pool.store(), made

        told = _untold if name is None else functools.partial(self.progress, name)
        return score_shapes(stream, levels, shapes, fit, judged, progress=told)


def _untold(done: int, total: int) -> None:
    pass


def score_shapes(
    stream: Stream,
    levels: LevelsAt,
    shapes: Sequence[Shape],
    fit: Sequence[Batch],
    batches: Sequence[Batch],
    *,
    only_seen: Sequence[Batch] = (),
    progress: Callable[[int, int], None] = _untold,
) -> list[float]:
    """KL to the dense model of each shape, on `batches`. levels: gives a block's levels from the dense hidden
    states that enter it, when its turn comes.

    Layers of which a shape has no unit of "layer" are passed by; the block before them is refitted to bridge the gap. A shape
    with fewer hidden channels, the same in all layers, has the first of those that the stream counts.

    Each candidate is refitted block by block on what its own earlier blocks give for the sequences in `fit`; where there
    are none, on dense inputs. only_seen: sequences that only the dense model runs, for `levels`, which gets them first.
    """
    method = Method(inputs=False, fit=len(fit), guarded=False)
    skip = len(only_seen)
    entered = stream.embed([*only_seen, *fit, *batches])
    seen_only, dense = entered[:skip], entered[skip:]
    # Candidates that are alike up to here share one path: the number of the path that each is on; 0 is the dense one.
    paths, on = _entering(stream, dense, shapes)
    for i in range(stream.num_layers):
        gaps = [_gap(shape, i, stream.num_layers) if fit else 0 for shape in shapes]
        beyond = _past(stream, i, dense[: len(fit)], set(gaps))
        with stream.block(i) as block, torch.no_grad():
            seen_only, here = levels(i, block, seen_only + dense)
            paths, on = _through(stream, i, block, here, shapes, paths, on, (len(fit), gaps, beyond), method)
            dense = paths[0]
            del here, block
        progress(i + 1, stream.num_layers)
    last = [p[len(fit) :] for p in paths]
    found = [0.0, *divergences(stream, last[0], last[1:])]
    return [found[p] for p in on]


def _through(
    stream: Stream,
    i: int,
    block: nn.Module,
    here: Levels,
    shapes: Sequence[Shape],
    paths: list[States],
    on: Sequence[int],
    bridged: tuple[int, Sequence[int], Mapping[int, States]],
    method: Method,
) -> tuple[list[States], list[int]]:
    """All candidates through one block: the paths behind it, and which of them each is on.

    bridged: batches that are fitted to, and for each candidate the layers that go right behind; the dense stream past those.
    """
    fit, gaps, beyond = bridged
    dense = paths[0]
    keys = [tuple(sorted((here.shrunk(shape.get(i, {})) | _hidden(shape, i)).items())) for shape in shapes]
    if not fit:
        here.prepare([dict(k) for k in keys], stream.pool)
    steps: dict[tuple[int, Key, int], int] = {(0, (), 0): 0}
    after, seen, now = [], None, list(on)
    if fit and (any(keys) or any(gaps)):
        walk = Walk(stream, i, block, _select(here, next((k for k in keys if k), ())), method)
        seen = Remembered(stream, block, i, walk.stages(dense), dense, fit)
        after.append(seen.at)
    else:
        after.append(stream.through(block, i, dense, keep=True))
    for k, key in enumerate(keys):
        step = (on[k], key, gaps[k]) if _stays(shapes[k], i) else (on[k], (("layer", 0),), 0)
        if step not in steps:
            steps[step] = len(after)
            before = paths[on[k]]
            if not _stays(shapes[k], i):
                after.append(before)
            elif seen is not None and (key or gaps[k]):
                walk = Walk(stream, i, block, _select(here, key), method, beyond.get(gaps[k]))
                moved = walk.follow(seen, before[:] if on[k] else None)
                after.append(after[0] if moved is None else moved)
            else:
                # No name for the module: it would be there still while the next one is made.
                after.append(stream.through(here.module(stream, block, dict(key)), i, before, keep=True))
        now[k] = steps[step]
    return after, now


def _written(shape: Shape) -> tuple[tuple[int, Key], ...]:
    return tuple(sorted((i, tuple(sorted(own.items()))) for i, own in shape.items()))


def _hidden(shape: Shape, i: int) -> Sizes:
    """Of a shape with fewer hidden channels, their number."""
    return {a: n for a, n in shape.get(i, {}).items() if a == "hidden"}


def _entering(stream: Stream, dense: States, shapes: Sequence[Shape]) -> tuple[list[States], list[int]]:
    """The paths that enter the first block, one for each number of hidden channels, and which of them each shape is on."""
    widths = [_hidden(shape, 0).get("hidden", 0) for shape in shapes]
    paths, place = [dense], {0: 0}
    for width in widths:
        if width not in place:
            place[width] = len(paths)
            paths.append(stream.pool.store(h[..., :width].clone() for h in dense))
    return paths, [place[width] for width in widths]


def _select(here: Levels, key: Key) -> Selection:
    """The units of a block that stay under some sizes, of hidden channels the first."""
    sizes = dict(key)
    out = here.select(sizes)
    return {**out, "hidden": torch.arange(sizes["hidden"])} if "hidden" in sizes else out


def _stays(shape: Shape, i: int) -> bool:
    return shape.get(i, {}).get("layer") != 0


def _gap(shape: Shape, i: int, layers: int) -> int:
    """How many layers go right behind layer i; 0 where that goes itself."""
    end = i + 1
    while end < layers and not _stays(shape, end):
        end += 1
    return end - i - 1 if _stays(shape, i) else 0


@torch.no_grad()
def _past(stream: Stream, i: int, dense: States, gaps: set[int]) -> dict[int, States]:
    """The dense stream past so many layers behind layer i, from what enters that; nothing for gaps of none."""
    out: dict[int, States] = {}
    for j in range(i, i + max(gaps, default=0) + 1) if gaps - {0} else ():
        with stream.block(j) as block:
            dense = stream.through(block, j, dense, keep=True)
        if j - i in gaps - {0}:
            out[j - i] = dense
    return out


@torch.no_grad()
def divergences(stream: Stream, dense: Sequence[Tensor], paths: Sequence[Sequence[Tensor]]) -> list[float]:
    """KL(dense || other) per token for each of some last hidden states, lists of [b, s, hidden]; what is no number is inf."""
    totals = [0.0] * len(paths)
    tokens = 0
    process.return_freed_memory()
    with stream.outside(front=False):
        for b, hidden in enumerate(dense):
            for row in range(hidden.shape[0]):
                for start in range(0, hidden.shape[1], FEW):
                    at = slice(row, row + 1), slice(start, start + FEW)
                    p = torch.log_softmax(stream.logits(hidden[at]).float(), -1)
                    weight = p.exp()
                    tokens += p.shape[1]
                    for k, path in enumerate(paths):
                        q = torch.log_softmax(stream.logits(path[b][at]).float(), -1).sub_(p)
                        totals[k] -= float(torch.linalg.vecdot(weight, q).sum(dtype=torch.float64))
    count, totals = total_of(tokens), [total_of(t) for t in totals]
    return [t / count if math.isfinite(t) else math.inf for t in totals]
