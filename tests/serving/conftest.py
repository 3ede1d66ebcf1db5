"""What the tests of engines share."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

from engine import Engine


@pytest.fixture(autouse=True)
def environment(request: pytest.FixtureRequest) -> None:
    """Tests of vLLM are left out where it is not installed. It is not imported here: that would change transformers."""
    if request.node.get_closest_marker("vllm") and importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed: make vllm-test")


@pytest.fixture(scope="session")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """vLLM in a process of its own."""
    engine = Engine(tmp_path_factory.mktemp("vllm") / "log.txt")
    yield engine
    engine.close()
