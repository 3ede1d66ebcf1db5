"""Training text: every token is learnt from exactly where it should be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import made
import tiny
from pared.errors import UsageError
from pared.recover.data import Example, chat_example, hold_out, prompted_example, read_examples, text_example, whole_pieces
from pared.recover.packing import IGNORED, best_fit, collate, isolates, rows_of_epoch, training_rows


def learnt(example: Example) -> list[str]:
    return [w for w, t in zip(made.tokenizer().convert_ids_to_tokens(list(example.ids)), example.target, strict=True) if t]


def test_of_an_instruction_the_answer_and_its_end_are_learnt() -> None:
    example = prompted_example("w1 w2 w3 ", "w4 w5", made.tokenizer())
    assert made.tokenizer().convert_ids_to_tokens(list(example.ids)) == ["<s>", "w1", "w2", "w3", "w4", "w5", "</s>"]
    assert list(example.target) == [False] * 4 + [True] * 3
    assert all(prompted_example("w1 ", "w2", made.tokenizer(), answers_only=False).target)


def test_of_a_chat_what_the_assistant_says_and_its_end_are_learnt() -> None:
    turns = [("user", "w1 w2"), ("assistant", "w3"), ("user", "w4"), ("assistant", "w5 w6")]
    example = chat_example([{"role": r, "content": c} for r, c in turns], made.tokenizer(chat=True))
    words = made.tokenizer().convert_ids_to_tokens(list(example.ids))
    assert learnt(example) == ["w3", "</s>", "w5", "w6", "</s>"]
    # The two answers, not the same words where the user says them, nor the name of the role.
    assert [w for w, t in zip(words, example.target, strict=True) if not t].count("assistant") == 2


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    built = made.tokenizer(chat=True)
    built.chat_template = "{{ messages | length }} " + made.CHAT
    built.chat_template = built.chat_template.replace("{{ messages | length }}", "w{{ messages | length }}")
    turns = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}, {"role": "user", "content": "w3"}]
    with pytest.raises(UsageError, match="writes earlier turns anew"):
        chat_example([*turns, {"role": "assistant", "content": "w4"}], built)


def test_each_form_of_record_is_read(tmp_path: Path) -> None:
    records = [
        {"text": "w1 w2"},
        {"instruction": "w1", "input": "w2", "output": "w3"},
        {"instruction": "w1", "response": "w3"},
        {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w3"}]},
        {"conversations": [{"from": "human", "value": "w1"}, {"from": "gpt", "value": "w3"}]},
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    found = read_examples(str(path), made.tokenizer(chat=True))
    assert [learnt(e) for e in found] == [["<s>", "w1", "w2"], *[["w3", "</s>"]] * 4]
    plain = tmp_path / "alpaca.jsonl"
    plain.write_text(json.dumps(records[1]) + "\n")
    [example] = read_examples(str(plain), made.tokenizer())
    assert learnt(example) == ["w3", "</s>"]


@pytest.mark.parametrize("record", [{"words": "w1"}, {"instruction": "w1"}, ["w1"], {"messages": [{"role": "user"}]}])
def test_a_record_of_no_known_form_is_named(tmp_path: Path, record: object) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"text": "w1 w2"}) + "\n" + json.dumps(record) + "\n")
    with pytest.raises(UsageError) as error:
        read_examples(str(path), made.tokenizer(chat=True))
    assert "line 2" in str(error.value.where)


def documents(tmp_path: Path) -> list[Example]:
    return read_examples(str(made.text(tmp_path / "text.jsonl")), made.tokenizer())


@pytest.mark.parametrize("packing", ["documents", "none"])
def test_an_epoch_holds_every_token_once(tmp_path: Path, packing: str) -> None:
    examples = documents(tmp_path)
    rows = rows_of_epoch(examples, 16, packing, 0)
    assert all(r.tokens <= 16 for r in rows)
    # A last token alone in its row would have nothing to predict it from.
    kept = [e.ids[a : a + 16] for e in examples for a in range(0, len(e.ids), 16) if len(e.ids) - a > 1]
    assert sorted(p.ids for r in rows for p in r.parts) == sorted(kept)
    assert rows == rows_of_epoch(examples, 16, packing, 0) != rows_of_epoch(examples, 16, packing, 1)


def test_best_fit_wastes_little() -> None:
    parts = [Example((0,) * n, (True,) * n) for n in (9, 1, 8, 7, 2, 5, 10, 4, 6, 8)]
    assert len(best_fit(parts, 10)) == 7  # 60 tokens; six rows would leave no gap, and these sizes do not allow it


def test_rows_go_on_until_the_tokens_are_reached(tmp_path: Path) -> None:
    examples = documents(tmp_path)
    rows = training_rows(examples, seq_len=16, packing="documents", seed=0, tokens=2000)
    assert 2000 <= sum(r.tokens for r in rows) < 2016
    assert training_rows(examples, seq_len=16, packing="documents", seed=0, tokens=0) == []


def test_held_out_text_is_not_trained_on(tmp_path: Path) -> None:
    examples = documents(tmp_path)
    learn, aside = hold_out(examples, 0.1, 0)
    assert len(aside) == 4 and sorted(e.ids for e in learn + aside) == sorted(e.ids for e in examples)
    with pytest.raises(UsageError, match="too few to hold some out"):
        hold_out(examples[:5], 0.05, 0)
    one = [text_example(" ".join(made.WORDS * 20), made.tokenizer())]
    assert len(whole_pieces(one, 16)) == -(-(20 * len(made.WORDS) + 1) // 128)


def test_labels_are_the_next_token_of_the_same_document() -> None:
    one, two = Example((5, 6, 7), (False, True, True)), Example((8, 9), (True, True))
    batch = collate([*best_fit([one, two], 6), *best_fit([two], 6)], padding=0, isolated=True)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [8, 9, 0, 0, 0]]
    assert batch["labels"].tolist() == [[6, 7, IGNORED, 9, IGNORED], [9] + [IGNORED] * 4]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "gemma2", "mixtral", "gpt2"])
def test_documents_that_share_a_row_do_not_see_each_other(family: str) -> None:
    """Packed == unpacked: the loss of each document is what it is alone."""
    model = tiny.model(family)
    assert isolates(model, 32)
    parts = [Example(tuple(r.tolist()), (True,) * len(r)) for r in tiny.tokens(3, 9, seed=1)]
    [row] = best_fit(parts, 27)
    batch = collate([row], padding=0, isolated=True)
    with torch.no_grad():
        packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
        for i, part in enumerate(row.parts):
            alone = model(input_ids=torch.tensor([part.ids]), use_cache=False).logits[0]
            assert tiny.close(packed[9 * i : 9 * i + 9], alone)


def test_a_model_that_does_not_isolate_is_found_out() -> None:
    assert not isolates(tiny.model("bloom"), 32)
