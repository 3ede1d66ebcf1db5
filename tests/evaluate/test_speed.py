"""Laws of the speed and memory figures: they are what a clock and the system say, and the model stays as it was."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pared.errors import UsageError
from pared.evaluate.speed import measure_speed, peak_memory_bytes


def tiny_model(layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = dict(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=layers)
    return LlamaForCausalLM(
        LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, attention_dropout=0.1)
    )


def test_tokens_per_second_are_those_of_a_clock_around_the_forward(monkeypatch):
    """Each forward takes a known time: prefill is one forward over the prompt, decode one forward per token."""
    model = tiny_model()
    forward, seen = model.forward, []

    def slow(**arguments):
        seen.append(arguments["input_ids"].shape)
        time.sleep(0 if len(seen) <= 3 else 0.1)  # a warm-up that counted would be the best of all
        return forward(**arguments)

    monkeypatch.setattr(model, "forward", slow)
    speed = measure_speed(model, prompt=40, decode=2, batch=3, repeats=2)
    assert seen == [(3, 40), (3, 1), (3, 1)] * 3
    assert 0.2 * 3 * 40 / 0.1 < speed.prefill_tokens_per_s < 3 * 40 / 0.1
    assert 0.2 * 3 * 2 / 0.2 < speed.decode_tokens_per_s < 3 * 2 / 0.2


def test_measuring_changes_neither_the_random_state_nor_the_mode_nor_a_weight():
    model = tiny_model().train()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = torch.get_rng_state()
    measure_speed(model, prompt=8, decode=4, repeats=1)
    assert torch.get_rng_state().equal(before) and model.training
    assert all(tensor.equal(weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("sizes", [dict(prompt=0), dict(decode=0), dict(batch=0), dict(repeats=0), dict(prompt=60, decode=5)])
def test_sizes_that_can_not_be_run_are_refused(sizes):
    with pytest.raises(UsageError) as caught:
        measure_speed(tiny_model(), **({"prompt": 8, "decode": 4} | sizes))
    assert caught.value.fix


@pytest.mark.skipif(sys.platform == "win32", reason="the system counts no peak memory")
def test_peak_memory_is_in_bytes_and_stays_when_the_memory_is_given_back():
    # In a process of its own: what other tests held at their peak must not hide what is held here.
    program = """
from pared.evaluate.speed import peak_memory_bytes
before = peak_memory_bytes()
held = bytearray(b"x") * 2**28
del held
print(before, peak_memory_bytes())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert 2**25 < before < 2**34
    assert 0.5 * 2**28 < after - before < 1.1 * 2**28


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_the_peak_is_the_allocators():
    torch.cuda.reset_peak_memory_stats()
    held = torch.ones(2**24, dtype=torch.uint8, device="cuda")
    assert peak_memory_bytes("cuda") == torch.cuda.max_memory_allocated() >= len(held)
    speed = measure_speed(tiny_model().to("cuda"), prompt=8, decode=4)
    assert min(speed.prefill_tokens_per_s, speed.decode_tokens_per_s) > 0
