"""The plugin that vLLM loads by itself (entry point `vllm.general_plugins`): it serves per-layer checkpoints.

vLLM calls `register` in every process, before it reads a model. A checkpoint without `per_layer_config` is then read and
built as if pared were not there. For the others, each architecture that vLLM has a class for gets a second name, under
which that class builds every decoder layer from the layer's own values (`vllm_layers`).
"""

from __future__ import annotations

PREFIX = "PerLayer"


def register() -> None:
    """Give every architecture of vLLM its per-layer name, and have configs read by `vllm_config.PerLayerConfigParser`."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.transformers_utils import config as vllm_configs

    from pared.serving.vllm_config import PerLayerConfigParser, verifier

    for architecture in [a for a in ModelRegistry.get_supported_archs() if not a.startswith(PREFIX)]:
        own = PREFIX + architecture
        ModelRegistry.register_model(own, f"pared.serving.vllm_models:{own}")
        MODELS_CONFIG_MAP[own] = verifier(architecture)
    # Not through vLLM's decorator, which warns that the name is taken: this parser adds to the one that has it.
    vllm_configs._CONFIG_FORMAT_TO_CONFIG_PARSER["hf"] = PerLayerConfigParser
