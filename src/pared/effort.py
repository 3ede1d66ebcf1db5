"""What a recipe's effort stands for, and which decisions are left to trial models and to the walk that refits."""

from __future__ import annotations

import torch
from torch import Tensor

from pared.blockparts import sole_consumer
from pared.budget import Budget
from pared.budget.mixture import fewer_layers
from pared.budget.trials import ENOUGH, Judges
from pared.calibration import Batch
from pared.criteria import get_criterion
from pared.criteria.obs import AXES
from pared.depth import Depth
from pared.errors import UsageError
from pared.estimate import Progress, estimate
from pared.recipe import Recipe
from pared.scores import Scores
from pared.stream import Stream, unpadded
from pared.structure import Layout
from pared.unlikely import random_rows

# Generations of a search, and steps of reconstruction at the highest effort.
GENERATIONS = {"quick": 4, "default": 4, "max": 32}
STEPS = 200
# Layers beside other structures are scored on one sequence in so many: each removal takes a pass over the blocks for half of
# the layers.
FEW = 8


def measures(recipe: Recipe, layout: Layout, axes: tuple[str, ...]) -> bool:
    """Whether sizes are chosen by the KL of trial models: those are made by second-order selection and a refit."""
    width = tuple(a for a in axes if a != "layer")  # of layers, trial models say how many go
    chosen = bool(width) and set(width) <= reselected(recipe, layout) and tried(layout, width)
    return (
        chosen
        and recipe.allocate != "latency"
        and (recipe.shape == "uniform" or recipe.allocate == "search" or "layer" in axes)
    )


def tried(layout: Layout, axes: tuple[str, ...]) -> bool:
    """Whether trial models of other sizes can be made: second-order selection has to be able to choose along every axis,
    and none may be tied to the size of another."""
    tied = layout.follows.keys() | {axis for axis, _ in layout.follows.values()}
    return set(axes) <= _chosen_alone(layout) and not tied & set(axes)


def narrows(recipe: Recipe, layout: Layout, axes: tuple[str, ...]) -> bool:
    """Whether trial models say if hidden channels go as well, in a basis of their own.

    Where that was not asked for, a head that shares the embeddings has to lie outside of what is counted: it becomes a tensor
    of its own. UsageError where it was asked for and can not be.
    """
    if recipe.narrow is False or (recipe.narrow is None and recipe.structures is not None):
        return False
    reasons = {
        "the whole vocabulary": recipe.keep_tokens_from is None,
        "--allocate uniform, or search": recipe.allocate == ("uniform" if recipe.shape == "uniform" else "search"),
        "--criterion obs and --compensate sequential": measures(recipe, layout, axes),
        f"{ENOUGH} or more calibration windows": recipe.windows >= ENOUGH,
        "heads and FFN channels, and no whole layers or experts": not {"layer", "expert"} & {*axes, *layout.parents.values()},
        "an amount that hidden channels are part of": recipe.of != "kv-cache",
    }
    missing = [what for what, there in reasons.items() if not there]
    if missing and recipe.narrow:
        raise UsageError(f"a narrower residual stream wants {missing[0]}", where="--narrow", fix="--no-narrow")
    return not missing and (bool(recipe.narrow) or not layout.tied or recipe.of == "block-params")


def judges(
    stream: Stream, axes: tuple[str, ...], batches: list[Batch], size: int, scores: Scores, progress: Progress
) -> Judges:
    """What measures trial models, on the calibration's own sequences, `size` at a time."""
    batches = [Batch(row, None) for b in unpadded(batches) for row in b.input_ids.split(1)]
    return Judges(stream, axes, batches, size, scores.power, progress)


def reselected(recipe: Recipe, layout: Layout) -> frozenset[str]:
    """Axes whose units are chosen in the walk that refits, by second-order selection on what comes in there."""
    if recipe.criterion not in ("obs", "obs-fisher") or recipe.compensate != "sequential" or recipe.iterative_steps > 1:
        return frozenset()
    inside = {a for a, parent in layout.parents.items() if parent == "expert" and a in AXES}
    return _chosen_alone(layout) | (inside if recipe.criterion == "obs" else set())


def _chosen_alone(layout: Layout) -> frozenset[str]:
    """Axes whose units one consumer in each block can choose, freely."""

    # A layer's heads stand in the config where its arguments differ by head; that is settled before the walk.
    axes = [a for a in AXES if layout.runs.get(a, 1) == 1 and not (layout.head_arguments and a in ("kv", "query"))]

    def one(i: int, axis: str) -> bool:
        return axis not in layout.layer_sizes[i] or not layout.holders(axis, i) or sole_consumer(layout, i, axis) is not None

    return frozenset(a for a in axes if all(one(i, a) for i in range(layout.num_layers)))


def reconstruction(recipe: Recipe, compensate: str, allocate: str) -> tuple[int, int]:
    """Steps of gradient descent on each block and windows in each, where a recipe leaves them open.

    At default effort half as many steps as calibration windows, and where a search has chosen the sizes, which costs more than
    they do, twice as many. Each is of one window: fewer steps on more windows at once gain less. Of fewer windows than ENOUGH
    there would be too few.
    """
    if recipe.reconstruct is not None or compensate != "sequential":
        return recipe.reconstruct or 0, recipe.step_of
    if recipe.effort == "max":
        return STEPS, recipe.step_of
    if recipe.effort == "default" and recipe.windows >= ENOUGH:
        return recipe.windows * 2 if allocate == "search" else recipe.windows // 2, recipe.step_windows or 1
    return 0, recipe.step_of


def refits_inputs(recipe: Recipe) -> bool:
    """Whether what runs before the consumers is refitted too: of few windows that gains less than it takes."""
    return recipe.effort == "max" or recipe.windows >= ENOUGH


def random_beside(recipe: Recipe, samples: int) -> int:
    """How many sequences of random tokens a refit sees beside so many of the calibration."""
    return 0 if recipe.compensate == "bias" else random_rows(samples, reconstructed=bool(recipe.reconstruct))


def no_scores(layout: Layout, axes: tuple[str, ...]) -> Scores:
    """Zero for every unit: a stand-in where other means decide which stay."""
    out = Scores()
    for i in range(layout.num_layers):
        sizes = layout.sizes_at(i)
        for axis in axes:
            if layout.holders(axis, i):
                out.of[i, axis] = torch.zeros(sizes[axis] * sizes.get(layout.parents.get(axis, ""), 1))
    return out


def some_rows(rows: list[Batch]) -> list[Batch]:
    """The sequences that layers beside other structures are scored on."""
    return rows[: max(1, len(rows) // FEW)]


def layers_by_loss(stream: Stream, budget: Budget, batches: list[Batch], going: int, progress: Progress) -> Tensor:
    """What layers are worth where the criterion does not say: the loss without, as far as any mixture may go."""
    most = max([going, *(budget.layout.num_layers - shape.layers for shape in fewer_layers(budget))])
    depth = Depth(most, protected=budget.protected)
    found = estimate(stream, get_criterion("perplexity"), ("layer",), batches, depth=depth, progress=progress)
    return found.of[None, "layer"]
