"""What all tests share: one thread, no network, and the trained models that some of them need."""

from __future__ import annotations

import os
from pathlib import Path

# Before transformers is imported: it reads these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def stories260k() -> Path:
    """A small trained Llama (5 layers, GQA, tied embeddings) that lies beside the repository, not in it."""
    path = ROOT.parent / "shared" / "models" / "stories260K"
    if not path.is_dir():
        pytest.skip(f"the model {path.name} is not at hand")
    return path


@pytest.fixture(scope="session")
def storyteller() -> Path:
    """The model that ships inside the package."""
    path = ROOT / "src" / "pared" / "data" / "storyteller"
    if not (path / "config.json").is_file():
        pytest.skip("this checkout has no shipped model")
    return path
