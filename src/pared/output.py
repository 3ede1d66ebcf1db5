"""Writing the result: the source cut as a plan says, one block at a time, into a checkpoint."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from pared import modeling
from pared.checkpoint import place_of
from pared.compensate import Reached, Refitted
from pared.errors import UsageError
from pared.journal import Journal, reached
from pared.models import NATIVE
from pared.per_layer import PerLayer
from pared.plan import LayerPlan, Plan
from pared.recipe import Recipe
from pared.remote_code import FILE, auto_map, modelling_file
from pared.report.card import model_card
from pared.retokenize import Retokenized
from pared.scores import Scores
from pared.source import Source
from pared.spill import Pool, States
from pared.surgery import Turned, cut_block, cut_outside, keep_scale, target_config
from pared.writer import CheckpointWriter


class Written:
    """Blocks of the result that are written, in a journal where there is one, and where the walk that refits them is.

    writer: None in all but the first of several processes, which follow what that one writes.
    """

    def __init__(
        self, journal: Journal | None, writer: CheckpointWriter | None, pool: Pool, device: torch.device | str = "cpu"
    ) -> None:
        self._journal, self._writer = journal, writer
        self.first, self.begun = 0, False
        self.reached: Reached | None = None
        self._record: dict[str, Any] = {}
        self._layers: list[LayerPlan] = []
        found = journal.last("blocks", pool, device) if journal is not None else None
        if found is not None:
            self.first, self._record, states = found
            self.begun = True
            self._layers = [LayerPlan.model_validate(own) for own in self._record["layers"]]
            if "dense" in states:
                dense = states["dense"]
                self.reached = Reached(self._record["source"], dense, states.get("pruned"))

    def resume(self, plan: Plan) -> Plan:
        """Have the writer go on, or begin; the plan with the units that were chosen so far."""
        if not self.begun:
            if self._writer is not None:
                self._writer.begin_anew()
            return plan
        if self._writer is not None:
            self._writer.restore(self._record["writer"])
        for i, layer in enumerate(self._layers):
            plan = plan.with_layer(i, layer)
        return plan

    def done(self, count: int, total: int, block: Refitted | None) -> None:
        """So many blocks are written, `block` the last of them, where it was refitted."""
        if self._journal is None:
            return
        states: dict[str, States] = {}
        at = block.reached if block is not None else None
        if block is not None:
            self._layers.append(block.layer)
        if at is not None and count < total:
            states["dense"] = at.dense
            if at.pruned is not None:
                states["pruned"] = at.pruned
        writer = self._writer
        if count == total and writer is not None:
            writer.flush()

        def record() -> dict[str, Any]:
            layers = [own.model_dump(mode="json") for own in self._layers]
            state = writer.state() if writer is not None else None
            return {"writer": state, "layers": layers, "source": at.layer if at is not None else 0}

        step = "block" if count else "outside"
        done = self._journal.checkpoint("blocks", step, count, record, states, last=count in (0, total))
        if done and writer is not None:
            writer.forget_spools()


def follow_written(plan: Plan, refitted: Iterator[Refitted] | None, steps: Written) -> Plan:
    """What `write_pruned` does in the first of several processes, in another one: it refits with it, and writes nothing."""
    plan, total = steps.resume(plan), len(plan.layers)
    if not steps.begun:
        steps.done(0, total, None)
    for i in range(steps.first, total):
        done = next(refitted) if refitted is not None else None
        if done is not None:
            plan = plan.with_layer(i, done.layer)
        steps.done(i + 1, total, done)
        del done
    return plan


def add_config(writer: CheckpointWriter, config: PreTrainedConfig, per_layer: PerLayer, model: PreTrainedModel) -> None:
    """Write config.json, and beside it the code that the checkpoint needs where transformers has none. model: one of its class."""
    kinds = type(config), type(model)
    writer.add_file("config.json", modeling.config_json(config, per_layer, auto_map(*kinds)))
    if per_layer:
        writer.add_file(FILE, modelling_file(*kinds))
    if config.model_type in NATIVE:
        writer.add_file(NATIVE[config.model_type].file, NATIVE[config.model_type].code())


def write_pruned(
    source: Source,
    plan: Plan,
    writer: CheckpointWriter,
    recipe: Recipe | None = None,
    refitted: Iterator[Refitted] | None = None,
    vocabulary: Retokenized | None = None,
    steps: Written | None = None,
    turned: Turned = lambda read: read,
) -> tuple[Path, Plan]:
    """Cut the source as a plan says, one block at a time, into a checkpoint. Returns where it lies and the final plan.

    refitted: for each block of the result in turn, the units that it keeps, and tensors that take the place of those
    that are merely cut. vocabulary: the tokenizer's files, where the plan has a vocabulary. steps: where what is
    written is noted; `refitted` then begins with the block after those that are written already. turned: gives tensors
    in another basis of the hidden channels.
    """
    layout = source.layout
    plan.check(layout)
    target, per_layer = target_config(layout, source.config, plan)
    result = modeling.skeleton(target, per_layer)
    weights = None
    model = source.model
    if model is None:
        checkpoint = source.checkpoint
        if checkpoint is None:
            raise UsageError("nothing to cut")
        model = modeling.skeleton(source.config, source.per_layer, dtype=modeling.checkpoint_dtype(checkpoint))
        weights = modeling.Weights(checkpoint, model)

    def write(names: list[str], cut: Callable[[Callable[[str], torch.Tensor]], dict[str, torch.Tensor]]) -> None:
        if weights is not None:
            weights.load(names)
        state = model.state_dict()
        for name, tensor in modeling.to_disk(result, cut(turned(state.__getitem__))).items():
            writer.add(name, tensor)
        if weights is not None:
            weights.unload(names)

    outside = [n for n in layout.tensors if layout.layer_of(n) is None]
    steps = steps or Written(None, writer, Pool())
    plan = steps.resume(plan)
    if not steps.begun:
        write(outside, lambda read: keep_scale(result, layout, source.config, cut_outside(layout, plan, read)))
        steps.done(0, len(plan.layers), None)
    for i in range(steps.first, len(plan.layers)):
        layer = plan.layers[i]
        done = next(refitted) if refitted is not None else None
        if done is not None:
            plan = plan.with_layer(i, done.layer)
        changed = done.tensors if done is not None else {}
        write(layout.block_tensors(layer.source), lambda read, i=i, p=plan, c=changed: cut_block(layout, p, i, read, c))  # type: ignore[misc]
        steps.done(i + 1, len(plan.layers), done)
        del done, changed  # while the next block is refitted
    add_config(writer, target, per_layer, result)
    files = vocabulary.files if vocabulary else {}
    for path in source.checkpoint.side_files() if source.checkpoint else []:
        if place_of(path) not in files:
            writer.copy_file(path)
    for name, content in files.items():
        if content is not None:
            writer.add_file(name, content)
    writer.add_file("plan.json", plan.to_json())
    if recipe is not None:
        writer.add_file("recipe.yaml", recipe.to_yaml())
    own_head_size = modeling.undeclared_head_size(target) is not None
    writer.add_file("README.md", model_card(plan, source.name, per_layer=bool(per_layer), own_head_size=own_head_size))
    reached("files")
    return writer.commit(), plan


def turned_by(source: Source, plan: Plan, scores: Scores) -> Turned:
    """What gives tensors in the basis that hidden channels are cut in; those of the source itself where that is its own."""
    if scores.rotation is None:
        return lambda read: read
    return functools.partial(scores.rotation.reader, source.layout, kept=plan.sizes(None, source.layout)["hidden"])
