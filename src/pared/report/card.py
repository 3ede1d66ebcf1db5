"""The model card that travels with a pruned checkpoint."""

from __future__ import annotations

from typing import Any

from pared.models import NATIVE
from pared.plan import Plan, from_ranges

_UNIFORM = """```python
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("path/to/this/directory")
```
"""
_PER_LAYER = """The layers have sizes of their own (`per_layer_config`, `per_layer_shapes` in config.json). A stock
`AutoModelForCausalLM.from_pretrained` refuses this checkpoint, because its models build all layers alike. Load it with
pared, or with the modelling file that lies beside the weights (read it first, it is short):

```python
import pared
model = pared.load("path/to/this/directory")   # an ordinary PreTrainedModel

from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("path/to/this/directory", trust_remote_code=True)
```
"""
_OWN_CLASS = """Transformers has no class for this model. Load it with pared, which has one, or with the modelling file that
lies beside the weights (read it first, it is short):

```python
import pared
model = pared.load("path/to/this/directory")   # an ordinary PreTrainedModel

from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("path/to/this/directory", trust_remote_code=True)
```
"""


_VOCABULARY = """
Tokens were removed too, and those that stay have new ids: use the tokenizer in this directory, not the base model's.
"""


_NARROW = """
The residual stream was made narrower, {hidden} channels, {basis}.
"""
_BASIS = "in a basis of its own: hidden states are no part of the base model's, and the head shares nothing with the embeddings"


_BIASES = """
Matrices back into the residual stream have biases that the base model lacks, fitted to calibration text; they are counted.
"""


_VLLM_PER_LAYER = """vLLM serves it where pared is installed beside it (`pip install pared`); without pared it refuses this checkpoint.
"""
_VLLM_HEADS = """vLLM serves it where pared is installed beside it (`pip install pared`). By itself vLLM may take the head size to be the
hidden size / heads, which is not so here, and fail while it loads the weights.
"""


def model_card(plan: Plan, base: str, *, per_layer: bool, own_head_size: bool = False) -> str:
    """README.md of a pruned checkpoint, every number taken from the plan.

    own_head_size: the config says a head size that its class has no setting for.
    """
    load = _PER_LAYER if per_layer else _OWN_CLASS if plan.model_type in NATIVE else _UNIFORM
    before, after = plan.before, plan.after
    rows = [
        ("parameters", before.params, after.params),
        ("of these in blocks", before.block_params, after.block_params),
        (f"multiply-adds a token (context {before.context})", before.flops, after.flops),
        ("cache entries a token", before.kv_cache, after.kv_cache),
        ("layers", before.layers, after.layers),
    ]
    table = "\n".join(f"| {name} | {a:,} | {b:,} | {1 - b / a if a else 0:.1%} |" for name, a, b in rows)
    recipe = plan.provenance.get("recipe", {})
    how = ", ".join(
        f"{k} {recipe[k]}" for k in ("criterion", "shape", "allocate", "calibration", "samples") if recipe.get(k) is not None
    )
    narrow = ""
    if plan.hidden is not None:
        hidden = len(from_ranges(plan.hidden))
        narrow = _NARROW.format(hidden=hidden, basis=_BASIS if plan.rotated else "some of the base model's")
    words = narrow + (_BIASES if plan.biases else "") + (_VOCABULARY if plan.vocab is not None else "")
    serve = _VLLM_PER_LAYER if per_layer else _VLLM_HEADS if own_head_size else ""
    versions = ", ".join(f"{k} {v}" for k, v in plan.provenance.get("versions", {}).items())
    return f"""---
base_model: {base}
library_name: transformers
tags: [pruned, pared]
---

# {base}, pruned

{plan.removed:.1%} of the {plan.of.replace("-", " ")} of `{base}` were removed: structures, not single weights, so what is here is dense.

| | before | after | removed |
| --- | --- | --- | --- |
{table}

{load}{serve}{words}
`plan.json` says which units were kept in each layer, `recipe.yaml` how they were chosen ({how or "by a given plan"}),
`manifest.json` holds the hash of every file (`pared verify` checks them). Made with {versions or "pared"}.

The licence and the limits of the base model apply. Evaluate before use: `pared eval . --against {base}`.
"""


def recovery_section(report: dict[str, Any]) -> str:
    """What is added to the card of a checkpoint that was trained after pruning, every number taken from the report."""
    return f"""
## Recovered

{_trained(report)} `recovery.yaml` holds the settings, `recovery.json` the losses.
"""


def adapter_card(base: str, report: dict[str, Any]) -> str:
    """README.md of an adapter."""
    return f"""---
base_model: {base}
library_name: peft
tags: [pruned, pared, lora]
---

# An adapter for {base}

{_trained(report)}

```python
import pared
from peft import PeftModel

model = PeftModel.from_pretrained(pared.load("path/to/{base}"), "path/to/this/directory")
model = model.merge_and_unload()   # a plain model
```
"""


def _trained(report: dict[str, Any]) -> str:
    aims = {"ce": "cross-entropy", "distill": "distillation from the dense model", "both": "distillation and cross-entropy"}
    what = "all weights" if report["method"] == "full" else f"LoRA adapters ({report['trained_parameters']:,} parameters)"
    said = f"Trained after pruning: {what}, by {aims[report['objective']]}, {report['tokens']:,} tokens in {report['steps']} steps."
    judged = report.get("held_out") or {}
    if judged.get("best") is not None:
        said += f" Held-out loss {judged['start']:.4f} before, {judged['best']:.4f} after."
    return said
