"""What a run works with: its limits turned into a batch and room, its journal, and what it notes before it decides."""

from __future__ import annotations

import gc
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from pared import modeling
from pared.calibration import Calibration
from pared.distributed import once, size
from pared.errors import ResourceError, UsageError
from pared.estimate import Progress
from pared.footprint import Footprint
from pared.journal import Journal, reached
from pared.predict import need_of
from pared.process import resident_bytes
from pared.recipe import Recipe
from pared.resolve import DEFAULT_SEQ_LEN, calibrate, compute_dtype
from pared.resources import Limits, Resources, choose, largest_batch
from pared.source import Source
from pared.spill import Pool
from pared.stream import Stream

Result = TypeVar("Result")


@dataclass
class Means:
    """What a run works with: its resources, its journal where it has one, and the pools that were made of the resources."""

    resources: Resources
    journal: Journal | None = None
    pools: list[Pool] = field(default_factory=list)

    def stream(self, source: Source, recipe: Recipe) -> Stream:
        self.pools.append(self.resources.pool())
        return Stream(
            source.runnable,
            source.layout,
            dtype=compute_dtype(recipe),
            device=recipe.device,
            pool=self.pools[-1],
            ahead=self.resources.ahead,
        )


def backing_off(means: Means, work: Callable[[], Result]) -> Result:
    """Do some work again with half the batch where a device runs out of memory, up to three times.

    What the journal holds of it was made with the larger batch, and is let go. ResourceError where several processes
    work together: the others are in the middle of sums that this one would not come to.
    """
    for attempt in range(4):
        try:
            return work()
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
            batch = means.resources.batch
            if attempt == 3 or batch == 1 or size() > 1:
                fix = f"--batch {max(1, batch // 2)}" if batch > 1 else "a shorter --seq-len, or --dtype bfloat16"
                raise ResourceError(f"out of memory: {error}", where=f"--batch {batch}", fix=fix) from error
            means.resources = means.resources.smaller()
        if means.journal is not None:
            means.journal.forget_stages()
            means.journal.write("batch", means.resources.batch)
        gc.collect()  # what the error came from may hold tensors in a circle
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    raise AssertionError("the last attempt returns or raises")


def _out_of_memory(error: RuntimeError) -> bool:
    """Whether a device ran out of memory: the libraries that take some for themselves say so in words of their own."""
    words = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUSOLVER_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(w in str(error) for w in words)


def noted_calibration(source: Source, recipe: Recipe, ids: torch.Tensor | None, journal: Journal | None) -> Calibration:
    """Calibration windows, from the journal where they stand in it."""

    def noted() -> Calibration | None:
        found = journal.read("calibration") if journal is not None else None
        if journal is None or found is None:
            return None
        tensors = journal.read_tensors("calibration")
        return Calibration(tensors["ids"][0], tensors["mask"][0] if "mask" in tensors else None, found["source"])

    if (found := once(noted)) is not None:
        return found
    text = once(lambda: calibrate(source, recipe, ids))
    if journal is not None:
        mask_too = {} if text.attention_mask is None else {"mask": [text.attention_mask]}
        journal.write_tensors("calibration", {"ids": [text.ids], **mask_too})
        journal.write("calibration", {"source": text.source})
        reached("calibrated")
    return text


def key_of(source: Source, recipe: Recipe, ids: torch.Tensor | None) -> dict[str, Any]:
    """What a run that goes on has to agree with the stopped one in."""
    stamp = source.checkpoint.stamp() if source.checkpoint else {}
    given = Calibration(ids, None, "").digest() if ids is not None else None
    text = Path(recipe.calibration)
    file = f"{text.stat().st_size} bytes of {text.stat().st_mtime_ns}" if ids is None and text.is_file() else None
    return {
        "recipe": recipe.model_dump(mode="json"),
        "source": stamp,
        "versions": versions(),
        "calibration": {"ids": given, "file": file},
    }


def versions() -> dict[str, str]:
    return {p: importlib.metadata.version(p) for p in ("pared", "torch", "transformers", "safetensors")}


def resources_of(
    source: Source, recipe: Recipe, ids: torch.Tensor | None, limits: Limits, out: str | Path | None
) -> tuple[Resources, Footprint | None]:
    """What the run may use, decided before it starts; None where nothing but the vocabulary is pruned."""
    stored = modeling.checkpoint_dtype(source.checkpoint) if source.checkpoint else next(source.runnable.parameters()).dtype  # type: ignore[union-attr]
    samples, seq_len = (recipe.windows, recipe.seq_len or DEFAULT_SEQ_LEN) if ids is None else ids.shape
    need = need_of(
        source, recipe, stored=stored, samples=samples, seq_len=seq_len, writes=out is not None, base=resident_bytes()
    )
    if need is None:
        return Resources(recipe.batch), None
    if limits.memory is not None and ids is None and recipe.calibration == "self" and need.source > limits.memory:
        raise UsageError(
            "text that the model writes itself needs the whole model in memory",
            where="--calibration self under --max-memory",
            fix="--calibration FILE",
        )
    beside = Path(out).expanduser().absolute().parent if out is not None else None
    return choose(need, limits, largest_batch(recipe, samples, seq_len), device=recipe.device, beside=beside), need


def tell(progress: Progress, **known: int | None) -> None:
    """Let a progress that shows more than stages know what there is to show."""
    for name, value in known.items():
        if hasattr(progress, name):
            setattr(progress, name, value)
