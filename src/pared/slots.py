"""Bias slots: the same model with biases of zeros where its matrices back into the residual stream have none.

The model computes what it did; what refits it afterwards finds a bias to fit. A uniform shape gets the biases that the
family's own config has switches for (`attention_bias`, `mlp_bias`), so that the result is a stock checkpoint; such a switch
gives the matrices before them biases too, which stay zero. A per-layer shape gets them in the per-layer form, at these matrices alone.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from pared import modeling
from pared.blockparts import bias_of, consumers_of
from pared.errors import UsageError
from pared.per_layer import BIASES, PerLayer, join, split
from pared.proof import proved_layout
from pared.recipe import Recipe
from pared.source import Source
from pared.structure import Layout
from pared.tensorfile import DTYPE_NAMES


def without_bias(source: Source) -> dict[int, list[str]]:
    """Layer -> the matrices back into the residual stream that have no bias and could be given one, by their local names."""
    layout, found = source.layout, {}
    blocks = modeling.blocks(modeling.skeleton(source.config, source.per_layer))[1]
    for i, block in enumerate(blocks):
        consumers = consumers_of(layout, i, dict(block.named_parameters()))
        modules = {n: block.get_submodule(n.rpartition(".")[0]) for n in consumers}
        bare = [n for n, m in modules.items() if _takes_bias(m) and m._parameters.get("bias") is None]
        if bare:
            found[i] = bare
    return found


def _takes_bias(module: nn.Module) -> bool:
    """Whether a module adds a bias that is put into it."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def with_slots(source: Source, recipe: Recipe) -> Source:
    """The source with biases of zeros for the refit that the recipe says, in the form of the recipe's shape.

    UsageError where that shape can not have them, or nothing would fit them.
    """
    if recipe.compensate == "none" or recipe.criterion == "rotation" or "hidden" in (recipe.structures or ()):
        raise UsageError(
            "nothing is refitted here, so biases would stay zero",
            where="--add-bias",
            fix="leave it away, or --compensate refit",
        )
    every = recipe.compensate == "bias"
    bare = without_bias(source)
    if not bare:
        return source
    if recipe.shape == "uniform":
        config, per_layer = _switched(source, bare), source.per_layer
    else:
        config, per_layer = source.config, _in_per_layer_form(source.per_layer, bare)
    made = modeling.skeleton(config, per_layer)
    before = modeling.skeleton(source.config, source.per_layer).state_dict()
    added = {n: tuple(t.shape) for n, t in made.state_dict().items() if n not in before}
    left = [n for i, names in bare.items() for n in names if _full(source.layout, i, bias_of(n)) not in added]
    if not added or (every and left):
        raise UsageError(
            f"a {source.config.model_type} config has no switch for a bias in {left[0].removesuffix('.weight')}",
            where="--shape uniform with --compensate bias" if every else "--add-bias with --shape uniform",
            fix="--shape per-layer, which carries biases in a form of its own"
            + (", or --compensate refit or sequential" if every else ""),
        )
    layout = replace(proved_layout(config, per_layer), added=frozenset(added))
    changed = replace(source, config=config, per_layer=per_layer, layout=layout)
    if source.model is not None:
        return replace(changed, model=_widened(source.model, config, per_layer))
    assert source.checkpoint is not None
    rest, _ = split(source.checkpoint.config)
    rest |= {k: v for k, v in config.to_dict().items() if v != source.config.to_dict().get(k)}
    disk = modeling.to_disk(made, {n: made.state_dict()[n] for n in added})
    dtype = DTYPE_NAMES[modeling.checkpoint_dtype(source.checkpoint)]
    shapes = {n: tuple(t.shape) for n, t in disk.items()}
    return replace(changed, checkpoint=source.checkpoint.with_zeros({**rest, **join(per_layer)}, shapes, dtype))


def _full(layout: Layout, i: int, name: str) -> str:
    return f"{layout.prefix}.{i}.{name}"


def _in_per_layer_form(per_layer: PerLayer, bare: Mapping[int, list[str]]) -> PerLayer:
    out = {i: dict(own) for i, own in per_layer.items()}
    for i, names in bare.items():
        own = out.setdefault(i, {})
        own[BIASES] = sorted({*own.get(BIASES, ()), *(n.rpartition(".")[0] for n in names)})
    return out


def _switched(source: Source, bare: Mapping[int, list[str]]) -> PreTrainedConfig:
    """The config with those switches on that give some of these matrices a bias and change nothing else."""
    before = {n: tuple(t.shape) for n, t in modeling.skeleton(source.config, source.per_layer).state_dict().items()}
    wanted = {_full(source.layout, i, bias_of(n)) for i, names in bare.items() for n in names}
    on: dict[str, Any] = {}
    for key, value in source.config.to_dict().items():
        if value is not False or "bias" not in key:
            continue
        config = copy.deepcopy(source.config)
        setattr(config, key, True)
        state = {n: tuple(t.shape) for n, t in modeling.skeleton(config, source.per_layer).state_dict().items()}
        new = state.keys() - before.keys()
        biases = all(n.endswith(".bias") and n.removesuffix("bias") + "weight" in source.layout.consumers for n in new)
        if new & wanted and biases and all(state.get(n) == shape for n, shape in before.items()):
            on[key] = True
    out = copy.deepcopy(source.config)
    for key in on:
        setattr(out, key, True)
    return out


def _widened(model: PreTrainedModel, config: PreTrainedConfig, per_layer: PerLayer) -> PreTrainedModel:
    """A live model with zeros where it lacks tensors; the others are shared with the given one."""
    some = next(model.parameters())
    made = modeling.skeleton(config, per_layer, dtype=some.dtype)
    old = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for name, empty in made.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        module = made.get_submodule(owner)
        value = old[name].detach() if name in old else torch.zeros(empty.shape, dtype=some.dtype, device=some.device)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        else:
            module._buffers[leaf] = value
    made.tie_weights()
    modeling.fill_buffers(made, made, some.device)
    made.config._name_or_path = model.config._name_or_path
    made.generation_config = model.generation_config
    return made
