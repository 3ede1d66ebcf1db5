"""Writing a recovered model: a plain checkpoint like the one that was trained, or an adapter in PEFT's format."""

from __future__ import annotations

import json
from typing import Any

from torch import nn

from pared import modeling
from pared.checkpoint import Checkpoint
from pared.output import add_config
from pared.plan import Plan
from pared.recovery import Recovery
from pared.report.card import adapter_card, recovery_section
from pared.source import Source
from pared.writer import CheckpointWriter


def write_recovered(
    writer: CheckpointWriter, source: Source, plan: Plan | None, recovery: Recovery, model: nn.Module, report: dict[str, Any]
) -> None:
    """Write what was trained, by one rename, with the settings (recovery.yaml) and the report (recovery.json) beside it.

    A checkpoint has each tensor in the dtype that it had before; weights that no step changed are bit for bit what they were.
    """
    checkpoint = source.checkpoint
    assert checkpoint is not None
    if recovery.method == "lora" and not recovery.merge:
        from pared.recover.adapters import adapter_files

        tensors, config = adapter_files(model)
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.add_file("adapter_config.json", config)
        writer.add_file("README.md", adapter_card(source.name, report))
    else:
        from pared.recover.adapters import merged

        plain = model if recovery.method == "full" else merged(model)
        _write_checkpoint(writer, source, checkpoint, plain)
        if plan is not None:
            writer.add_file("plan.json", plan.to_json())
        if (checkpoint.path / "recipe.yaml").is_file():
            writer.copy_file(checkpoint.path / "recipe.yaml")
        writer.add_file("README.md", _card(checkpoint, source.name) + recovery_section(report))
    for path in checkpoint.side_files():
        writer.copy_file(path)
    writer.add_file("recovery.yaml", recovery.to_yaml())
    writer.add_file("recovery.json", json.dumps(report, indent=2) + "\n")
    writer.commit()


def _write_checkpoint(writer: CheckpointWriter, source: Source, checkpoint: Checkpoint, model: Any) -> None:
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    state = {k: v.detach().cpu() for k, v in model.state_dict().items() if k not in tied}
    for name, tensor in modeling.to_disk(model, state).items():
        known = checkpoint.tensors.get(name)
        writer.add(name, tensor if known is None else tensor.to(modeling.DTYPES.get(known.dtype, tensor.dtype)))
    add_config(writer, source.config, source.per_layer, modeling.skeleton(source.config, source.per_layer))


def _card(checkpoint: Checkpoint, name: str) -> str:
    file = checkpoint.path / "README.md"
    return file.read_text() if file.is_file() else f"---\nbase_model: {name}\nlibrary_name: transformers\n---\n\n# {name}\n"
