"""Which quantised formats take a model's matrices: what is said of them, and what the alignment that is named does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tiny
from command import pared
from pared.checkpoint import Checkpoint
from pared.report.formats import FORMATS, formats
from pared.report.inspection import describe


def said(model: Path) -> dict[str, dict[str, Any]]:
    described = describe(model)
    return {f["format"]: f for f in formats(described.config, described.per_layer, described.layout)}


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "phi3"])
def test_a_format_fits_where_every_matrix_on_disk_does(family: str, tmp_path: Path) -> None:
    source = tiny.save(tiny.model(family), tmp_path / "dense")
    # Heads of 4 and an odd number of channels: nearly nothing fits what is left.
    tiny.cut(source, out=tmp_path / "out", remove=0.2, align=1)
    for path in (source, tmp_path / "out"):
        with Checkpoint.open(path) as checkpoint:
            shapes = [
                t.shape if family != "gpt2" else t.shape[::-1]  # transposed there
                for n, t in checkpoint.tensors.items()
                if len(t.shape) == 2 and any(w in n for w in ("attn", "mlp", "experts"))
            ]
        for form in FORMATS:
            fits = all(i % form.inputs == 0 and o % form.outputs == 0 for o, i in shapes)
            assert said(path)[form.name]["fits"] == fits, (path.name, form)


def test_the_alignment_that_is_named_makes_it_fit(tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 512}
    source = tiny.save(tiny.model("llama", **sizes), tmp_path / "dense")
    loose = tmp_path / "loose"
    tiny.cut(source, out=loose, structures=("ffn",), remove=0.25, align=1)
    bad = {name: f["align"] for name, f in said(loose).items() if not f["fits"]}
    assert bad and all(bad.values())
    for name, align in bad.items():
        tight = tmp_path / f"align-{align}"
        if not tight.exists():
            tiny.cut(source, out=tight, structures=("ffn",), remove=0.25, align=align)
        assert said(tight)[name]["fits"]
    done = pared("inspect", loose)
    assert done.code == 0 and f"--align {bad['GGUF K-quants']} would" in " ".join(done.out.split())
