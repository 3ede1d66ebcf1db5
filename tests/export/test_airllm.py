"""airllm streams a pruned checkpoint from disk, a layer at a time, and says the tokens that transformers says."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import pared
from pared.modeling import load
from tiny import tokens

pytestmark = pytest.mark.llamacpp
pytest.importorskip("airllm")

EXAMPLE = Path(__file__).parents[2] / "examples" / "stream_with_airllm.py"


def example() -> Any:
    spec = importlib.util.spec_from_file_location("stream_with_airllm", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("shape", ["uniform", "per-layer"])
def test_streamed_tokens_are_those_of_transformers(shape: str, storyteller: Path, tmp_path: Path) -> None:
    allocate = "global" if shape == "per-layer" else "uniform"
    settings = {"criterion": "l2", "compensate": "none", "calibration": tokens(4, 64)}
    pared.prune(storyteller, out=tmp_path / "model", remove=0.2, shape=shape, allocate=allocate, **settings)
    built = load(tmp_path / "model", dtype=torch.float32)
    ids = tokens(1, 8)[0].tolist()
    row = torch.tensor([ids])
    want = built.generate(row, max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
    before = {p.name for p in (tmp_path / "model").iterdir()}
    copy = Path(shutil.copytree(tmp_path / "model", tmp_path / "copy"))
    assert example().stream(copy, ids, 12) == want
    assert {p.name for p in (tmp_path / "model").iterdir()} == before
