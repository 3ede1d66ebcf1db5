"""What is to be pruned: a checkpoint on disk or a live model, with its proved layout."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from pared import modeling
from pared.checkpoint import Checkpoint
from pared.errors import ModelError, UsageError
from pared.per_layer import PerLayer
from pared.proof import proved_layout
from pared.retokenize import Words
from pared.structure import Layout, experts_per_token


@dataclass
class Source:
    """What is to be pruned: a checkpoint on disk or a live model, with its proved layout."""

    checkpoint: Checkpoint | None
    model: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase | None
    config: PreTrainedConfig
    per_layer: PerLayer
    layout: Layout

    @classmethod
    def open(cls, what: str | Path | Checkpoint | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> Source:
        if isinstance(what, PreTrainedModel):
            config, per_layer = modeling.make_config(what.config.to_dict())
            return cls(None, what, tokenizer, config, per_layer, proved_layout(config, per_layer))
        checkpoint = what if isinstance(what, Checkpoint) else Checkpoint.open(what)
        config, per_layer = modeling.make_config(checkpoint.config)
        return cls(checkpoint, None, tokenizer, config, per_layer, proved_layout(config, per_layer))

    def untied(self) -> Source:
        """The same, its head counted and written as a tensor of its own."""
        return replace(self, layout=replace(self.layout, tied={}))

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            if self.checkpoint is None:
                raise UsageError(
                    "calibration from text needs a tokenizer", fix="pass tokenizer=, or calibration ids as a tensor"
                )
            try:
                self.tokenizer = AutoTokenizer.from_pretrained(
                    self.checkpoint.path, config=self.config, trust_remote_code=False
                )
            except (OSError, ValueError) as error:
                raise ModelError(f"the tokenizer can not be loaded: {error}", where=self.checkpoint.path) from error
        return self.tokenizer

    def resident(self, dtype: torch.dtype | None = None, device: str = "cpu") -> PreTrainedModel:
        """The whole model in memory."""
        if self.model is not None:
            return self.model
        if self.checkpoint is None:
            raise UsageError("nothing to load")
        return modeling.load(self.checkpoint, dtype=dtype, device=device)

    @property
    def runnable(self) -> Checkpoint | PreTrainedModel:
        """What a Stream is made from."""
        if self.model is not None:
            return self.model
        if self.checkpoint is None:
            raise UsageError("nothing to run")
        return self.checkpoint

    def words(self) -> Words:
        """The tokenizer in the form in which its vocabulary can be pruned."""
        generation = getattr(self.model, "generation_config", None)
        return Words.open(self.checkpoint, self.tokenizer, self.config, generation and generation.to_dict())

    @property
    def name(self) -> str:
        return self.checkpoint.path.name if self.checkpoint else self.config._name_or_path or self.config.model_type

    @property
    def experts_used(self) -> int | None:
        return experts_per_token(self.config)
