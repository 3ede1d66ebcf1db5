"""Pruned vocabularies as a whole: the same text in the same places, the same logits, the same generation, whole on disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import pared
import tiny
import vocabs
from pared.accounting import account
from pared.checkpoint import Checkpoint
from pared.compose import compose
from pared.errors import ModelError, UsageError
from pared.plan import LayerPlan, Plan, from_ranges, to_ranges
from pared.proof import TOLERANCE, proved_layout
from pared.retokenize import Retokenized, Words, prove
from pared.run import Pruned, Source, apply_plan, prune
from pared.surgery import cut_model
from pared.verify import verify
from vocabs import KEPT, UNSEEN

# How the head is held: on its own, shared, with a bias.
HEADS: dict[str, dict[str, Any]] = {"llama": {}, "llama-mqa-tied": {}, "gemma2": {}, "gpt2": {}}


def run(model: Any, text: Path, out: Path | None = None, **settings: Any) -> Pruned:
    return prune(model, out=out, structures=("vocab",), keep_tokens_from=text, **settings)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path, Path]]:
    """kind -> a dense checkpoint with a tokenizer of that kind, its pruned copy, and the text that it was pruned by."""
    done: dict[str, tuple[Path, Path, Path]] = {}

    def make(kind: str) -> tuple[Path, Path, Path]:
        if kind not in done:
            folder = tmp_path_factory.mktemp(kind)
            vocabs.save(folder / "dense", kind)
            text = vocabs.text(folder / "kept.jsonl")
            run(folder / "dense", text, folder / "pruned")
            done[kind] = folder / "dense", folder / "pruned", text
        return done[kind]

    return make


def kept_of(out: Path) -> list[int]:
    return from_ranges(Plan.load(out / "plan.json").vocab or "").tolist()


@torch.no_grad()
def logits(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer


@pytest.mark.parametrize("kind", vocabs.KINDS)
def test_kept_text_is_split_as_before_and_any_text_comes_back(kind: str, made: Any) -> None:
    dense, out, _ = made(kind)
    old, new, kept = AutoTokenizer.from_pretrained(dense), AutoTokenizer.from_pretrained(out), kept_of(out)
    assert type(old) is type(new) and len(new) <= len(kept) < len(old)
    for text in KEPT:
        ids = new(text)["input_ids"]
        assert [kept[i] for i in ids] == old(text)["input_ids"] and new.decode(ids) == old.decode(old(text)["input_ids"])
    for text in UNSEEN if kind in vocabs.SPELL_ALL else []:
        assert new.decode(new(text)["input_ids"]) == old.decode(old(text)["input_ids"])
    assert new.special_tokens_map == old.special_tokens_map
    assert [kept[i] for i in new.all_special_ids] == old.all_special_ids
    assert (
        new("<tool>")["input_ids"][-1] == new.convert_tokens_to_ids("<tool>") == kept.index(old.convert_tokens_to_ids("<tool>"))
    )
    assert verify(out) == []


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("LlamaTokenizer", "byte-fallback"),
        ("GemmaTokenizer", "byte-fallback"),
        ("Qwen2Tokenizer", "byte-level"),
        ("GPT2Tokenizer", "byte-level"),
        ("T5Tokenizer", "unigram"),
        ("BertTokenizer", "wordpiece"),
    ],
)
def test_classes_that_build_their_own_tokenizer_from_the_file_do_too(name: str, kind: str, tmp_path: Path) -> None:
    """Some classes of transformers take the vocabulary from tokenizer.json and the rest from their own code."""
    vocabs.save(tmp_path / "dense", kind, padding=8)
    config = json.loads((tmp_path / "dense" / "tokenizer_config.json").read_text())
    (tmp_path / "dense" / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": name}))
    run(tmp_path / "dense", vocabs.text(tmp_path / "kept.jsonl"), tmp_path / "out")
    old, new, kept = (
        AutoTokenizer.from_pretrained(tmp_path / "dense"),
        AutoTokenizer.from_pretrained(tmp_path / "out"),
        kept_of(tmp_path / "out"),
    )
    assert type(old).__name__ == type(new).__name__ == name
    for text in KEPT:
        assert [kept[i] for i in new(text)["input_ids"]] == old(text)["input_ids"]
    for text in UNSEEN if kind in vocabs.SPELL_ALL else []:
        assert new.decode(new(text)["input_ids"]) == old.decode(old(text)["input_ids"])


def test_the_chat_template_and_what_it_writes_survive(made: Any) -> None:
    dense, out, _ = made("byte-level")
    old, new, kept = AutoTokenizer.from_pretrained(dense), AutoTokenizer.from_pretrained(out), kept_of(out)
    turns = [{"role": "user", "content": KEPT[0]}, {"role": "assistant", "content": KEPT[0]}]
    assert new.chat_template == old.chat_template
    written = [t.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) for t in (old, new)]
    assert written[0] == written[1]
    # Its roles stand nowhere in the text.
    assert [kept[i] for i in new(written[1])["input_ids"]] == old(written[0])["input_ids"]


def test_ids_in_every_file_are_the_new_ones(made: Any, tmp_path: Path) -> None:
    dense, _, text = made("byte-level")
    source = tmp_path / "dense"
    shutil.copytree(dense, source)
    old = AutoTokenizer.from_pretrained(dense)
    tool, eos = old.convert_tokens_to_ids("<tool>"), old.eos_token_id
    generation = {"bos_token_id": 1, "eos_token_id": [eos, tool], "suppress_tokens": [tool, 300], "bad_words_ids": [[tool, 1]]}
    (source / "generation_config.json").write_text(json.dumps(generation))
    (source / "added_tokens.json").write_text(json.dumps({"<tool>": tool}))
    decoder = {str(tool): {"content": "<tool>", "special": True}}
    config = json.loads((source / "tokenizer_config.json").read_text()) | {"added_tokens_decoder": decoder}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    (source / "vocab.json").write_text(json.dumps(old.get_vocab()))
    (source / "merges.txt").write_text("#version: 0.2\n")
    out = run(source, text, tmp_path / "out").report["out"]
    kept, out = kept_of(Path(out)), Path(out)
    assert 300 not in kept
    assert json.loads((out / "generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": [eos, kept.index(tool)],
        "suppress_tokens": [kept.index(tool)],
        "bad_words_ids": [[kept.index(tool), 1]],
    }
    assert json.loads((out / "added_tokens.json").read_text()) == {"<tool>": kept.index(tool)}
    assert list(json.loads((out / "tokenizer_config.json").read_text())["added_tokens_decoder"]) == [str(kept.index(tool))]
    assert not (out / "vocab.json").exists() and not (out / "merges.txt").exists()
    assert json.loads((out / "config.json").read_text())["vocab_size"] == len(kept)


def test_a_tokenizer_in_its_old_files_gets_the_new_one(tmp_path: Path) -> None:
    """GPT-2's vocab.json and merges.txt alone: transformers makes tokenizer.json of them."""
    vocabs.save(tmp_path / "dense", "byte-level", "gpt2")
    spec = json.loads((tmp_path / "dense" / "tokenizer.json").read_text())["model"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "dense" / name).unlink()
    (tmp_path / "dense" / "vocab.json").write_text(json.dumps(spec["vocab"]))
    merges = [m if isinstance(m, str) else " ".join(m) for m in spec["merges"]]
    (tmp_path / "dense" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    special = {"tokenizer_class": "GPT2Tokenizer", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "dense" / "tokenizer_config.json").write_text(json.dumps(special))
    out = tmp_path / "out"
    run(tmp_path / "dense", vocabs.text(tmp_path / "kept.jsonl"), out)
    old, new, kept = AutoTokenizer.from_pretrained(tmp_path / "dense"), AutoTokenizer.from_pretrained(out), kept_of(out)
    assert [kept[i] for i in new(KEPT[1])["input_ids"]] == old(KEPT[1])["input_ids"] and len(kept) < len(old)
    assert not (out / "vocab.json").exists() and (out / "tokenizer.json").exists() and verify(out) == []


def test_a_tokenizer_that_does_otherwise_is_not_written(made: Any) -> None:
    dense, out, _ = made("byte-level")
    words = Source.open(dense).words()
    good = Retokenized(kept_of(out), {}, AutoTokenizer.from_pretrained(out))
    assert prove(words, good, KEPT, exact=True)["documents_split_alike"] == len(KEPT)
    spec = json.loads((out / "tokenizer.json").read_text())
    last = vocabs.tokenizer("byte-level")(KEPT[0])["input_ids"][-2]
    spec["model"]["merges"] = [m for m in spec["model"]["merges"] if "".join(m) != "Ġthe"]
    other = AutoTokenizer.from_pretrained(out)
    other._tokenizer = type(other._tokenizer).from_str(json.dumps(spec))
    with pytest.raises(ModelError, match="document 1 is split in another way"):
        prove(words, Retokenized(good.kept, {}, other), KEPT, exact=True)
    shifted = [*good.kept[:-2], good.kept[-1], max(good.kept) + 1]
    with pytest.raises(ModelError, match="and became"):
        prove(words, Retokenized(shifted, {}, good.tokenizer), KEPT, exact=True)
    with pytest.raises(ModelError, match="is split in another way"):
        prove(words, good, UNSEEN, exact=True)
    assert last in good.kept


# ---------------------------------------------------------------------------------------------------------------------
# The model


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_can_lose_tokens(family: str) -> None:
    proof = proved_layout(tiny.config(family)).proofs["vocab"]
    assert proof.holds and proof.difference is not None and proof.difference <= TOLERANCE


def biased() -> PreTrainedModel:
    """Phi's head has a bias."""
    from transformers import PhiConfig

    config = PhiConfig(
        **{**tiny._GQA, "num_key_value_heads": 8, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        model.lm_head.bias.normal_()
    return model


@pytest.mark.parametrize("family", [*HEADS, "phi"])
def test_logits_of_kept_tokens_are_the_dense_ones(family: str) -> None:
    config = {k: None for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = biased() if family == "phi" else tiny.model(family, **config)
    layout = proved_layout(model.config)
    kept = torch.tensor([0, 3, 4, 5, 9, 20, 33, 34, 35, 50, 63])
    nothing = account(layout)
    plan = Plan(
        model_type=layout.model_type,
        before=nothing,
        after=nothing,
        vocab=to_ranges(kept.tolist()),
        layers=[LayerPlan(source=i) for i in range(layout.num_layers)],
    )
    result = cut_model(model, layout, plan)
    new = torch.randint(0, len(kept), (2, 14), generator=torch.Generator().manual_seed(0))
    assert tiny.close(tiny.logits(result, new), tiny.logits(model, kept[new])[..., kept])
    assert result.config.vocab_size == len(kept) == result.get_input_embeddings().weight.shape[0]
    tied = bool(model.config.tie_word_embeddings)
    same = result.get_input_embeddings().weight is result.get_output_embeddings().weight
    assert same == tied and torch.equal(result.get_input_embeddings().weight, model.get_input_embeddings().weight[kept])
    assert sum(p.numel() for p in result.parameters()) == account(layout, vocab=len(kept)).params


@pytest.mark.parametrize("kind", ["byte-level", "unigram-bytes"])
def test_the_account_is_what_the_files_count_to(kind: str, made: Any) -> None:
    dense, out, _ = made(kind)
    plan = Plan.load(out / "plan.json")
    for path, counted in ((dense, plan.before), (out, plan.after)):
        assert counted.params == Checkpoint.open(path).num_parameters
        assert counted.params == sum(p.numel() for p in pared.load(path).parameters())
    assert plan.removed == 1 - plan.after.params / plan.before.params > 0 and plan.of == "params"
    assert plan.after.block_params == plan.before.block_params and plan.after.flops < plan.before.flops
    assert len(kept_of(out)) % 8 == 0
    stock = AutoModelForCausalLM.from_pretrained(out)
    assert tiny.equal_states(stock, pared.load(out))


def test_generation_is_the_same_while_all_of_it_is_kept(made: Any) -> None:
    dense, out, _ = made("byte-level")
    model, result, kept = pared.load(dense), pared.load(out), kept_of(out)
    old, new = AutoTokenizer.from_pretrained(dense), AutoTokenizer.from_pretrained(out)
    # The dense model is made to choose among kept tokens, so that both can say the same.
    gone = [i for i in range(len(old)) if i not in kept]
    bias = {(i,): -1e9 for i in gone}
    for text in KEPT[:2]:
        options = {"max_new_tokens": 24, "do_sample": False}
        want = model.generate(torch.tensor([old(text)["input_ids"]]), sequence_bias=bias, **options)[0].tolist()
        got = result.generate(torch.tensor([new(text)["input_ids"]]), **options)[0].tolist()
        assert [kept[i] for i in got] == want and new.decode(got) == old.decode(want)


def test_the_end_of_text_still_ends_it(made: Any) -> None:
    _, out, _ = made("byte-level")
    result, new = pared.load(out), AutoTokenizer.from_pretrained(out)
    assert result.generation_config.eos_token_id == result.config.eos_token_id == new.eos_token_id
    with torch.no_grad():
        result.lm_head.weight.zero_()  # every token alike but for the end
        result.lm_head.weight[new.eos_token_id] = 0
    ids = torch.tensor([new(KEPT[0])["input_ids"]])
    direction = result.model(input_ids=ids).last_hidden_state[0, -1].detach()
    with torch.no_grad():
        result.lm_head.weight[new.eos_token_id] = direction
    got = result.generate(ids, max_new_tokens=5, do_sample=False)[0].tolist()
    assert got[len(ids[0]) :] == [new.eos_token_id]


def test_from_python_the_tokenizer_comes_with_the_model(tmp_path: Path) -> None:
    words = vocabs.tokenizer("byte-fallback")
    model = tiny.model("llama", vocab_size=len(words), eos_token_id=2, bos_token_id=1, pad_token_id=0)
    result = run(model, vocabs.text(tmp_path / "kept.jsonl"), tokenizer=words)
    kept = from_ranges(result.plan.vocab or "").tolist()
    ids = result.tokenizer(KEPT[1])["input_ids"]  # type: ignore[misc]
    old = words(KEPT[1])["input_ids"]
    assert [kept[i] for i in ids] == old
    assert tiny.close(logits(result.model, ids), logits(model, old)[:, kept])
    assert result.model.generation_config.eos_token_id == kept.index(2)
    assert result.model.generation_config is not model.generation_config and model.config.vocab_size == len(words)
    # Written, the tokenizer lies beside the weights.
    run(model, tmp_path / "kept.jsonl", tmp_path / "out", tokenizer=words)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(KEPT[1])["input_ids"] == ids and verify(tmp_path / "out") == []


# ---------------------------------------------------------------------------------------------------------------------
# How many


def test_rows_without_a_token_go_first_and_the_amount_is_met(tmp_path: Path) -> None:
    vocabs.save(tmp_path / "dense", "byte-level", padding=64)
    text = vocabs.text(tmp_path / "kept.jsonl")
    rows = Source.open(tmp_path / "dense").layout.sizes["vocab"]
    all_of_it = run(tmp_path / "dense", text)
    least = len(from_ranges(all_of_it.plan.vocab or ""))
    seen: list[int] = []
    for share in (0.01, 0.05, all_of_it.plan.removed):
        plan = run(tmp_path / "dense", text, remove=share, dry_run=True).plan
        kept = from_ranges(plan.vocab or "").tolist()
        assert (
            plan.removed >= share and len(kept) % 8 == 0 and set(from_ranges(all_of_it.plan.vocab or "").tolist()) <= set(kept)
        )
        each = (plan.before.params - plan.after.params) / (rows - len(kept))
        assert plan.before.params * (plan.removed - share) < 8 * each  # by less than one step of alignment more
        seen.append(len(kept))
    assert seen == sorted(seen, reverse=True) and seen[-1] == least
    assert max(kept) < rows - 64
    with pytest.raises(UsageError, match=r"vocab can give between 0% and"):
        run(tmp_path / "dense", text, remove=all_of_it.plan.removed + 0.01)
    assert len(from_ranges(run(tmp_path / "dense", text, align=100).plan.vocab or "")) == -(-least // 100) * 100


def test_a_token_without_a_row_keeps_its_place_behind_the_rows(tmp_path: Path) -> None:
    words = vocabs.tokenizer("byte-level", extra=("<tool>",))
    tiny.save(tiny.model("llama", vocab_size=len(words) - 1), tmp_path / "dense")
    words.save_pretrained(tmp_path / "dense")
    run(tmp_path / "dense", vocabs.text(tmp_path / "kept.jsonl"), tmp_path / "out")
    new, kept = AutoTokenizer.from_pretrained(tmp_path / "out"), kept_of(tmp_path / "out")
    assert new.convert_tokens_to_ids("<tool>") == len(kept) == pared.load(tmp_path / "out").config.vocab_size


@pytest.mark.parametrize("shape", ["uniform", "per-layer"])
def test_what_was_pruned_can_lose_tokens_and_lose_more(shape: str, tmp_path: Path) -> None:
    vocabs.save(tmp_path / "dense", "byte-fallback")
    blocks = {"compensate": "none", "criterion": "l1", "remove": 0.3}
    prune(tmp_path / "dense", out=tmp_path / "blocks", shape=shape, structures=("ffn",), **blocks)
    text = vocabs.text(tmp_path / "kept.jsonl")
    run(tmp_path / "blocks", text, tmp_path / "once", shape=shape)
    run(tmp_path / "once", vocabs.text(tmp_path / "less.jsonl", KEPT[:1]), tmp_path / "twice", align=1)
    dense, once, twice = (AutoTokenizer.from_pretrained(tmp_path / d) for d in ("dense", "once", "twice"))
    assert len(twice) < len(once) < len(dense) and verify(tmp_path / "twice") == []
    ids = [t(KEPT[0])["input_ids"] for t in (dense, once, twice)]
    first, second = kept_of(tmp_path / "once"), kept_of(tmp_path / "twice")
    assert [second[i] for i in ids[2]] == ids[1] and [first[i] for i in ids[1]] == ids[0]
    both = [first[i] for i in second]
    want = logits(pared.load(tmp_path / "blocks"), ids[0])[:, both]
    assert tiny.close(logits(pared.load(tmp_path / "twice"), ids[2]), want)


def test_rare_tokens_are_not_needed(tmp_path: Path) -> None:
    vocabs.save(tmp_path / "dense", "byte-level")
    text = vocabs.text(tmp_path / "kept.jsonl", [*KEPT * 3, UNSEEN[0]])
    facts = [run(tmp_path / "dense", text, min_count=n, align=1).report["vocabulary"] for n in (1, 2)]
    assert facts[1]["after"] < facts[0]["after"]
    assert [f["documents_split_alike"] for f in facts] == [10, 9] and [f["documents_proved"] for f in facts] == [10, 10]


def test_the_vocabulary_and_the_blocks_share_one_budget(made: Any, tmp_path: Path) -> None:
    dense, vocab_alone, text = made("byte-level")
    settings = {"keep_tokens_from": text, "of": "params", "structures": ("vocab", "kv", "query", "ffn")}
    rest = {"calibration": torch.tensor([[5, 9, 300, 20, 7, 8]] * 4), "compensate": "none", "criterion": "l2"}
    alone = Plan.load(vocab_alone / "plan.json")
    for shape in ("uniform", "per-layer"):
        share = alone.removed + 0.2
        out = tmp_path / shape
        plan = prune(dense, out=out, remove=share, shape=shape, **settings, **rest).plan
        assert plan.vocab == alone.vocab and share <= plan.removed < share + 0.1
        assert plan.after.block_params < plan.before.block_params
        assert plan.after.params == Checkpoint.open(out).num_parameters and verify(out) == []
    # Where tokens alone give more than was asked for, the blocks stay as they are.
    plan = prune(dense, remove=alone.removed / 2, dry_run=True, **settings, **rest).plan
    assert plan.after.block_params == plan.before.block_params and plan.removed == pytest.approx(alone.removed)
    with pytest.raises(UsageError, match=rf"vocab, kv, query, ffn can give between {alone.removed:.1%} and"):
        prune(dense, remove=0.99, **settings, **{**rest, "criterion": "taylor", "calibration": "never-read.txt"})


def test_a_refit_goes_with_a_pruned_vocabulary(made: Any, tmp_path: Path) -> None:
    dense, _, text = made("byte-level")
    options = {"structures": ("vocab", "ffn"), "remove": 0.3, "of": "block-params", "samples": 4, "seq_len": 8, "batch": 4}
    result = prune(dense, out=tmp_path / "out", keep_tokens_from=text, calibration=str(text), **options)
    assert result.plan.vocab is not None and result.plan.removed >= 0.3 and verify(tmp_path / "out") == []


# ---------------------------------------------------------------------------------------------------------------------
# Plans


def test_a_plan_is_applied_with_the_tokenizer(made: Any, tmp_path: Path) -> None:
    dense, out, _ = made("byte-fallback")
    again = apply_plan(dense, Plan.load(out / "plan.json"), tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json", "model.safetensors"):
        assert (again / name).read_bytes() == (out / name).read_bytes()


def test_a_plan_that_breaks_the_tokenizer_is_refused(made: Any, tmp_path: Path) -> None:
    dense, out, _ = made("byte-level")
    plan = Plan.load(out / "plan.json")
    kept = kept_of(out)
    words = Words.open(Checkpoint.open(dense), None, Source.open(dense).config)
    for gone, message in ((1, "needs token 1,|token 1 is not kept"), (60, "needs token 60")):
        fewer = plan.model_copy(update={"vocab": to_ranges(i for i in kept if i != gone)})
        with pytest.raises((ModelError, UsageError), match=message):
            apply_plan(dense, fewer, tmp_path / "broken")
    with pytest.raises(UsageError, match="tokens that this model does not have"):
        apply_plan(dense, plan.model_copy(update={"vocab": f"0-{words.rows}"}), tmp_path / "broken")
    assert not (tmp_path / "broken").exists()


def test_two_plans_after_one_another_are_one(tmp_path: Path) -> None:
    model = tiny.model("llama", bos_token_id=None, eos_token_id=None, pad_token_id=None)
    dense = proved_layout(model.config)

    def plan(layout: Any, **fields: Any) -> Plan:
        now = account(layout)
        layers = [LayerPlan(source=i) for i in range(layout.num_layers)]
        return Plan(model_type="llama", before=now, after=now, layers=layers, **fields)

    first = plan(dense, vocab="0-9 20-40 60")
    middle = cut_model(model, dense, first)
    between = proved_layout(middle.config)
    second = plan(between, vocab="1 3-15 31", hidden="0-15")
    once = compose(first, second, dense, between)
    assert once.vocab == "1 3-9 20-25 60"
    assert tiny.equal_states(cut_model(model, dense, once), cut_model(middle, between, second))
    third = plan(between, hidden="0-15")
    assert compose(first, third, dense, between).vocab == first.vocab


# ---------------------------------------------------------------------------------------------------------------------
# Trained models


def test_a_trained_model_loses_tokens(stories260k: Path, tmp_path: Path) -> None:
    text = stories260k.parents[1] / "text" / "stories-test.jsonl"
    few = tmp_path / "few.jsonl"
    few.write_text("".join(text.read_text().splitlines(keepends=True)[:40]))
    run(stories260k, few, tmp_path / "out")
    model, result, kept = pared.load(stories260k), pared.load(tmp_path / "out"), kept_of(tmp_path / "out")
    old, new = AutoTokenizer.from_pretrained(stories260k), AutoTokenizer.from_pretrained(tmp_path / "out")
    document = json.loads(few.read_text().splitlines()[3])["text"]
    ids = new(document)["input_ids"]
    assert [kept[i] for i in ids] == old(document)["input_ids"] and len(kept) < 512
    assert tiny.close(logits(result, ids), logits(model, old(document)["input_ids"])[:, kept], 1e-4)
    assert new.decode(new("Zoë 😀 never!")["input_ids"]) == old.decode(old("Zoë 😀 never!")["input_ids"])


def test_the_shipped_model_loses_tokens(storyteller: Path, tmp_path: Path) -> None:
    text = tmp_path / "kept.txt"
    text.write_text("Once upon a time there was a little girl. She had a red ball, and she played with her dog all day.")
    result = run(storyteller, text, tmp_path / "out")
    assert result.plan.removed > 0.05 and verify(tmp_path / "out") == []
    old, new = AutoTokenizer.from_pretrained(storyteller), AutoTokenizer.from_pretrained(tmp_path / "out")
    kept = kept_of(tmp_path / "out")
    assert [kept[i] for i in new(text.read_text())["input_ids"]] == old(text.read_text())["input_ids"]
    for other in UNSEEN:
        assert new.decode(new(other)["input_ids"]) == old.decode(old(other)["input_ids"])


def test_a_tokenizer_that_is_given_takes_the_place_of_the_one_beside_the_weights(made: Any, tmp_path: Path) -> None:
    dense, _, text = made("byte-level")
    words = vocabs.tokenizer("byte-level", extra=("<other>",))
    result = run(dense, text, tmp_path / "out", tokenizer=words)
    new = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert new.get_vocab() == result.tokenizer.get_vocab()  # type: ignore[union-attr]
    assert "<other>" in new.get_vocab() and "<tool>" not in new.get_vocab()
    kept = kept_of(tmp_path / "out")
    assert [kept[i] for i in new(KEPT[0])["input_ids"]] == words(KEPT[0])["input_ids"]
