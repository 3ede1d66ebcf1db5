"""How vLLM reads the config of a checkpoint whose layers differ in size, and what it has to refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub.constants
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.model_executor.models.registry import ModelRegistry
from vllm.transformers_utils.config import HFConfigParser

from pared.errors import ModelError
from pared.modeling import make_config, undeclared_head_size
from pared.per_layer import HEADS, SKIP, PerLayer, layer_config, split
from pared.serving.vllm_plugin import PREFIX

# The attribute of a config object that holds the layers' own entries. vLLM pickles the object to its workers, and hashes
# it to find what it compiled before.
LAYERS = "layers_of_their_own"


class PerLayerConfigParser(HFConfigParser):
    """vLLM's own parser, which also reads configs with per-layer entries."""

    def parse(
        self,
        model: str | Path,
        trust_remote_code: bool,
        revision: str | None = None,
        code_revision: str | None = None,
        **kwargs: Any,
    ) -> tuple[dict[str, Any], PreTrainedConfig]:
        data, _ = PreTrainedConfig.get_config_dict(
            model, revision=revision, local_files_only=huggingface_hub.constants.HF_HUB_OFFLINE
        )
        if not split(data)[1] and not says_head_size(data):
            return super().parse(
                model, trust_remote_code=trust_remote_code, revision=revision, code_revision=code_revision, **kwargs
            )
        return {k: v for k, v in data.items() if k != "auto_map"}, read(data, model)


def says_head_size(data: dict[str, Any]) -> bool:
    """Whether a uniform config gives its heads a size that vLLM's own code for the family need not read."""
    architecture = (data.get("architectures") or [""])[0]
    if "head_dim" not in data or data.get("model_type") not in CONFIG_MAPPING or not has_own_code(architecture):
        return False
    return undeclared_head_size(make_config(data)[0]) is not None


def read(data: dict[str, Any], where: object) -> PreTrainedConfig:
    """The config object of the family's own class, with the per-layer entries in it and the per-layer architecture.

    Raises ModelError where vLLM has no class for the architecture.
    """
    # The file that the checkpoint carries for transformers defines a class of the family's own name.
    architecture = str(data.get("auto_map", {}).get("AutoModelForCausalLM") or (data.get("architectures") or [""])[0])
    architecture = architecture.rpartition(".")[2]
    if architecture not in ModelRegistry.get_supported_archs():
        raise ModelError(
            f"vLLM has no model class for {architecture}",
            where=where,
            fix="serve it with transformers (trust_remote_code=True), or prune with --shape uniform a family that vLLM has",
        )
    config, entries = make_config(data)
    config.architectures = [PREFIX + architecture]
    if "quantization_config" in data:
        config.quantization_config = data["quantization_config"]
    hidden = config.attribute_map.get("hidden_size", "hidden_size")
    for i in range(config.num_hidden_layers):
        own = entries.get(i, {})
        if has_own_code(architecture) and hidden not in own and (size := undeclared_head_size(layer_config(config, own))):
            # vLLM's class may divide: what it divides is then what these heads add up to.
            entries[i] = {**own, hidden: size * layer_config(config, own).num_attention_heads}
    setattr(config, LAYERS, {str(i): dict(own) for i, own in sorted(entries.items())})
    return config


def layers_of(config: PreTrainedConfig) -> PerLayer:
    """The per-layer entries that `read` put into a config."""
    return {int(i): own for i, own in getattr(config, LAYERS).items()}


def verifier(architecture: str) -> type[VerifyAndUpdateConfig]:
    """What vLLM runs over its settings for the per-layer form of an architecture: its own rules for it, and ours."""
    native = MODELS_CONFIG_MAP.get(architecture, VerifyAndUpdateConfig)

    class Verifier(VerifyAndUpdateConfig):
        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            native.verify_and_update_config(vllm_config)
            config = vllm_config.model_config.hf_config
            check_layers(config, layers_of(config), vllm_config.parallel_config.tensor_parallel_size)
            if not has_own_code(architecture):
                say_heads(config, layers_of(config), vllm_config.model_config.model_arch_config)

        @staticmethod
        def verify_and_update_model_config(model_config: Any) -> None:
            native.verify_and_update_model_config(model_config)

    return Verifier


def has_own_code(architecture: str) -> bool:
    """Whether vLLM has code of its own for a family; it runs some as transformers' modules instead, and lacks others."""
    known = ModelRegistry.models.get(architecture)
    return known is not None and ".transformers" not in getattr(known, "module_name", "")


def say_heads(config: PreTrainedConfig, entries: PerLayer, described: Any) -> None:
    """Tell vLLM the heads of each layer where it makes the attention itself, beside transformers' modules."""
    for i, own in entries.items():
        if "attention" in own.get(SKIP, ()) or HEADS in own:
            raise ModelError(
                f"layer {i} has no attention, or slopes of its own for its heads, and vLLM has no code of its own for {config.model_type}",
                where=config.model_type,
                fix="serve it with transformers, or prune other structures",
            )
    layers = [layer_config(config, entries.get(i, {})) for i in range(config.num_hidden_layers)]
    described.per_layer_overrides = [
        {
            "total_num_attention_heads": c.num_attention_heads,
            "total_num_kv_heads": getattr(c, "num_key_value_heads", None) or c.num_attention_heads,
        }
        for c in layers
    ]


def check_layers(config: PreTrainedConfig, entries: PerLayer, processes: int) -> None:
    """Refuse what vLLM can not build, before it starts: ModelError says which layer, and which size.

    processes: over how many each layer is split (tensor parallelism).
    """
    number = config.num_hidden_layers
    if all("attention" in entries.get(i, {}).get(SKIP, ()) for i in range(number)):
        raise ModelError("no layer of this model has an attention", where=config.model_type)
    if processes == 1:
        return
    for i in range(number):
        own = entries.get(i, {})
        if HEADS in own:
            raise ModelError(
                f"layer {i} has slopes (ALiBi) of its own for the heads that it kept; they can not be split over processes",
                where=f"tensor parallel size {processes}",
                fix="--tensor-parallel-size 1",
            )
        for name, size in sizes_of(layer_config(config, own), own.get(SKIP, ())).items():
            # vLLM gives each process a copy of KV heads that are fewer than the processes.
            fits = size % processes == 0 or (name == "num_key_value_heads" and size < processes and processes % size == 0)
            if not fits:
                raise ModelError(
                    f"layer {i} has {name} {size}, which does not divide into {processes} equal parts",
                    where=f"tensor parallel size {processes}",
                    fix=f"prune with --align so that every layer's sizes are multiples of {processes}, or use fewer processes",
                )


def sizes_of(config: PreTrainedConfig, skip: Any) -> dict[str, int]:
    """The sizes of one layer that vLLM splits over processes."""
    names = [] if "attention" in skip else ["num_attention_heads", "num_key_value_heads"]
    names += [] if "mlp" in skip else ["intermediate_size"]
    return {n: size for n in names if isinstance(size := getattr(config, n, None), int)}
