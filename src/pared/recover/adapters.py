"""LoRA through PEFT: adapters on every linear layer, saved in PEFT's format or merged into the weights."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pared import modeling
from pared.errors import MissingError, UsageError
from pared.recovery import Recovery


def with_adapters(model: PreTrainedModel, recovery: Recovery, base: str) -> Any:
    """The model with LoRA adapters (a PeftModel) whose parameters, fp32, are all that is trained.

    Experts' stacked matrices, which are no linear layers, get adapters too where everything is asked for.
    """
    try:
        from peft import LoraConfig, TaskType, get_peft_model
    except ImportError as error:
        raise MissingError(
            "LoRA needs the package 'peft'", where="--method lora", fix="pip install 'pared[recover]'"
        ) from error
    everything = recovery.target_modules == ("all-linear",)
    stacked = stacked_matrices(model) if everything else []
    more: dict[str, Any] = {"target_parameters": stacked} if stacked else {}
    config = LoraConfig(
        r=recovery.lora_rank,
        lora_alpha=recovery.lora_alpha,
        # PEFT has no dropout for parameters that are not a layer's.
        lora_dropout=0.0 if stacked else recovery.lora_dropout,
        target_modules="all-linear" if everything else list(recovery.target_modules),
        task_type=TaskType.CAUSAL_LM,
        **more,
    )
    torch.manual_seed(recovery.seed)
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise UsageError(
            f"PEFT can not adapt these modules: {error}", where="--target-modules", fix="all-linear fits any"
        ) from error
    adapted.peft_config["default"].base_model_name_or_path = base
    for p in adapted.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    return adapted


def stacked_matrices(model: PreTrainedModel) -> list[str]:
    """Names, inside a block, of 3-D parameters: experts' matrices."""
    _, layers = modeling.blocks(model)
    found = {n for block in layers for n, p in block.named_parameters() if p.ndim == 3}
    return sorted(found)


def merged(adapted: Any) -> PreTrainedModel:
    """The model with its adapters in its weights."""
    return adapted.merge_and_unload()


def adapter_files(adapted: Any) -> tuple[dict[str, torch.Tensor], str]:
    """The adapter's tensors by PEFT's names, and adapter_config.json."""
    from peft import get_peft_model_state_dict

    config = adapted.peft_config["default"]
    config.inference_mode = True
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        text = Path(folder, "adapter_config.json").read_text()
    state: dict[str, torch.Tensor] = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    return {k: v.detach().cpu() for k, v in state.items()}, text


def base_of(adapted: nn.Module) -> PreTrainedModel:
    """The model that a PeftModel adapts."""
    found = adapted.get_base_model() if hasattr(adapted, "get_base_model") else adapted  # type: ignore[operator]
    assert isinstance(found, PreTrainedModel)
    return found
