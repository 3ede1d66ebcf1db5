"""What decides a recovery: one validated record, which is saved beside its result."""

from __future__ import annotations

from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator

from pared.errors import UsageError
from pared.recipe import validated

# Batches are made smaller than the largest until a training has so many steps.
LARGEST_BATCH, ENOUGH_STEPS = 8, 1024


class Recovery(BaseModel):
    """Settings of one recovery. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Literal["lora", "full"] = Field(default="full", description="train adapters on the linear layers, or all weights")
    objective: Literal["ce", "distill", "both"] = Field(
        default="distill", description="the text's own tokens, the teacher's distribution, or a mixture of both"
    )
    data: str = Field(
        default="self", description=".txt, .jsonl (text, instructions, chats), a hub data set, or self: what the teacher writes"
    )
    tokens: int | None = Field(default=None, ge=0, description="tokens to train on; by default one pass over the data")
    minutes: float | None = Field(
        default=None, gt=0, description="train for about so long instead; the result then depends on the machine"
    )
    seq_len: int | None = Field(default=None, ge=2, description="tokens in a row; by default 512, or what the model can take")
    packing: Literal["documents", "contiguous", "none"] = Field(
        default="documents",
        description="documents share a row without seeing each other; contiguous: a row is a window of all text; none: a document a row",
    )
    loss_on: Literal["answers", "all"] = Field(default="answers", description="of instructions and chats; all: prompts too")
    batch: int | None = Field(
        default=None, ge=1, description="rows that run together on each process; by default at most 8, so that steps are many"
    )
    accumulate: int = Field(default=1, ge=1, description="batches that make one step")
    learning_rate: float | None = Field(default=None, gt=0, description="peak rate; by default by method and width")
    warmup: float = Field(default=0.1, ge=0, le=1, description="share of the steps in which the rate rises")
    weight_decay: float = Field(default=0.0, ge=0, description="of AdamW")
    max_grad_norm: float = Field(default=1.0, gt=0, description="gradients are clipped to this norm")
    temperature: float = Field(default=1.0, gt=0, description="of both distributions in distillation")
    teacher_topk: int = Field(
        default=0, ge=0, description="keep so many of the teacher's choices a token on disk; 0: the teacher stays in memory"
    )
    mix: float = Field(default=0.5, ge=0, le=1, description="share of distillation in the objective both")
    block_steps: int = Field(
        default=0, ge=0, description="steps of each block towards its dense twin's output, as a first phase"
    )
    lora_rank: int = Field(default=8, ge=1, description="r in PEFT's config")
    lora_alpha: int = Field(default=16, ge=1, description="lora_alpha in PEFT's config")
    lora_dropout: float = Field(default=0.0, ge=0, lt=1, description="lora_dropout in PEFT's config")
    target_modules: tuple[str, ...] = Field(default=("all-linear",), description="target_modules in PEFT's config")
    merge: bool = Field(default=False, description="write a plain checkpoint with the adapters in the weights")
    held_out: float = Field(default=0.05, ge=0, lt=1, description="share of the data that only judges; 0: nothing is judged")
    evaluations: int = Field(default=8, ge=1, description="held-out evaluations, and checkpoints to resume from, in the run")
    patience: int = Field(
        default=3, ge=0, description="stop in the second half after so many evaluations without a better one; 0: never"
    )
    gradient_checkpointing: bool = Field(default=False, description="recompute activations: less memory, a third more time")
    seed: int = Field(default=0, description="of the order of the data, of adapters and of text that is sampled")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="what products are computed in; auto: fp32 on a CPU, else bf16"
    )
    device: Literal["auto", "cpu"] = Field(default="auto", description="auto: the accelerator where there is one")
    deepspeed: str | None = Field(default=None, description="a DeepSpeed config file, passed through")

    @field_validator("target_modules", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(v.strip() for v in value.split(",")) if isinstance(value, str) else value

    @property
    def distils(self) -> bool:
        return self.objective != "ce"

    @property
    def share_of_teacher(self) -> float:
        """Weight of the divergence in the loss; the rest is that of the text's own tokens."""
        return {"ce": 0.0, "distill": 1.0, "both": self.mix}[self.objective]

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def make_recovery(base: dict[str, Any] | None = None, **settings: Any) -> Recovery:
    """Settings from a base and those that override it. UsageError names the one that is wrong."""
    recovery = validated(Recovery, base, settings)
    if recovery.tokens is not None and recovery.minutes is not None:
        raise UsageError("tokens and minutes are two ends of one training", where="--tokens, --minutes", fix="give one of them")
    if recovery.merge and recovery.method != "lora":
        raise UsageError("there are no adapters to merge", where="--merge", fix="--method lora, or leave --merge out")
    return recovery


def default_rate(recovery: Recovery, hidden: int) -> float:
    """The peak learning rate where none is given: falling with width as the scale of useful updates does.

    Chosen on held-out text of a small model (docs/recovery.md).
    """
    return 0.032 / hidden if recovery.method == "full" else 0.02 / hidden**0.5


def default_batch(rows: int, batches: int) -> int:
    """Rows in a batch where no number is given: so few that a training on `rows` has its steps, of `batches` each.

    At equal tokens many small steps teach more than few large ones (docs/recovery.md).
    """
    return max(1, min(LARGEST_BATCH, rows // (ENOUGH_STEPS * batches)))
