"""Small real tokenizers of every kind, trained when they are first asked for, and texts to prune them by."""

from __future__ import annotations

import json
import random
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import tiny
from pared.modeling import hf_quiet

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]
_TEXT = (
    "the a cat dog sat on mat and then ran away over little hill where old tree stood happy birds sang song morning "
    "under bridge water flows slowly down into valley people working farming evening children playing reading stories "
    "winter summer garden flower window kitchen mother father sister brother naïve café straße 日本 語 привет мир"
)
# What is kept: some of the words, none of the later ones.
KEPT = [
    "the cat sat on the mat.",
    "a little dog ran away, then the old cat sat under the tree; happy birds sang!",
    "café naïve: 日本 12 - the dog's mat",
]
UNSEEN = [
    "children playing in the evening garden 😀",
    "привет мир — zażółć gęślą jaźń",
    "\tx  y\n\nz {q} <|end|>",
    "日 本 語 ß",
]
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


def corpus() -> list[str]:
    draw, words = random.Random(0), _TEXT.split()
    lines = [" ".join(draw.choice(words) for _ in range(9)).capitalize() + draw.choice(".!?;") for _ in range(400)]
    return [*lines, *KEPT, "0 1 2 3 4 5 6 7 8 9 - , ' : ; ! ? ."]


def _byte_level(**options: Any) -> Tokenizer:
    """As GPT-2 and Llama 3 have it."""
    built = Tokenizer(models.BPE(**options))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    built.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=460, initial_alphabet=alphabet, special_tokens=SPECIAL))
    return built


def _byte_fallback() -> Tokenizer:
    """As Llama 2 has it: bytes among the tokens, spaces as a sign, merges for single tokens by more than one way."""
    built = Tokenizer(models.BPE(unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.Metaspace()
    built.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=260, special_tokens=SPECIAL))
    spec = json.loads(built.to_str())
    tokens = [t for t in spec["model"]["vocab"] if t not in SPECIAL]
    vocab = {t: i for i, t in enumerate([*SPECIAL, *BYTES, *tokens])}
    rank = {t: i for t, i in vocab.items() if t in tokens}
    # sentencepiece's form: every pair of tokens that makes a token, in the order of what they make.
    pairs = [(a, t[len(a) :]) for t in tokens for a in (t[:n] for n in range(1, len(t))) if a in rank and t[len(a) :] in rank]
    pairs.sort(key=lambda p: rank[p[0] + p[1]])
    spec["model"] |= {"vocab": vocab, "merges": [list(p) for p in pairs], "byte_fallback": True, "fuse_unk": True}
    spec["pre_tokenizer"] = None
    spec["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    }
    spec["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    }
    return Tokenizer.from_str(json.dumps(spec))


def _suffixed() -> Tokenizer:
    """As the first GPT had it: the end of a word is part of its last token."""
    built = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    built.normalizer = normalizers.Lowercase()
    built.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    built.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=SPECIAL, end_of_word_suffix="</w>")
    built.train_from_iterator(corpus(), trainer)
    return built


def _unigram(*, byte_fallback: bool) -> Tokenizer:
    """As T5, Gemma's elder relatives and XGLM have it."""
    built = Tokenizer(models.Unigram())
    built.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    built.pre_tokenizer = pre_tokenizers.Metaspace()
    built.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>")
    built.train_from_iterator(corpus(), trainer)
    if byte_fallback:
        spec = json.loads(built.to_str())
        spec["model"]["vocab"] += [[b, -20.0] for b in BYTES]
        spec["model"]["byte_fallback"] = True
        spec["decoder"] = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, spec["decoder"]]}
        built = Tokenizer.from_str(json.dumps(spec))
    return built


def _wordpiece() -> Tokenizer:
    """As BERT has it."""
    built = Tokenizer(models.WordPiece(unk_token="<unk>", max_input_chars_per_word=100))
    built.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    built.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    built.decoder = decoders.WordPiece(prefix="##")
    built.train_from_iterator(corpus(), trainers.WordPieceTrainer(vocab_size=330, special_tokens=SPECIAL))
    return built


_MAKE = {
    "byte-level": _byte_level,
    "whole-words-first": lambda: _byte_level(ignore_merges=True),
    "byte-fallback": _byte_fallback,
    "suffixed": _suffixed,
    "unigram": lambda: _unigram(byte_fallback=False),
    "unigram-bytes": lambda: _unigram(byte_fallback=True),
    "wordpiece": _wordpiece,
}
KINDS = tuple(_MAKE)
BPE = ("byte-level", "whole-words-first", "byte-fallback", "suffixed")
SPELL_ALL = ("byte-level", "whole-words-first", "byte-fallback", "unigram-bytes")  # any text has tokens


@lru_cache
def backend(kind: str) -> str:
    """tokenizer.json of one kind, with a BOS in front of every text."""
    built = _MAKE[kind]()
    bos = built.token_to_id("<s>")
    built.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bos)])
    return built.to_str()


def spec(kind: str) -> dict[str, Any]:
    return json.loads(backend(kind))


def tokenizer(kind: str, *, extra: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """extra: special tokens that are added behind the model's own."""
    built = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(backend(kind)),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    built.add_special_tokens({"additional_special_tokens": list(extra)} if extra else {})
    built.chat_template = TEMPLATE
    return built


def save(path: Path, kind: str, family: str = "llama", *, padding: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model with a tokenizer of its own on disk; its embedding has `padding` rows without a token."""
    words = tokenizer(kind, extra=("<tool>",))
    model = tiny.model(family, vocab_size=len(words) + padding, **changes)
    with hf_quiet():
        model.save_pretrained(path)
    words.save_pretrained(path)
    return model


def text(path: Path, documents: list[str] | None = None) -> Path:
    """A .jsonl of documents, KEPT by default."""
    path.write_text("".join(json.dumps({"text": d}) + "\n" for d in (KEPT if documents is None else documents)))
    return path
