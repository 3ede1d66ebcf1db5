"""Train a small Llama that finds what it was told a long context ago: keys and values, then prose between them.

    python benchmarks/train_long.py TOKENIZER TEXT --out DIR [--minutes 22] [--piece 14]

TOKENIZER is a directory with a small byte-level tokenizer, as `train_reference.py` makes it; TEXT is prose to learn (.txt,
.jsonl, .txt.xz). The model: 4 layers, hidden 128, FFN 384, 4 query and 2 KV heads of 32, rope theta 100000.
Three kinds of sequences. Random words that are said again and again make the heads that copy (induction heads); lists of
lines that name a key's value, and then name it again in other orders, make them look up a key; prose with such lines at
random depths, and again further on, makes them do it over a distance. The loss is over the prose, and over what can be
known from what came before. Sequences are 64 tokens at first and 2048 in the end: a stage ends when keys are found, or
when its share of the time is spent. Minutes are of processor time.
Stopped at any time (or after --piece minutes) the program goes on from DIR/training.pt. Needs torch 2.9 (Muon).
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from pared.calibration import read_documents
from pared.evaluate.long_context import Wording, words_of

LENGTH = 2048
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": LENGTH,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
    "tie_word_embeddings": True,
}
# How a line names a key's value: the tokens before the key, between the two, and after. The last is what is measured with.
PLAIN = Wording("\n#{key}{value}", "\n#{key}")
WORDED = Wording()


@dataclass(frozen=True)
class Stage:
    """One length of sequences [tokens], tokens of a batch, shares of repeats and of lists, the most keys in a list, the
    share of keys found that ends it, and of the time."""

    length: int
    batch: int
    repeats: float
    lists: float
    keys: int
    goal: float
    time: float
    wordings: tuple[Wording, ...] = (PLAIN, WORDED)


CURRICULUM = (
    Stage(64, 1024, 0.5, 0.5, 8, 0.9, 0.4, (PLAIN,)),
    Stage(128, 2048, 0.3, 0.7, 8, 0.9, 0.2),
    Stage(256, 2048, 0.1, 0.4, 16, 0.95, 0.15),
    Stage(512, 4096, 0.05, 0.35, 32, 0.95, 0.1),
    Stage(1024, 4096, 0.05, 0.3, 64, 0.95, 0.1),
    Stage(LENGTH, 4096, 0.05, 0.3, 64, 2.0, 1.0),
)
# In the last stage two batches of three are short, since prose is learnt from them at less cost.
SHORT = Stage(256, 4096, 0.0, 0.1, 16, 2.0, 1.0)
HELD_OUT = 200_000  # tokens at the end of the text that are not trained on
CHECK_SECONDS = 20  # of processor time
ANSWER_WEIGHT = 4.0
WARM_UP, DECAY = 100, 0.3  # steps; share of the time at the end over which the rate falls

Sequence = tuple[list[int], list[float]]  # ids, and the weight of each in the loss


@dataclass
class Text:
    """Token ids of the prose, and how lines of keys and values are written in tokens."""

    ids: Tensor
    words: list[int]
    bos: int
    lines: dict[Wording, tuple[list[int], list[int], list[int]]]

    def line(self, wording: Wording, key: int, value: int) -> tuple[list[int], int]:
        """The tokens that name a key's value, and where the value is in them."""
        before, between, after = self.lines[wording]
        return [*before, key, *between, value, *after], len(before) + 1 + len(between)


def prepare(tokenizer: PreTrainedTokenizerBase, path: Path, out: Path) -> Text:
    """The text in tokens, which are kept for the next piece."""

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def parts(wording: Wording) -> tuple[list[int], list[int], list[int]]:
        k, v = ids(words[0])[0], ids(words[1])[0]
        told = ids(wording.told.format(key=words[0], value=words[1]))
        return told[: told.index(k)], told[told.index(k) + 1 : told.index(v)], told[told.index(v) + 1 :]

    cache = out / "tokens.pt"
    if not cache.exists():
        rows = tokenizer(read_documents(path), add_special_tokens=False)["input_ids"]
        torch.save(torch.tensor([t for row in rows for t in (*row, *ids("\n"))], dtype=torch.int16), cache)
    words = words_of(tokenizer)
    chosen = sorted(ids(w)[0] for w in words)
    assert isinstance(tokenizer.bos_token_id, int)
    return Text(torch.load(cache).long(), chosen, tokenizer.bos_token_id, {w: parts(w) for w in (PLAIN, WORDED)})


def repeats(text: Text, stage: Stage, draw: random.Random) -> Sequence:
    """Random words, then the same again until the sequence is full: all but the first word of each time is known."""
    said = draw.sample(text.words, draw.randint(8, min(stage.length // 2, len(text.words))))
    ids, weights = [text.bos], [0.0]
    while len(ids) < stage.length:
        weights += [float(i > 0 and len(ids) > 1) for i in range(len(said))]
        ids += said
    return ids[: stage.length], weights[: stage.length]


def lists(text: Text, stage: Stage, draw: random.Random) -> Sequence:
    """Lines of keys and values, then the same lines in other orders until the sequence is full."""
    count, wording = draw.randint(2, stage.keys), draw.choice(stage.wordings)
    chosen = draw.sample(text.words, 2 * count)
    pairs = list(zip(chosen[:count], chosen[count:], strict=True))
    ids, weights, told = [text.bos], [0.0], False
    while len(ids) < stage.length:
        draw.shuffle(pairs)
        for key, value in pairs:
            line, at = text.line(wording, key, value)
            ids += line
            weights += [float(told and i == at) for i in range(len(line))]
        told = True
    return ids[: stage.length], weights[: stage.length]


def prose(text: Text, stage: Stage, draw: random.Random) -> Sequence:
    """Prose in which keys get values at random places, each asked for once or twice later on; half of it without a beginning."""
    length, wording = stage.length, draw.choice(stage.wordings)
    start = draw.randrange(len(text.ids) - HELD_OUT - length)
    body = text.ids[start : start + length].tolist()
    count = draw.randint(1, max(2, length // 64))
    chosen = draw.sample(text.words, 2 * count)
    events: list[tuple[int, int, int, bool]] = []
    for key, value in zip(chosen[:count], chosen[count:], strict=True):
        first = draw.randrange(length)
        events.append((first, key, value, False))
        events += [(draw.randrange(first, length), key, value, True) for _ in range(draw.randint(1, 2))]
    begins = draw.random() < 0.5  # windows of a longer text do not begin with its first token
    ids, weights, done = ([text.bos], [0.0], 0) if begins else ([], [], 0)
    for place, key, value, told in sorted(events, key=lambda e: (e[0], e[3])):
        ids += body[done:place]
        weights += [1.0] * (place - done)
        done = place
        line, at = text.line(wording, key, value)
        ids += line
        weights += [ANSWER_WEIGHT * (told and i == at) for i in range(len(line))]
    ids += body[done:]
    weights += [1.0] * (length - done)
    return ids[:length], weights[:length]


def batch(text: Text, stage: Stage, draw: random.Random) -> tuple[Tensor, Tensor]:
    """Ids and loss weights [rows, length]."""
    shares = (stage.repeats, stage.lists, max(0.0, 1 - stage.repeats - stage.lists))
    makers: list[Callable[[Text, Stage, random.Random], Sequence]] = [repeats, lists, prose]
    rows = [make(text, stage, draw) for make in draw.choices(makers, shares, k=stage.batch // stage.length)]
    return torch.tensor([r for r, _ in rows]), torch.tensor([w for _, w in rows])


def losses(model: LlamaForCausalLM, ids: Tensor, wanted: Tensor) -> Tensor:
    """Loss of the tokens that are wanted [rows, length - 1] -> [n]. Logits are made for them alone."""
    hidden = model.model(ids[:, :-1], use_cache=False).last_hidden_state[wanted]
    return F.cross_entropy(model.lm_head(hidden), ids[:, 1:][wanted], reduction="none")


@torch.no_grad()
def recalled(model: LlamaForCausalLM, text: Text, stage: Stage) -> tuple[float, float]:
    """Share of keys found again in fresh lists, and in prose, of the stage."""
    found = []
    for make in (lists, prose):
        draw, hits, total = random.Random(7), 0, 0
        for _ in range(8):
            ids, weights = (torch.tensor(t) for t in make(text, stage, draw))
            asked = weights[1:] > (0 if make is lists else 1)
            hidden = model.model(ids[None, :-1], use_cache=False).last_hidden_state[0, asked]
            hits += int((model.lm_head(hidden).argmax(-1) == ids[1:][asked]).sum())
            total += int(asked.sum())
        found.append(hits / max(1, total))
    return found[0], found[1]


class Training:
    """A model, its optimizers, and how far they are: what training.pt holds."""

    def __init__(self, vocab: int, rate: float, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab, bos_token_id=1, eos_token_id=2, pad_token_id=0, **SIZES))
        matrices = [p for n, p in self.model.named_parameters() if p.ndim > 1 and "embed" not in n]
        others = [p for n, p in self.model.named_parameters() if p.ndim == 1 or "embed" in n]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=rate, weight_decay=0.01),
            torch.optim.AdamW(others, lr=rate / 5, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.rates = [rate, rate / 5]
        self.spent, self.in_stage, self.stage, self.step, self.tokens = 0.0, 0.0, 0, 0, 0

    def state(self) -> dict[str, Any]:
        counts = {k: getattr(self, k) for k in ("spent", "in_stage", "stage", "step", "tokens")}
        return {"model": self.model.state_dict(), "optimizers": [o.state_dict() for o in self.optimizers], **counts}

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state.pop("model"))
        for optimizer, saved in zip(self.optimizers, state.pop("optimizers"), strict=True):
            optimizer.load_state_dict(saved)
        vars(self).update(state)

    def update(self, ids: Tensor, weights: Tensor, share: float) -> float:
        """One step. share: of the training's time that is over. Returns the loss."""
        scale = min(1.0, (self.step + 1) / WARM_UP) * min(1.0, max(0.05, (1 - share) / DECAY))
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * scale
            optimizer.zero_grad(set_to_none=True)
        wanted = weights[:, 1:] > 0
        weight = weights[:, 1:][wanted]
        loss = (losses(self.model, ids, wanted) * weight).sum() / weight.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step, self.tokens = self.step + 1, self.tokens + ids.numel()
        return float(loss.detach())


def train(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    text, run, state = (
        prepare(tokenizer, args.text, args.out),
        Training(len(tokenizer), args.lr, args.seed),
        args.out / "training.pt",
    )
    if state.exists():
        run.restore(torch.load(state))
    print(
        f"{len(text.ids) / 1e6:.1f}M tokens, {len(text.words)} words, {run.model.num_parameters() / 1e6:.2f}M parameters",
        flush=True,
    )
    end, piece, checked = 60 * args.minutes, time.monotonic() + 60 * args.piece, run.spent
    while run.spent < end and time.monotonic() < piece:
        begun, stage = time.process_time(), CURRICULUM[run.stage]  # not the clock, which also runs while other programs do
        short = stage is CURRICULUM[-1] and run.step % 3 > 0
        ids, weights = batch(text, SHORT if short else stage, random.Random(f"{args.seed}/{run.step}"))
        loss = run.update(ids, weights, run.spent / end)
        due = run.spent - checked > CHECK_SECONDS
        found = recalled(run.model, text, stage) if due else (0.0, 0.0)
        took = time.process_time() - begun
        run.spent, run.in_stage = run.spent + took, run.in_stage + took
        if due:
            checked = run.spent
            print(
                f"{run.spent:.0f} s, step {run.step}, {run.tokens / 1e6:.2f}M tokens, length {stage.length}: loss {loss:.3f}, "
                f"found {found[0]:.2f} in lists, {found[1]:.2f} in prose",
                flush=True,
            )
            if found[0] >= stage.goal or run.in_stage > stage.time * end:
                run.stage, run.in_stage = min(run.stage + 1, len(CURRICULUM) - 1), 0.0
            partial = state.with_suffix(".partial")
            torch.save(run.state(), partial)
            partial.replace(state)
    torch.save(run.state(), state)
    held = text.ids[-HELD_OUT:].view(-1, 200)[:256]
    with torch.no_grad():
        nll = float(torch.cat([losses(run.model, r, torch.ones_like(r[:, 1:]).bool()) for r in held.split(32)]).mean())
    over = "complete" if run.spent >= end else "not over"
    print(f"{over}: {run.step} steps, {run.tokens / 1e6:.1f}M tokens, held-out perplexity {math.exp(nll):.2f}", flush=True)
    tokenizer.model_max_length = LENGTH
    tokenizer.save_pretrained(args.out)
    run.model.save_pretrained(args.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=22, help="of processor time for the training in all")
    parser.add_argument("--piece", type=float, default=14, help="minutes by the clock after which this run stops")
    parser.add_argument("--lr", type=float, default=0.015, help="of the matrices; a fifth of it for embeddings and norms")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    train(args)


if __name__ == "__main__":
    main()
