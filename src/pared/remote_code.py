"""The modelling file that a per-layer checkpoint carries, so that stock transformers builds it with `trust_remote_code`."""

from __future__ import annotations

import inspect

from transformers import PreTrainedConfig, PreTrainedModel

from pared import models, per_layer

FILE = "modeling_per_layer.py"

# The classes keep their names: transformers looks a family's renaming of tensors up by them.
_CLASSES = """

class {config}(PerLayerConfigMixin, _Config):
    pass


class {model}(PerLayerModelMixin, _Model):
    config_class = {config}
"""


def auto_map(config: type[PreTrainedConfig], model: type[PreTrainedModel]) -> dict[str, str]:
    """What config.json says so that the auto classes find the classes of the file."""
    module = FILE.removesuffix(".py")
    return {"AutoConfig": f"{module}.{config.__name__}", "AutoModelForCausalLM": f"{module}.{model.__name__}"}


def modelling_file(config: type[PreTrainedConfig], model: type[PreTrainedModel]) -> str:
    """The text of the file for models of the given classes."""
    text = inspect.getsource(per_layer)
    after = text.index("\n", text.index("from transformers import ")) + 1
    imports = (
        f"from {_home(config)} import {config.__name__} as _Config\nfrom {_home(model)} import {model.__name__} as _Model\n"
    )
    return text[:after] + imports + text[after:] + _CLASSES.format(config=config.__name__, model=model.__name__)


def _home(kind: type) -> str:
    """Where the file imports a class from: a class of pared's own lies in a file beside it."""
    package, _, module = kind.__module__.rpartition(".")
    return f".{module}" if package == models.__name__ else kind.__module__
