"""The per-layer form of each of vLLM's model classes, made when it is asked for by name (PEP 562)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from vllm.model_executor.models.registry import ModelRegistry

from pared.serving.vllm_config import layers_of
from pared.serving.vllm_layers import built_by_themselves, by_layer, values
from pared.serving.vllm_plugin import PREFIX


def __getattr__(name: str) -> Any:
    if not name.startswith(PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = per_layer_class(ModelRegistry.models[name.removeprefix(PREFIX)].load_model_cls(), name)
    globals()[name] = made
    return made


def per_layer_class(native: type, name: str) -> type:
    """A subclass of a model class of vLLM whose decoder layers are built from their own values."""

    class PerLayerModel(native):
        def __init__(self, *, vllm_config: Any, prefix: str = "", **kwargs: Any) -> None:
            config = vllm_config.model_config.hf_config
            self.__dict__["own_values"] = layers_of(config)
            with (
                values(config, {"architectures": [name.removeprefix(PREFIX)]}),
                built_by_themselves(config, vllm_config.compilation_config) as idle,
            ):
                super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
            self.__dict__["idle"] = idle

        def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
            # Some classes take fused tensors apart by the numbers of heads that the config says.
            loaded: set[str] = set()
            for layer, tensors in by_layer(weights):
                with values(self.config, self.own_values.get(layer, {})):
                    loaded |= super().load_weights(tensors) or set()
            return loaded | {n for n, p in self.named_parameters() if any(n.startswith(part) for part in self.idle)}

    PerLayerModel.__name__ = PerLayerModel.__qualname__ = name
    PerLayerModel.__module__ = __name__
    return PerLayerModel
