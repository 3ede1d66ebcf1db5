"""The OpenAI-compatible server of vLLM under load: streams that come at random, some of them broken off by the client."""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import pared
import tiny
from engine import Request, check_greedy, requests
from pared.serving.vllm_cpu import ENVIRONMENT

pytestmark = pytest.mark.vllm

FLAGS = [
    *("--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "16", "--max-num-batched-tokens", "64"),
    *("--enable-prefix-caching", "--enable-chunked-prefill", "--enforce-eager", "--gpu-memory-utilization", "0.2"),
]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextmanager
def server(path: Path, log: Path) -> Iterator[str]:
    """The address of a server on the loopback interface that is ready."""
    import httpx

    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(path), "--served-model-name", "it"]
    environment = {**os.environ, **ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), *FLAGS], env=environment, stdout=out, stderr=out
        )
    address = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 240
        while True:
            assert process.poll() is None and time.monotonic() < until, log.read_text()[-4000:]
            try:
                if httpx.get(f"{address}/health", timeout=5).status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait(60)


async def stream(client: Any, address: str, request: Request, delay: float) -> list[int]:
    """The tokens of one request, as they arrive; the connection is closed where the request is called off."""
    await asyncio.sleep(delay)
    body = {"model": "it", "prompt": request.prompt, "max_tokens": request.tokens, "temperature": 0.0, "stream": True}
    got: list[int] = []
    async with client.stream(
        "POST", f"{address}/v1/completions", json={**body, "ignore_eos": True, "return_token_ids": True}
    ) as r:
        assert r.status_code == 200, await r.aread()
        async for line in r.aiter_lines():
            if line.startswith("data: {"):
                got += json.loads(line.removeprefix("data: "))["choices"][0]["token_ids"] or []
            if request.cancelled_after is not None and len(got) >= request.cancelled_after:
                break
    return got


async def load(address: str, wanted: list[Request], seconds: float) -> list[list[int]]:
    import httpx

    rng = random.Random(1)
    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None)) as client:
        return await asyncio.gather(*(stream(client, address, r, rng.uniform(0, seconds)) for r in wanted))


@pytest.mark.parametrize("shape", ["uniform", "per-layer"])
def test_every_stream_is_what_the_request_gets_alone(shape: str, storyteller: Path, tmp_path: Path) -> None:
    path = tmp_path / "out"
    result = tiny.cut(storyteller, out=path, criterion="l2", remove=0.25, shape=shape)
    assert result.plan.removed >= 0.25
    model = pared.load(path, dtype=torch.float32).eval()
    wanted = requests(model.config.vocab_size, count=96, longest=100)
    with server(path, tmp_path / "log.txt") as address:
        got = asyncio.run(load(address, wanted, seconds=4.0))
        assert check_greedy(model, wanted, got) > 800
        # Called-off requests hold nothing up, and what is cached changes nothing.
        assert check_greedy(model, wanted, asyncio.run(load(address, wanted, seconds=0.5))) > 800
