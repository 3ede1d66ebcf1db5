"""What a model is made of and what can be removed from it, from its config and tensor index alone: no weights are read."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from pared import modeling
from pared.accounting import Account
from pared.axes import count
from pared.budget import Amount, Budget
from pared.budget.uniform import Shape, allocate_uniform, layers_under
from pared.checkpoint import Checkpoint, read_config
from pared.errors import MissingError, ModelError, UsageError
from pared.per_layer import PerLayer
from pared.plan import to_ranges
from pared.proof import proved_layout
from pared.report.formats import formats
from pared.structure import SUBLAYERS, Layout, experts_per_token, sublayer_of
from pared.surgery import written_as

SHARES = (0.1, 0.2, 0.3, 0.5)


@dataclass(frozen=True)
class Described:
    """A model without its weights. nbytes: of its tensors, None where only the config is at hand."""

    name: str
    config: PreTrainedConfig
    per_layer: PerLayer
    layout: Layout
    dtype: torch.dtype
    nbytes: int | None

    @property
    def experts_used(self) -> int | None:
        return experts_per_token(self.config)


def describe(model: str | Path) -> Described:
    """Open a directory (config.json is enough) or a hub id, of which only the config and the tensor headers are fetched."""
    path = Path(model).expanduser()
    if not path.is_dir() and not _local(model):
        data, dtype, nbytes = _from_hub(str(model))
    elif path.is_dir() and (path / "config.json").is_file() and not _has_weights(path):
        data, dtype, nbytes = read_config(path), None, None
    else:
        with Checkpoint.open(path) as checkpoint:
            data, dtype, nbytes = checkpoint.config, modeling.checkpoint_dtype(checkpoint), checkpoint.nbytes
    config, per_layer = modeling.make_config(data)
    said = getattr(config, "dtype", None)
    dtype = dtype or (said if isinstance(said, torch.dtype) else torch.float32)
    name = path.resolve().name if path.is_dir() else str(model)
    return Described(name, config, per_layer, proved_layout(config, per_layer), dtype, nbytes)


def _local(model: str | Path) -> bool:
    """Whether this can only be meant as a path; then Checkpoint.open says what is wrong with it."""
    text = str(model)
    return Path(model).expanduser().exists() or text.startswith((".", "/", "~")) or text.count("/") > 1 or "\\" in text


def _has_weights(path: Path) -> bool:
    return any(True for w in ("*.safetensors", "*.bin", "*.pt", "*.pth", "adapter_config.json") for _ in path.glob(w))


def _from_hub(model: str) -> tuple[dict[str, Any], torch.dtype | None, int | None]:
    """Config, dtype and bytes of a hub model: from the cache where it lies there whole, else by reading the headers."""
    # Slow to import and not needed for a directory.
    from huggingface_hub import get_safetensors_metadata, snapshot_download

    try:
        snapshot = Path(snapshot_download(model, allow_patterns=["config.json"]))
    except Exception as error:
        # The hub's client lets through the errors of whichever HTTP library it is built on.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MissingError(
            f"{model} is no directory here and its config can not be fetched from the hub: {reason}",
            where=model,
            fix="check the spelling; offline, pass the path of a model directory; for a gated model, run: hf auth login",
        ) from error
    try:
        with Checkpoint.open(snapshot) as checkpoint:
            return checkpoint.config, modeling.checkpoint_dtype(checkpoint), checkpoint.nbytes
    except ModelError:
        data = read_config(snapshot)
    try:
        counts = get_safetensors_metadata(model).parameter_count
    except Exception:
        # Without the headers (other formats, no network any more) the config still says all but the bytes on disk.
        return data, None, None
    sizes = {k: modeling.DTYPES[k].itemsize for k in counts if k in modeling.DTYPES}
    if not sizes:
        return data, None, None
    main = max(sizes, key=lambda k: counts[k])
    return data, modeling.DTYPES[main], sum(n * sizes.get(k, 1) for k, n in counts.items())


def inspect_model(model: Described, axes: Sequence[str], shape: str = "uniform", *, align: int | None = None) -> dict[str, Any]:
    """The record that `pared inspect` shows. axes: what is removed where sizes are predicted, equally from all layers;
    shape: "per-layer" where the family's own config need not be able to say these sizes."""
    layout = model.layout
    first = Budget(layout, Amount(0.5), tuple(layout.proofs), align=align, experts_used=model.experts_used)
    before = first.before
    nbytes = model.nbytes if model.nbytes is not None else before.params * model.dtype.itemsize
    return {
        "model": model.name,
        "model_type": layout.model_type,
        "layers": layout.num_layers,
        "sizes": {**layout.sizes, **{a: _units(layout, a) for a in ("kv", "query", "d") if a in layout.layer_sizes[0]}},
        "dtype": str(model.dtype).removeprefix("torch."),
        "bytes": nbytes,
        "weights": "headers" if model.nbytes is not None else "none at hand, bytes are those of the config's dtype",
        **_counts(before, model.dtype),
        "axes": [_axis(model, axis, before, first) for axis in layout.proofs],
        "removes": list(axes),
        "shape": shape,
        "formats": formats(model.config, model.per_layer, layout),
        "predictions": [_predict(model, tuple(axes), shape, share, align, before, nbytes) for share in SHARES],
    }


def _counts(account: Account, dtype: torch.dtype) -> dict[str, int]:
    return {
        "params": account.params,
        "block_params": account.block_params,
        "macs_per_token": account.flops,
        "macs_context": account.context,
        "kv_cache_bytes_per_token": account.kv_cache * dtype.itemsize,
    }


def _units(layout: Layout, axis: str) -> int | list[int]:
    """Units in each layer: one number where all layers that have the axis agree."""
    if axis == "layer":
        return layout.num_layers
    if axis in SUBLAYERS:
        return 1
    if axis in layout.sizes:
        return layout.sizes[axis]
    found = [s[axis] for s in layout.layer_sizes if axis in s]
    return found[0] if len(set(found)) == 1 else found


def _axis(model: Described, axis: str, before: Account, budget: Budget) -> dict[str, Any]:
    layout, proof = model.layout, model.layout.proofs[axis]
    parameters = before.block_params if axis == "layer" else _parameters(layout, axis)
    out: dict[str, Any] = {
        "axis": axis,
        "units": _units(layout, axis),
        "inside": layout.parents.get(axis),
        "parameters": parameters,
        "share": parameters / before.params,
        "proved": proof.holds,
        "difference": proof.difference,
        "reason": proof.reason or None,
        "config": None,
        "multiple_of": 1 if axis == "layer" else budget.step(axis),
    }
    if proof.holds:
        out["config"] = _expressible(model, axis, budget)
    return out


def _parameters(layout: Layout, axis: str) -> int:
    """Entries of all tensors that would be gone if the axis had no unit left."""
    total = 0
    for name, signature in layout.tensors.items():
        if any(axis == sublayer_of(a) for a in signature.axes):
            total += layout.parameters(name)
        elif axis in signature.axes and name not in layout.tied:
            sizes = layout.sizes_at(layout.layer_of(name))
            total += count(signature, sizes, layout.shapes[name]) - count(signature, {**sizes, axis: 0}, layout.shapes[name])
    return total


def _expressible(model: Described, axis: str, budget: Budget) -> dict[str, str]:
    """Model type -> the sizes of the axis that its own config can say. Sizes that none can say are under "per-layer".

    All sizes are tried of an axis with few units, "1-7"; of one with many the multiples that the family's own config takes.
    """
    if axis in model.layout.follows:
        leader, factor = model.layout.follows[axis]
        return {model.layout.model_type: leader if factor == 1 else f"{factor} x {leader}"}
    if axis in model.layout.sublayers:
        return {"per-layer": "any"}
    units = _units(model.layout, axis)
    most = max(units) if isinstance(units, list) else units
    if axis in ("kv", "query", "expert"):
        found: dict[str, list[int]] = {}
        for n in sorted(budget.levels(axis, most)[1:]):
            found.setdefault(_written_as(model, axis, n), []).append(n)
        return {kind: to_ranges(sizes) for kind, sizes in found.items()}
    own = model.layout.model_type
    others = _written_as(model, axis, most - 1) if most > 1 else own
    if others == own:
        return {own: "any"}
    for m in (m for m in range(2, most // 3 + 1) if most % m == 0):
        if all(_written_as(model, axis, most - k * m) == own for k in (1, 2)):
            return {own: f"multiples of {m}", others: "others"}
    return {others: "any"}


def _written_as(model: Described, axis: str, n: int) -> str:
    """The model type whose config says n units of an axis in every layer, "per-layer" where none does."""
    sizes = {} if axis in ("hidden", "layer") else {axis: n}
    return written_as(model.layout, model.config, sizes, n if axis == "hidden" else None) or "per-layer"


def _predict(
    model: Described, axes: tuple[str, ...], form: str, share: float, align: int | None, before: Account, nbytes: int
) -> dict[str, Any]:
    """What a uniform shape would leave; "reason" instead of sizes where the share is out of reach."""
    row: dict[str, Any] = {"remove": share, "of": "block-params"}
    if not axes:
        return {**row, "reason": "out of reach: nothing is proved to be removable"}
    writable = functools.partial(written_as, model.layout, model.config) if form == "uniform" else None
    budget = Budget(model.layout, Amount(share), axes, align=align, experts_used=model.experts_used, written_as=writable)
    try:
        shape = allocate_uniform(budget)
    except UsageError as error:
        return {**row, "reason": error.what}
    after = _after(budget, shape)
    return {
        **row,
        "removed": 1 - after.block_params / before.block_params,
        "bytes": nbytes - (before.params - after.params) * model.dtype.itemsize,
        **_counts(after, model.dtype),
        "sizes": shape.sizes,
        "written_as": writable(shape.sizes, shape.hidden) if writable else model.layout.model_type,
    }


def _after(budget: Budget, shape: Shape) -> Account:
    return budget.count(layers_under(budget, shape.sizes, shape.layers), shape.hidden)
