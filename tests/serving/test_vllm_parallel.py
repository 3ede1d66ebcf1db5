"""Tensor parallelism: each layer is split over processes by its own sizes, and a size that does not divide is named."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import checkpoints
import pared
import tiny
from engine import Engine, check_greedy, requests

pytestmark = pytest.mark.vllm

WANTED = requests(tiny.VOCAB, count=24)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """vLLM over two processes. By itself it would want a memory node for each of them."""
    log = tmp_path_factory.mktemp("two") / "log.txt"
    engine = Engine(log, VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_WORKER_MULTIPROC_METHOD="spawn", OMP_NUM_THREADS="1")
    yield engine
    engine.close()


def test_two_processes_give_what_one_gives(two: Engine, tmp_path: Path) -> None:
    skips = [["attention"], [], [], ["mlp"], []]
    path = checkpoints.without_parts("llama", tmp_path, skips, multiple=2)
    got = two.serve(path, WANTED, tensor_parallel_size=2)
    assert check_greedy(pared.load(path, dtype=torch.float32).eval(), WANTED, got) > 100


def test_a_size_that_does_not_divide_over_processes_is_named(two: Engine, tmp_path: Path) -> None:
    path = checkpoints.per_layer("llama", tmp_path)  # three KV groups in layer 0
    with pytest.raises(RuntimeError, match="layer 0 has num_key_value_heads 3, which does not divide into 2 equal parts"):
        two.serve(path, WANTED[:1], tensor_parallel_size=2)
