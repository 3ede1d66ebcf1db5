"""What can not be discovered about a family, as data. Most families need nothing here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class StandIn:
    """Another family with the same block, whose config can say sizes that the family's own validator rejects.

    unless: config flags that the stand-in's block does not have. set: config entries that make the blocks equal.
    """

    model_type: str
    architecture: str
    unless: tuple[str, ...] = ()
    set: dict[str, Any] = field(default_factory=dict)


# Llama's validator wants hidden_size % num_attention_heads == 0 even where head_dim is given; Mistral's does not.
STAND_INS = {
    "llama": StandIn("mistral", "MistralForCausalLM", unless=("attention_bias", "mlp_bias"), set={"sliding_window": None}),
}
