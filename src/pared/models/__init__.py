"""Model classes of our own, for old formulas that no class of transformers has. Registered when `pared.modeling` is imported.

Each is one file that needs torch and transformers alone: a checkpoint carries it along, so that it loads without pared.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files


@dataclass(frozen=True)
class Native:
    """Where the classes of a model type lie: the module of this package, and their names in it."""

    module: str
    config: str
    model: str

    @property
    def file(self) -> str:
        return f"{self.module}.py"

    @property
    def auto_map(self) -> dict[str, str]:
        """config.json's auto_map: what the Auto classes find in the file that the checkpoint carries."""
        return {"AutoConfig": f"{self.module}.{self.config}", "AutoModelForCausalLM": f"{self.module}.{self.model}"}

    def code(self) -> str:
        """The text of the file."""
        return (files(__package__) / self.file).read_text()


NATIVE = {
    "baichuan_alibi": Native("baichuan", "BaichuanAlibiConfig", "BaichuanAlibiForCausalLM"),
    "chatglm_6b": Native("chatglm", "ChatGLM6BConfig", "ChatGLM6BForCausalLM"),
}


# Model types of published checkpoints that `pared.importing` turns into these, or into classes of transformers.
IMPORTABLE = ("baichuan", "chatglm")


@cache
def register() -> None:
    """Make the Auto classes know them; their own save_pretrained then carries the file along too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    for model_type, native in NATIVE.items():
        module = importlib.import_module(f"{__package__}.{native.module}")
        config, model = getattr(module, native.config), getattr(module, native.model)
        config.register_for_auto_class()
        model.register_for_auto_class("AutoModelForCausalLM")
        AutoConfig.register(model_type, config, exist_ok=True)
        AutoModelForCausalLM.register(config, model, exist_ok=True)
