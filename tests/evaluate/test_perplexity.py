"""Laws of the evaluation: perplexity is the plain one, KL is the exact one, and how the work is split changes nothing."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pared.calibration import pack, read_documents, tokenize_documents
from pared.errors import ModelError, UsageError
from pared.evaluate import perplexity
from pared.evaluate.perplexity import Windows, logits_of, measure, protocol, windows

SHARED = Path(__file__).resolve().parents[3] / "shared"
STORIES = SHARED / "models" / "stories260K"
TEXT = SHARED / "text" / "stories-test.jsonl"


class LetterTokenizer:
    """The part of a tokenizer that is called here: BOS 0, then a token for each letter."""

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        return {"input_ids": [0] * add_special_tokens + [1 + ord(letter) % 30 for letter in text]}


def tiny_model(seed: int, **changes: object) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes: dict[str, object] = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3)
    return LlamaForCausalLM(LlamaConfig(**(sizes | changes))).eval()


def cut(length: int = 16, stride: int | None = None) -> Windows:
    documents = ["the quick brown fox", "jumps over", "the lazy dog and everything that lies behind it"] * 4
    return windows(documents, LetterTokenizer(), length, stride)


@pytest.fixture(scope="module")
def stories():
    if not STORIES.is_dir() or not TEXT.is_file():
        pytest.skip("the model stories260K or its test text is not here")
    return AutoModelForCausalLM.from_pretrained(STORIES).eval(), AutoTokenizer.from_pretrained(STORIES)


def labels_loss(model: LlamaForCausalLM, ids: torch.Tensor) -> float:
    """The mean of transformers' own loss over windows of equal length, one at a time."""
    with torch.no_grad():
        return sum(float(model(input_ids=row[None], labels=row[None]).loss) for row in ids) / len(ids)


def test_perplexity_equals_that_of_transformers_labels_on_a_trained_model(stories):
    model, tokenizer = stories
    cut_text = windows(TEXT, tokenizer, 256)
    plain = pack(tokenize_documents(read_documents(TEXT), tokenizer), 256)
    assert cut_text.ids.equal(plain)
    quality = measure(logits_of(model), cut_text)
    assert quality.nll == pytest.approx(labels_loss(model, plain), abs=1e-5)
    assert quality.nll == pytest.approx(1.3995, abs=2e-4)  # measured over all windows of the file
    assert quality.perplexity == pytest.approx(math.exp(quality.nll), rel=1e-12)
    assert (quality.tokens, quality.seq_len, quality.stride) == (255 * len(plain), 256, None)
    assert quality.kl is None and quality.top1_agreement is None


@given(st.lists(st.text("abcdefghij", min_size=1, max_size=30), min_size=1, max_size=8), st.integers(2, 20), st.data())
def test_windows_are_slices_of_the_stream_and_no_token_is_scored_twice(documents, length, data):
    stride = data.draw(st.none() | st.integers(1, length))
    stream = [*itertools.chain.from_iterable(tokenize_documents(documents, LetterTokenizer()))]
    if len(stream) < length:
        with pytest.raises(UsageError, match="less than one window"):
            windows(documents, LetterTokenizer(), length, stride)
        return
    made = windows(documents, LetterTokenizer(), length, stride)
    scored = []
    for number, (row, first) in enumerate(zip(made.ids.tolist(), made.first_scored.tolist(), strict=True)):
        begin = number * (stride or length)
        assert row == stream[begin : begin + length] and first >= 1
        scored += range(begin + first, begin + length)
    assert len(scored) == len(set(scored)) == made.tokens
    assert made.dropped == len(stream) - max(scored, default=0) - 1 < (stride or length)
    if stride is not None and stride < length:
        assert scored == list(range(1, len(stream) - made.dropped))


@pytest.mark.parametrize("stride", [1, 3, 8, 15])
def test_strided_loss_equals_one_prediction_at_a_time(stride):
    model, made = tiny_model(0), cut(16, stride)
    stream = list(itertools.chain.from_iterable(row[-stride:] for row in made.ids.tolist()[1:]))
    stream = made.ids[0].tolist() + stream
    losses = []
    with torch.no_grad():
        for position in range(1, len(stream)):
            begin = 0 if position < 16 else math.ceil((position - 15) / stride) * stride
            context = torch.tensor([stream[begin:position]])
            losses.append(-float(model(context).logits[0, -1].double().log_softmax(-1)[stream[position]]))
    quality = measure(logits_of(model), made)
    assert quality.tokens == len(losses) and quality.stride == stride
    assert quality.nll == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def test_a_stride_of_a_whole_window_is_none_at_all():
    model = tiny_model(0)
    plain, strided = measure(logits_of(model), cut(16)), measure(logits_of(model), cut(16, 16))
    assert (plain.nll, plain.tokens) == (strided.nll, strided.tokens)


def test_a_model_has_no_distance_to_itself():
    model = tiny_model(0)
    quality = measure(logits_of(model), cut(), against=logits_of(model))
    assert (quality.kl, quality.top1_agreement) == (0.0, 1.0)


@pytest.mark.parametrize("stride", [None, 5])
def test_divergence_and_agreement_equal_a_computation_in_float64(stride):
    dense, other, made = tiny_model(0), tiny_model(1), cut(16, stride)
    kl, agreed = [], []
    with torch.no_grad():
        for row, first in zip(made.ids, made.first_scored.tolist(), strict=True):
            log_p, log_q = (m(row[None]).logits[0, first - 1 : -1].double().log_softmax(-1) for m in (dense, other))
            kl.append((log_p.exp() * (log_p - log_q)).sum(-1))
            agreed.append(log_p.argmax(-1) == log_q.argmax(-1))
    quality = measure(logits_of(other), made, against=logits_of(dense))
    assert quality.kl == pytest.approx(float(torch.cat(kl).mean()), rel=1e-5) and quality.kl > 0.01
    assert quality.top1_agreement == float(torch.cat(agreed).double().mean())
    assert quality.nll == measure(logits_of(other), made).nll
    swapped = measure(logits_of(dense), made, against=logits_of(other))
    assert swapped.kl != pytest.approx(quality.kl, rel=1e-3)  # KL(dense || pruned) has a direction


@pytest.mark.parametrize("noise", [1e-5, 1e-4, 1e-3])
def test_a_small_divergence_is_right_in_fp32(noise):
    torch.manual_seed(0)
    log_p = (torch.randn(64, 4000) * 3).log_softmax(-1)
    log_q = (log_p + noise * torch.randn_like(log_p)).log_softmax(-1)
    exact_p, exact_q = log_p.double().log_softmax(-1), log_q.double().log_softmax(-1)
    exact = (exact_p.exp() * (exact_p - exact_q)).sum(-1)
    ours = perplexity.divergence(log_p, log_q).double()
    assert float((ours - exact).abs().max()) < 1e-7
    naive = (log_p.exp() * (log_p - log_q)).sum(-1).double()
    assert float((naive - exact).abs().max()) > 1e-7  # what the way it is written is for


def test_a_masked_vocabulary_is_no_nan():
    log_p = torch.tensor([[1.0, 2.0, -math.inf]]).log_softmax(-1)
    log_q = torch.tensor([[2.0, 1.0, -math.inf]]).log_softmax(-1)
    kept = (log_p[:, :2].exp() * (log_p[:, :2] - log_q[:, :2])).sum(-1)
    assert perplexity.divergence(log_p, log_q) == pytest.approx(kept)


@pytest.mark.parametrize("stride", [None, 5])
def test_neither_batch_nor_chunk_size_changes_a_number(stride, monkeypatch):
    dense, other, made = logits_of(tiny_model(0)), logits_of(tiny_model(1)), cut(16, stride)
    whole = measure(other, made, against=dense, batch=100)
    for batch, chunk in ((1, 2**24), (3, 2**24), (4, 32), (4, 5), (100, 96)):
        monkeypatch.setattr(perplexity, "_CHUNK", chunk)
        split = measure(other, made, against=dense, batch=batch)
        assert split.nll == pytest.approx(whole.nll, abs=1e-6) and split.kl == pytest.approx(whole.kl, abs=1e-6)
        assert (split.tokens, split.top1_agreement) == (whole.tokens, whole.top1_agreement)


def test_a_dropout_model_is_measured_without_dropout_and_stays_in_training():
    model = tiny_model(0, attention_dropout=0.5)
    expected = measure(logits_of(model), cut()).nll
    model.train()
    assert measure(logits_of(model), cut()).nll == expected
    assert model.training and model.model.layers[0].self_attn.training


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_an_error_that_names_the_windows(value):
    model, made = tiny_model(0), cut()

    def broken(ids: torch.Tensor) -> torch.Tensor:
        logits = logits_of(model)(ids)
        return torch.where(ids.eq(made.ids[5]).all(1)[:, None, None], torch.full_like(logits, value), logits)

    with pytest.raises(ModelError, match=r"loss is nan\n.*windows \d to \d"):
        measure(broken, made, batch=2)
    with pytest.raises(ModelError, match="KL divergence"):
        measure(logits_of(model), made, against=broken, batch=2)


def test_a_loss_too_large_for_a_float_is_an_infinite_perplexity():
    made = cut()

    def sure_and_wrong(ids: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*ids.shape, 32)
        logits[..., 31] = 1000.0
        return logits

    quality = measure(sure_and_wrong, made)
    assert quality.perplexity == math.inf and quality.nll == pytest.approx(1000)


def test_models_of_different_vocabularies_are_not_compared():
    with pytest.raises(ModelError, match="can not be compared"):
        measure(logits_of(tiny_model(0)), cut(), against=logits_of(tiny_model(1, vocab_size=40)))


@pytest.mark.parametrize("length, stride", [(1, None), (0, None), (65, None), (16, 0), (16, -1), (16, 17)])
def test_windows_that_make_no_sense_are_refused(length, stride):
    with pytest.raises(UsageError) as caught:
        windows(["abc" * 100], LetterTokenizer(), length, stride, max_positions=64)
    assert caught.value.where in ("seq_len", "stride") and caught.value.fix


def test_an_empty_batch_is_refused():
    with pytest.raises(UsageError, match="batch of 0"):
        measure(logits_of(tiny_model(0)), cut(), batch=0)


def test_the_protocol_states_what_was_scored(tmp_path):
    path = tmp_path / "letters.jsonl"
    path.write_text("\n".join(json.dumps({"text": "a" * 9}) for _ in range(5)))
    assert protocol(windows(path, LetterTokenizer(), 16)) == (
        "5 documents tokenised one by one with the tokenizer's own special tokens, concatenated, cut into 3 contiguous "
        "windows of 16 tokens, of which the first token is not scored: 45 tokens scored, the last 2 of 50, too few for a "
        "window, dropped."
    )
    assert protocol(windows(path, LetterTokenizer(), 16, 4)) == (
        "5 documents tokenised one by one with the tokenizer's own special tokens, concatenated, cut into 9 windows of 16 "
        "tokens that begin every 4 tokens, of which the last 4 tokens are scored (in the first window all but its first "
        "token): 47 tokens scored, the last 2 of 50, too few for a window, dropped."
    )
