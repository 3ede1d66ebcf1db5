"""Rows that are like no text: where they stand, what they hold, and what a refit gains elsewhere by them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import pared
import tiny
from pared import unlikely
from pared.calibration import Batch, sample_from_model
from pared.evaluate.perplexity import Windows, logits_of, measure
from pared.unlikely import ANY, RECONSTRUCTED, random_rows, special_tokens, with_random, with_scrambled


def rows(n: int) -> list[Batch]:
    ids = torch.randint(3, 64, (n, 10), generator=torch.Generator().manual_seed(n))
    return [Batch(row[None]) for row in ids]


def test_scrambled_rows_hold_the_tokens_of_the_text_and_stand_between_its_rows() -> None:
    given = rows(6)
    mixed = with_scrambled(given)
    assert [k for k, row in enumerate(mixed) if any(row is r for r in given)] == [0, 1, 3, 4, 6, 7]
    tokens = torch.cat([r.input_ids.flatten() for r in given])
    for row in mixed[2::3]:
        assert row.input_ids.shape == given[0].input_ids.shape and bool(torch.isin(row.input_ids, tokens).all())
        assert not any(torch.equal(row.input_ids, r.input_ids) for r in given)
    again = with_scrambled(given)
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(mixed, again, strict=True))


def test_random_rows_are_few_leave_special_tokens_out_and_open_as_the_row_before_them() -> None:
    given = rows(2 * ANY)
    mixed = with_random(given, 64, (0, 1, 2, 63, 99))
    added = [k for k, row in enumerate(mixed) if not any(row is r for r in given)]
    assert added == [ANY // 2, ANY // 2 + ANY + 1] and len(mixed) == len(given) + 2
    for k in added:
        ids = mixed[k].input_ids
        assert ids.shape == (1, 10) and ids[0, 0] == mixed[k - 1].input_ids[0, 0]
        drawn = ids[~torch.isin(mixed[k - 1].input_ids, torch.tensor([0, 1, 2, 63]))][1:]
        assert int(drawn.min()) > 2 and int(drawn.max()) < 63
    assert not torch.equal(mixed[added[0]].input_ids, mixed[added[1]].input_ids)
    again, other = with_random(given, 64, (0, 1, 2, 63, 99)), with_random(given, 64, seed=1)
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(mixed, again, strict=True))
    assert not torch.equal(mixed[added[0]].input_ids, other[added[0]].input_ids)
    for n in (0, ANY // 2 - 1, ANY // 2, ANY, 2 * ANY - ANY // 2):
        assert len(with_random(given[:n], 64)) == n + random_rows(n)
    assert random_rows(ANY // 2 - 1) == 0


def test_a_random_row_beside_a_padded_one_is_as_long_as_its_text() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    padded = Batch(torch.tensor([[0, 0, 7, 8, 9]]), mask)
    *_, last = with_random([padded] * (ANY // 2), 64)
    assert last.attention_mask is None and last.input_ids.shape == (1, 3) and last.input_ids[0, 0] == 7


def test_special_tokens_stay_where_they_stand() -> None:
    # Some families' masks and positions follow from them.
    given = [Batch(torch.tensor([[9, 1, 7, 8, 2, 6]]))] * (ANY // 2)
    ids = with_random(given, 1000, (1, 2))[-1].input_ids[0]
    assert ids[0] == 9 and ids[1] == 1 and ids[4] == 2
    assert not bool(torch.isin(ids[[2, 3, 5]], torch.tensor([1, 2, 6, 7, 8])).any())


def test_special_tokens_are_those_of_the_config() -> None:
    config = tiny.config("llama", eos_token_id=[2, 5], image_token_id=40)
    assert special_tokens(config) == {0, 1, 2, 5, 40}


def test_text_unlike_the_calibration_loses_less(storyteller: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = pared.load(storyteller, dtype=torch.float32), AutoTokenizer.from_pretrained(storyteller)
    narrow = sample_from_model(model, tokenizer, 64, 96, 0)
    other = torch.randint(3, len(tokenizer), (16, 96), generator=torch.Generator().manual_seed(9))
    test = Windows(other, torch.ones(16, dtype=torch.int64), None, 16, other.numel())

    def kl(criterion: str, **settings: int) -> float:
        pruned = pared.prune(model, calibration=narrow, remove=0.3, criterion=criterion, seed=0, **settings).model
        assert pruned is not None
        return measure(logits_of(pruned), test, against=logits_of(model)).kl or 0.0

    mixed = kl("l2"), kl("obs"), kl("obs", reconstruct=10)
    monkeypatch.setattr(unlikely, "ANY", 1 << 30)
    alone = kl("l2"), kl("obs"), kl("obs", reconstruct=10)
    assert all(a < b for a, b in zip(mixed, alone, strict=True))


def test_few_sequences_get_none_where_blocks_are_reconstructed() -> None:
    few, enough = RECONSTRUCTED - 1, RECONSTRUCTED
    assert random_rows(few, reconstructed=True) == 0 < random_rows(few)
    assert random_rows(enough, reconstructed=True) == random_rows(enough)
