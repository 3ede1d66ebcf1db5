"""Building causal language models from a config: uniform ones, and per-layer ones whose blocks differ in size.

Nothing here patches sizes into live modules: every block is made by its own class from its own config, on the
meta device, and weights are assigned into it.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging as hf_logging

from pared import models
from pared.checkpoint import Checkpoint
from pared.errors import ModelError
from pared.per_layer import (
    SKIP,
    SKIPPED,
    UNCHECKED,
    PerLayer,
    PerLayerConfigMixin,
    attach,
    build_layers_,
    join,
    split,
    used_config,
)
from pared.per_layer import blocks as find_blocks
from pared.process import return_freed_memory

models.register()
# What a model can be computed in, by the names that users give.
COMPUTE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Buffers that older releases of transformers saved; their content follows from the config.
OBSOLETE = re.compile(r"(rotary_emb\.(inv_freq|cos_cached|sin_cached)|attn(ention)?\.(masked_)?bias)$")

# What the config classes and constructors of transformers raise when sizes do not fit.
REJECTED = (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError, StrictDataclassError)


def make_config(data: Mapping[str, Any]) -> tuple[PreTrainedConfig, PerLayer]:
    """The global config and the per-layer overrides of a parsed config.json."""
    data, per_layer = split({k: v for k, v in data.items() if k not in ("quantization_config", "auto_map")})
    model_type = str(data.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        raise ModelError(
            f"transformers does not know the model type {model_type!r}",
            where="config.json",
            fix="check model_type, or upgrade transformers",
        )
    for i, own in per_layer.items():
        if missing := set(own.get(SKIP, ())) - set(own.get(SKIPPED, {})):
            raise ModelError(
                f"layer {i} does without its {min(missing)}, and {SKIPPED} does not say which parts of a block that is",
                where="config.json",
                fix="ask whoever made this checkpoint how to load it",
            )
    try:
        config = CONFIG_MAPPING[model_type].from_dict(_with_floats(data))
        if getattr(config, "is_heterogeneous", False):
            config.allow_global_per_layer_attribute_access = True
        return config, per_layer
    except REJECTED as error:
        raise ModelError(f"transformers rejects the config: {error}", where="config.json") from error


def undeclared_head_size(config: PreTrainedConfig) -> int | None:
    """The head size that a config says though its class has no such setting, where it is not hidden size / heads.

    transformers reads it; code that knows the family's settings alone (some of vLLM's) divides, and gets another.
    """
    size, heads = getattr(config, "head_dim", None), getattr(config, "num_attention_heads", 0)
    declared = any("head_dim" in vars(kind).get("__annotations__", {}) for kind in type(config).__mro__)
    return None if declared or not size or not heads or size * heads == config.hidden_size else int(size)


def _with_floats(data: Any) -> Any:
    """JSON has no infinity: transformers writes it as {"__float__": "Infinity"}."""
    if isinstance(data, dict):
        if data.keys() == {"__float__"}:
            return float(data["__float__"])
        return {k: _with_floats(v) for k, v in data.items()}
    return [_with_floats(v) for v in data] if isinstance(data, list) else data


def skeleton(config: PreTrainedConfig, per_layer: PerLayer | None = None, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model on the meta device: names, shapes and code, no weights."""
    with torch.device("meta"), _default_dtype(dtype), hf_quiet():
        try:
            model = AutoModelForCausalLM.from_config(used_config(copy.deepcopy(config), per_layer or {}))
        except (*REJECTED, RuntimeError) as error:
            raise ModelError(
                f"transformers can not build this model: {error}", where=f"model type {config.model_type!r}"
            ) from error
        if per_layer:
            build_layers_(model, per_layer)
            _attach_per_layer(model, per_layer)
    return model.eval()


def blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of decoder blocks and its name. ModelError where there is none."""
    try:
        return find_blocks(model)
    except LookupError as error:
        raise ModelError(str(error), fix="pared prunes decoder-only language models") from error


def _attach_per_layer(model: PreTrainedModel, per_layer: PerLayer) -> None:
    """Make the model's config carry the per-layer form, so that save_pretrained writes it."""
    base = type(model.config)
    kind = type(base.__name__, (PerLayerConfigMixin, base), {})
    for config in {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}.values():
        if type(config) is not base:
            continue  # a part for another modality
        config.__class__ = kind
        attach(config, per_layer)


def expected_tensors(data: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes, as on disk, of the tensors that a checkpoint with this config.json must hold."""
    model = skeleton(*make_config(data))
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    state = {k: v for k, v in model.state_dict().items() if k not in tied}
    return {k: tuple(v.shape) for k, v in revert_weight_conversion(model, state).items()}


class Weights:
    """Moves weights between a checkpoint on disk and a model's modules, part by part, through transformers' key conversion."""

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel) -> None:
        self.checkpoint, self.model = checkpoint, model
        self._mapping: list[Any] = get_model_conversion_mapping(model)
        state = model.state_dict()
        renamings = [m for m in self._mapping if isinstance(m, WeightRenaming)]
        converters = [m for m in self._mapping if isinstance(m, WeightConverter)]
        self.disk_names: dict[str, list[str]] = {}
        self._finite: set[str] = set()  # tensors on disk that have been looked through once
        self._converted: set[str] = set()  # targets that are made from other tensors, by transformers' conversion
        unexpected: list[str] = []
        for name in checkpoint.tensors:
            target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
            if target not in state and name in state:
                target = name
            if target in state:
                self.disk_names.setdefault(target, []).append(name)
                if pattern is not None:
                    self._converted.add(target)
            elif not OBSOLETE.search(name):
                unexpected.append(name)
        self._check(state, unexpected, bool(self._converted))
        for m in self._mapping:
            m.collected_tensors.clear()

    def _check(self, state: Mapping[str, Tensor], unexpected: list[str], converted: bool) -> None:
        tied = set(getattr(self.model, "all_tied_weights_keys", {}) or {})
        missing = [] if converted else [n for n in state if n not in self.disk_names and n not in tied]
        where = self.checkpoint.path
        if missing:
            raise ModelError(
                f"{len(missing)} tensors are missing, the first is {missing[0]}",
                where=where,
                fix="download the checkpoint again",
            )
        if unexpected:
            raise ModelError(
                f"{len(unexpected)} tensors do not belong to a {type(self.model).__name__}, the first is {unexpected[0]}",
                where=where,
                fix="check model_type and the number of layers in config.json",
            )
        if not converted:
            for target, (name, *_) in self.disk_names.items():
                got, want = self.checkpoint.tensors[name].shape, tuple(state[target].shape)
                if tuple(got) != want:
                    raise ModelError(
                        f"{name} has shape {list(got)} where the config says {list(want)}",
                        where=where / self.checkpoint.tensors[name].file,
                    )

    def load(
        self,
        names: Iterable[str],
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        fetched: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Fill the named parameters of the model. dtype None keeps each tensor's own, as buffers do in any case.

        fetched: what `fetch` gave for these names.
        """
        wanted = [n for n in names if n in self.disk_names]
        read = dict(self.fetch(wanted, dtype, device) if fetched is None else fetched)
        for target in wanted:
            if target not in self._converted:
                self._assign(target, read.pop(self.disk_names[target][0]).to(device, non_blocking=True))
        if made := [n for n in wanted if n in self._converted]:
            self._convert(made, {n: t.to(device, non_blocking=True) for n, t in read.items()}, device)
        self.model.tie_weights()

    def fetch(
        self, names: Iterable[str], dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> dict[str, Tensor]:
        """Read what the named parameters need: tensors in memory by their name on disk, for `load`. From any thread."""
        out: dict[str, Tensor] = {}
        for target in [n for n in names if n in self.disk_names]:
            owner, _, leaf = target.rpartition(".")
            own = target not in self._converted and leaf in self.model.get_submodule(owner)._buffers
            for disk in self.disk_names[target]:
                tensor = self._read(disk, None if own else dtype)
                out[disk] = tensor.pin_memory() if torch.device(device).type == "cuda" else tensor
        return out

    def _read(self, disk: str, dtype: torch.dtype | None) -> Tensor:
        def finite(part: Tensor) -> None:
            # Both pass a NaN on, and neither needs a copy of the tensor.
            if not all(bool(torch.isfinite(end)) for end in part.aminmax()):
                raise ModelError(
                    f"{disk} holds values that are not finite",
                    where=self.checkpoint.path / self.checkpoint.tensors[disk].file,
                    fix="use a checkpoint whose weights are finite; pared verify lists all that are not",
                )

        number = DTYPES.get(self.checkpoint.tensors[disk].dtype) is not None
        tensor = self.checkpoint.read(disk, dtype, finite if number and disk not in self._finite else None)
        self._finite.add(disk)
        return tensor

    def _assign(self, target: str, tensor: Tensor) -> None:
        owner, _, leaf = target.rpartition(".")
        module = self.model.get_submodule(owner)
        if leaf in module._parameters:
            parameter = nn.Parameter(tensor, requires_grad=False)
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]
            module._parameters[leaf] = parameter
        else:
            module._buffers[leaf] = tensor

    def _convert(self, wanted: list[str], state: dict[str, Tensor], device: torch.device | str) -> None:
        """Tensors that are merged from or split out of others on disk (experts): transformers knows how."""
        for target in wanted:
            # The conversion casts to what the module has; each tensor keeps its own dtype instead.
            meta = self.model.get_parameter_or_buffer(target)
            self._assign(target, torch.empty_like(meta, device="meta", dtype=state[self.disk_names[target][0]].dtype))
        with hf_quiet():
            info, _ = convert_and_load_state_dict_in_model(
                self.model, state, LoadStateDictConfig(weight_mapping=self._mapping, device_map={"": device}), None
            )
        if info.mismatched_keys or info.conversion_errors:
            bad = next(iter(info.mismatched_keys or info.conversion_errors))
            raise ModelError(f"a tensor does not fit the config: {bad}", where=self.checkpoint.path)
        for target in wanted:
            self.model.get_parameter_or_buffer(target).requires_grad_(False)

    def unload(self, names: Iterable[str]) -> None:
        """Give the memory of the named parameters back."""
        for name in names:
            owner, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(owner)
            parameter, buffer = module._parameters.get(leaf), module._buffers.get(leaf)
            if parameter is not None:
                module._parameters[leaf] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
            elif buffer is not None:
                module._buffers[leaf] = torch.empty_like(buffer, device="meta")
        return_freed_memory()


def to_disk(model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names and in the forms that a checkpoint of this model has on disk."""
    return {k: v.contiguous() for k, v in revert_weight_conversion(model, dict(state)).items()}


def fill_buffers(model: PreTrainedModel, module: nn.Module, device: torch.device | str = "cpu") -> None:
    """Compute the buffers that are not saved (rotary frequencies, masks) of a module that was made on the meta device."""
    touched = []
    for part in module.modules():
        lost = {n: b for n in part._non_persistent_buffers_set if (b := part._buffers.get(n)) is not None and b.is_meta}
        for name, buffer in lost.items():
            part._buffers[name] = torch.empty_like(buffer, device=device)
        if lost or (part is not model and isinstance(part, PreTrainedModel)):  # models fill buffers of their blocks
            touched.append(part)
    saved = {id(t) for t in module.state_dict(keep_vars=True).values()}
    for part in touched:
        tensors = [*part.parameters(), *part.buffers()] if isinstance(part, PreTrainedModel) else part.parameters(recurse=False)
        for t in tensors:
            if id(t) in saved:
                t._is_hf_initialized = True  # type: ignore[attr-defined]
    init_(model, touched)


def init_(model: PreTrainedModel, parts: Iterable[nn.Module]) -> None:
    """Initialise parts of a model as the innermost model does that they belong to; marked tensors are left as they are."""
    owners: dict[int, PreTrainedModel] = {}
    for owner in (m for m in model.modules() if isinstance(m, PreTrainedModel)):
        owners.update({id(part): owner for part in owner.modules()})  # inner models come later
    with torch.no_grad():
        for part in parts:
            owners.get(id(part), model)._init_weights(part)


def load(
    path: str | Path | Checkpoint, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """Load a checkpoint, uniform or per-layer, as an ordinary PreTrainedModel.

    dtype: None keeps the checkpoint's. Raises ModelError for anything missing, unexpected or misshapen.
    """
    checkpoint = path if isinstance(path, Checkpoint) else Checkpoint.open(path)
    config, per_layer = make_config(checkpoint.config)
    model = skeleton(config, per_layer, dtype=dtype or checkpoint_dtype(checkpoint))
    weights = Weights(checkpoint, model)
    weights.load(list(model.state_dict()), dtype, device)
    fill_buffers(model, model, device)
    model.config._name_or_path = str(checkpoint.path)
    if (checkpoint.path / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.path)
    for p in model.parameters():
        p.requires_grad_(p.is_floating_point())
    return model


def checkpoint_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that most of a checkpoint's weights have."""
    weight: dict[str, int] = {}
    for t in checkpoint.tensors.values():
        weight[t.dtype] = weight.get(t.dtype, 0) + t.nbytes
    name = max(weight, key=lambda k: weight[k])
    if name not in DTYPES:
        raise ModelError(
            f"weights of dtype {name} can not be pruned", where=checkpoint.path, fix="use an unquantised checkpoint"
        )
    return DTYPES[name]


def config_json(config: PreTrainedConfig, per_layer: PerLayer | None = None, auto_map: Mapping[str, str] | None = None) -> str:
    """config.json as transformers writes it; with the per-layer form, and where the code is that comes along, added if there is one."""
    data = json.loads(config.to_json_string())
    if config.model_type in models.NATIVE:
        data["auto_map"] = models.NATIVE[config.model_type].auto_map
    if per_layer:
        data |= {**join(per_layer), "auto_map": dict(auto_map or {})}
        data |= {k: accepted for k, (accepted, _) in data.get(UNCHECKED, {}).items()}
    return json.dumps(data, indent=2, sort_keys=True) + "\n"


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def hf_quiet() -> Iterator[None]:
    """Without transformers' progress bars and notes about models that pared builds by the dozen."""
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
