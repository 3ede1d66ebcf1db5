"""A vLLM engine in a process of its own, requests that come and go, and what transformers gives for each of them alone.

Run as a program this file is that process: it reads jobs as lines of JSON and answers each with one line. It is a process
apart because vLLM changes classes of transformers for the whole process, and the reference should not be changed.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pared.serving.vllm_cpu import ENVIRONMENT

# Two logits closer than this share of the largest are a tie: the engines add up in another order.
TIE = 1e-4
# vLLM's attention on a CPU computes soft caps of scores (Gemma 2) by an approximation: logits differ by up to 1e-3 of the
# largest, by 1e-6 without the cap.
SOFT_CAPPED = 3e-3
SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "gpu_memory_utilization": 0.2,
    "max_model_len": 128,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 64,  # less than some prompts, which so come in chunks
    "enable_prefix_caching": True,
    "enable_chunked_prefill": True,
    "enforce_eager": True,
    "skip_tokenizer_init": True,
    "disable_log_stats": True,
}


@dataclass(frozen=True)
class Request:
    """A prompt, how many tokens are wanted, at which step of the engine it comes, and after how many it is called off."""

    prompt: list[int]
    tokens: int
    arrives: int = 0
    cancelled_after: int | None = None


def requests(vocab: int, *, count: int = 64, longest: int = 40, seed: int = 0) -> list[Request]:
    """Requests of mixed lengths that arrive at random; some share a beginning, some are called off half-way."""
    rng = random.Random(seed)
    shared = [rng.randrange(3, vocab) for _ in range(longest)]
    out = []
    for i in range(count):
        own = [rng.randrange(3, vocab) for _ in range(rng.randint(1, longest))]
        prompt = shared[: rng.choice((0, 0, 16, 34))] + own
        tokens = rng.randint(2, 24)
        out.append(Request(prompt, tokens, rng.randint(0, 60), rng.randint(1, 4) if i % 8 == 5 else None))
    return out


class Engine:
    """The process apart. `serve` gives the tokens of each request; RuntimeError with vLLM's words where it will not."""

    def __init__(self, log: Path, **environment: str) -> None:
        self.log = log
        reader, writer = os.pipe()
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, __file__, str(writer)],
                stdin=subprocess.PIPE,
                stdout=errors,
                stderr=subprocess.STDOUT,
                pass_fds=[writer],
                env={**os.environ, **ENVIRONMENT, **environment},
                text=True,
            )
        os.close(writer)
        self.answers = os.fdopen(reader)

    def serve(self, path: Path, wanted: Sequence[Request], **settings: Any) -> list[list[int]]:
        job = {"path": str(path), "requests": [asdict(r) for r in wanted], "settings": settings}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        line = self.answers.readline()
        if not line:
            raise RuntimeError(f"vLLM's process ended:\n{self.log.read_text()[-4000:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["tokens"]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)
        self.answers.close()


def check_greedy(model: Any, wanted: Sequence[Request], got: Sequence[Sequence[int]]) -> int:
    """Each answer is what transformers gives for the request alone. Returns how many tokens were compared.

    A token may differ where the two best logits are a tie; what comes after it is another text.
    """
    import torch

    compared = ties = 0
    tie = SOFT_CAPPED if getattr(model.config, "attn_logit_softcapping", None) else TIE
    for request, tokens in zip(wanted, got, strict=True):
        least = request.tokens if request.cancelled_after is None else min(request.tokens, request.cancelled_after)
        assert least <= len(tokens) <= request.tokens
        # One pass over the answer gives what each of its tokens was chosen from.
        with torch.no_grad():
            all_logits = model(input_ids=torch.tensor([[*request.prompt, *tokens]]), use_cache=False).logits[0].float()
        for given, row in zip(tokens, all_logits[len(request.prompt) - 1 : -1], strict=True):
            compared += 1
            best = int(row.argmax())
            if given != best:
                assert row[best] - row[given] <= tie * row.abs().max(), (request.prompt, list(tokens), given, best)
                ties += 1
    assert ties <= compared // 100
    return compared


@contextlib.contextmanager
def _engine(path: str, settings: dict[str, Any]) -> Iterator[Any]:
    from vllm import EngineArgs, LLMEngine
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    made = None
    try:
        made = LLMEngine.from_engine_args(EngineArgs(model=path, **{**SETTINGS, **settings}))
        yield made
    finally:
        if made is not None:
            made.engine_core.shutdown()
        del made
        cleanup_dist_env_and_memory()


def _run(made: Any, wanted: Sequence[Request], lora: str | None) -> list[list[int]]:
    """Requests come between the steps of the engine, and are called off between them."""
    from vllm import SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest

    got: list[list[int]] = [[] for _ in wanted]
    waiting, running, step = sorted(range(len(wanted)), key=lambda i: wanted[i].arrives), set[int](), 0
    adapter = None if lora is None else LoRARequest("adapter", 1, lora)
    while waiting or running:
        while waiting and wanted[waiting[0]].arrives <= step:
            i = waiting.pop(0)
            params = SamplingParams(temperature=0.0, max_tokens=wanted[i].tokens, ignore_eos=True, detokenize=False)
            made.add_request(str(i), TokensPrompt(prompt_token_ids=wanted[i].prompt), params, lora_request=adapter)
            running.add(i)
        for out in made.step():
            i = int(out.request_id)
            got[i] = list(out.outputs[0].token_ids)
            limit = wanted[i].cancelled_after
            off = limit is not None and len(got[i]) >= limit
            if off and not out.finished:
                made.abort_request([str(i)])
            if off or out.finished:
                running.discard(i)
        step += 1
    return got


def _work(answers: Any) -> None:
    for line in sys.stdin:
        job = json.loads(line)
        settings = job["settings"]
        lora = settings.pop("lora", None)
        try:
            with _engine(job["path"], settings) as made:
                answer = {"tokens": _run(made, [Request(**r) for r in job["requests"]], lora)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    with os.fdopen(int(sys.argv[1]), "w") as out:
        _work(out)
