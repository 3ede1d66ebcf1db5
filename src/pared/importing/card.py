"""The model card of an imported checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

from pared.models import Native


def import_card(base: str, family: str, model_type: str, notes: Sequence[str], native: Native | None) -> str:
    """README.md: what it was, what it is now, how it is loaded."""
    trust = ", trust_remote_code=True" if native is not None else ""
    how = (
        f"Transformers has no class with this formula: `{native.file}`, which lies beside the weights, is one. With pared\n"
        "imported it is known already, and `trust_remote_code` is not needed.\n"
        if native is not None
        else "Transformers builds it from its own code.\n"
    )
    remarks = "".join(f"- {note}\n" for note in notes)
    return f"""---
base_model: {base}
library_name: transformers
tags: [pared]
---

# {base}, imported

`{base}` was recognised as {family} and written anew as `{model_type}`: the same function, without the code that was
published with it and does not run under a current transformers.

```python
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("path/to/this/directory"{trust})
```

{how}
{remarks}
`manifest.json` holds the hash of every file (`pared verify` checks them). The licence and the limits of the base model
apply.
"""
