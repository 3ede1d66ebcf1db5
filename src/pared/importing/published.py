"""Old checkpoints as they were published: their settings read one by one, and what becomes of each of their tensors."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig

from pared.checkpoint import INDEX, SINGLE, Checkpoint
from pared.errors import ModelError

# What older releases of transformers wrote into every config, none of which changes what a decoder computes.
_EVERYWHERE = {
    *("torch_dtype", "model_type", "architectures", "auto_map", "tokenizer_class", "use_cache", "gradient_checkpointing"),
    *("torchscript", "pruned_heads", "tf_legacy_loss", "use_bfloat16", "use_return_dict", "finetuning_task", "prefix"),
    *("task_specific_params", "tie_encoder_decoder", "cross_attention_hidden_size", "add_cross_attention", "is_decoder"),
    *("initializer_range", "classifier_dropout", "sep_token_id", "decoder_start_token_id", "bad_words_ids"),
    "attn_implementation",
}


@dataclass(frozen=True)
class Move:
    """A tensor of the old checkpoint and what is made of it.

    split: gives one tensor for each target from a private copy of the old one, which it may change.
    """

    source: str
    shape: tuple[int, ...]
    targets: tuple[str, ...]
    split: Callable[[Tensor], Sequence[Tensor]] = lambda t: (t,)


@dataclass(frozen=True)
class Conversion:
    """How one old checkpoint becomes one that transformers builds.

    config: of the result, without its dtype. made: tensors that follow from the config, by name. derived: a pattern of
    old tensors that follow from the config and are left behind. notes: what the user should know, in sentences.
    """

    family: str
    config: dict[str, Any]
    moves: tuple[Move, ...]
    derived: str = r"(?!)"
    made: dict[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Settings:
    """The settings of an old config.json. What nobody asked for when `finish` is called is refused, not ignored."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._config, self._where = checkpoint.config, checkpoint.path / "config.json"
        self._asked = _EVERYWHERE | PreTrainedConfig().to_dict().keys() | GenerationConfig().to_dict().keys()

    def size(self, *names: str, default: int | None = None) -> int:
        """A whole number above zero, under the first of these names that the config has."""
        value = self._any(names, default)
        if type(value) is not int or value < 1:
            raise self._refused(f"{names[0]} is {value!r}, not a whole number above zero")
        return value

    def number(self, *names: str, default: float | None = None) -> float:
        """A number above zero."""
        value = self._any(names, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise self._refused(f"{names[0]} is {value!r}, not a number above zero")
        return float(value)

    def flag(self, name: str, *, default: bool) -> bool:
        value = self._any((name,), default)
        if not isinstance(value, bool):
            raise self._refused(f"{name} is {value!r}, neither true nor false")
        return value

    def optional(self, name: str, default: Any = None) -> Any:
        """Whatever the config says there."""
        self._asked |= {name}
        return self._config.get(name, default)

    def only(self, name: str, *allowed: Any, why: str) -> None:
        """Refuse a setting that has another value than these; where it is not said it is the first. why: a reason."""
        value = self.optional(name, allowed[0])
        if value not in allowed:
            raise self._refused(f"{name} is {value!r}: {why}")

    def tokens(self, *names: str) -> dict[str, Any]:
        """Token ids as they are."""
        return {n: self.optional(n) for n in names}

    def ignore(self, *names: str) -> None:
        """Settings that change nothing in what is computed from the weights, up to rounding."""
        self._asked |= set(names)

    def finish(self) -> None:
        if unknown := sorted(k for k in self._config if k not in self._asked and not k.startswith("_")):
            raise self._refused(f"the config has a setting that this import does not know: {unknown[0]!r}")

    def _any(self, names: tuple[str, ...], default: Any) -> Any:
        self._asked |= set(names)
        return next((self._config[n] for n in names if self._config.get(n) is not None), default)

    def _refused(self, what: str) -> ModelError:
        return ModelError(what, where=self._where, fix="only the published formulas are imported; see docs/importing.md")


def modelling_code(checkpoint: Checkpoint) -> str:
    """The text of the modelling file that was published with a checkpoint, "" without one. It is read, never run."""
    return "\n".join(p.read_text(errors="replace") for p in sorted(checkpoint.path.glob("modeling_*.py")))


def tokenizer_note(checkpoint: Checkpoint) -> str | None:
    """What to know about a tokenizer that is code of the model's authors, None where it is not."""
    path = checkpoint.path / "tokenizer_config.json"
    try:
        data = json.loads(path.read_bytes()) if path.exists() else {}
    except ValueError as error:
        raise ModelError(f"tokenizer_config.json is not valid JSON: {error}", where=path, fix="fetch the file again") from error
    if "AutoTokenizer" not in data.get("auto_map", {}) or (checkpoint.path / "tokenizer.json").exists():
        return None
    return (
        "The tokenizer is code of the model's authors for an older transformers. Its files are carried along and nothing of "
        "them was run: read tokenization_*.py, then try AutoTokenizer.from_pretrained(..., trust_remote_code=True)."
    )


def refuse_pickles(model: str | Path) -> None:
    """ModelError for a directory whose weights are only there as .bin, with the command that converts them."""
    path = Path(model).expanduser()
    if not path.is_dir() or (path / SINGLE).exists() or (path / INDEX).exists() or not sorted(path.glob("pytorch_model*.bin")):
        return
    # Tensor by tensor and without the model's code, which does not run under a current transformers.
    code = (
        "import glob, json, torch; from safetensors.torch import save_file; index = {}; "
        "convert = lambda f, s: (save_file({k: v.clone() for k, v in s.items()}, f), index.update(dict.fromkeys(s, f))); "
        "[convert(f[8:-4] + '.safetensors', torch.load(f, map_location='cpu', weights_only=True)) "
        "for f in sorted(glob.glob('pytorch_model*.bin'))]; "
        f"json.dump({{'weight_map': index}}, open({INDEX!r}, 'w'))"
    )
    raise ModelError(
        "the weights are only there as pytorch_model*.bin, and loading such a file can run code",
        where=path,
        fix=f"convert them first: cd {shlex.quote(str(path))} && python -c {shlex.quote(code)}",
    )


def check_tensors(checkpoint: Checkpoint, conversion: Conversion) -> None:
    """ModelError for a tensor that is missing, misshapen or not known, before anything is written."""
    found, moves = checkpoint.tensors, {m.source: m for m in conversion.moves}
    config = "check the number of layers and the sizes in config.json, or fetch the checkpoint again"
    if missing := [n for n in moves if n not in found]:
        raise ModelError(
            f"{len(missing)} tensors of a {conversion.family} are missing, the first is {missing[0]}",
            where=checkpoint.path,
            fix=config,
        )
    if unknown := [n for n in found if n not in moves and not re.fullmatch(conversion.derived, n)]:
        raise ModelError(
            f"{len(unknown)} tensors do not belong to a {conversion.family}, the first is {unknown[0]}",
            where=checkpoint.path / found[unknown[0]].file,
            fix=config,
        )
    for name, move in moves.items():
        if found[name].shape != move.shape:
            raise ModelError(
                f"{name} has shape {list(found[name].shape)} where the config says {list(move.shape)}",
                where=checkpoint.path / found[name].file,
                fix=config,
            )
