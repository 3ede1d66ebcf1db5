"""Teach a small Llama to use a long context: prose mixed with keys that have to be found again.

    python benchmarks/train_long.py START TEXT --out DIR [--minutes 6] [--piece 14]

START is a small trained Llama with byte-level tokens, as `train_reference.py --shape llama-gqa` makes it. Its FFNs are
first widened to a multiple of 128 channels, the new ones without effect, so that quantisers can pack their rows; its
positions become 2048. TEXT is what START was trained on, or a part of it (.txt or .jsonl). Sequences are 128 tokens at
first and 2048 in the end. Some are lists of `# key value` lines that are asked for again in another order, which is what
makes the heads that copy; the rest is prose with such lines at random depths, and again further on. The loss is over the
prose and the answers: keys and values can not be guessed when they are first named. Minutes are of processor time.
Stopped at any time (or after --piece minutes) the program goes on from DIR/training.pt.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

from pared.calibration import read_documents

LENGTH = 2048


@dataclass(frozen=True)
class Stage:
    """Up to which share of the training, tokens of a sequence and of a batch, share of lists, and the most keys in one."""

    until: float
    length: int
    batch: int
    lists: float
    keys: int


# Short lists alone come first: the heads that copy do not form from long ones.
CURRICULUM = (
    Stage(0.55, 128, 1024, 1.0, 8),
    Stage(0.65, 256, 2048, 0.6, 24),
    Stage(0.7, 512, 2048, 0.4, 48),
    Stage(0.75, 1024, 4096, 0.3, 96),
    Stage(1.0, LENGTH, 4096, 0.3, 160),
)
HELD_OUT = 200_000  # tokens at the end of the text that are not trained on
SAVE_SECONDS = 60
ANSWER_WEIGHT = 4.0


@dataclass
class Text:
    """Token ids of the prose, and the tokens that keys and values are drawn from."""

    ids: Tensor
    words: list[int]
    bos: int
    newline: list[int]
    sign: list[int]


def prepare(start: Path, path: Path, out: Path) -> Text:
    """The text in tokens, which are kept for the next piece."""
    cache, tokenizer = out / "tokens.pt", AutoTokenizer.from_pretrained(start)
    if not cache.exists():
        rows = tokenizer(read_documents(path), add_special_tokens=False)["input_ids"]
        newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
        torch.save(torch.tensor([t for row in rows for t in (*row, *newline)], dtype=torch.int16), cache)
        tokenizer.model_max_length = LENGTH
        tokenizer.save_pretrained(out)

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    pieces = {i: t for t, i in tokenizer.get_vocab().items()}
    words = [i for i, p in pieces.items() if p[0] == "Ġ" and len(p) > 4 and p[1:].isascii() and p[1:].isalpha()]
    stream = torch.load(cache).long()
    return Text(stream, sorted(words), tokenizer.bos_token_id, ids("\n"), ids("#"))


def longer(start: Path) -> LlamaForCausalLM:
    """The model to begin with: the same function, more positions and FFN channels."""
    model = LlamaForCausalLM.from_pretrained(start, dtype=torch.float32)
    width = model.config.intermediate_size
    config = copy.deepcopy(model.config)
    config.update({"intermediate_size": -(-width // 128) * 128, "max_position_embeddings": LENGTH})
    wider = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in wider.state_dict().items():
            old = model.state_dict()[name]
            if name.endswith("down_proj.weight"):
                weight.zero_()
            weight[tuple(slice(n) for n in old.shape)] = old
    return wider


def line(text: Text, key: int, value: int) -> list[int]:
    """The tokens that name a key's value."""
    return [*text.sign, key, value, *text.newline]


def lists(text: Text, stage: Stage, draw: random.Random) -> tuple[list[int], list[float]]:
    """Lines of keys and values, then the same lines in other orders until the sequence is full."""
    length, count = stage.length, draw.randint(2, stage.keys)
    chosen = draw.sample(text.words, 2 * count)
    pairs = list(zip(chosen[:count], chosen[count:], strict=True))
    ids, weights = [text.bos], [0.0]
    told = False
    while len(ids) < length:
        draw.shuffle(pairs)
        for key, value in pairs:
            tokens = line(text, key, value)
            ids += tokens
            weights += [float(told and token == value) for token in tokens]
        told = True
    return ids[:length], weights[:length]


def prose(text: Text, stage: Stage, draw: random.Random) -> tuple[list[int], list[float]]:
    """Prose in which keys get values at random places, each asked for once or twice later on."""
    length = stage.length
    start = draw.randrange(len(text.ids) - HELD_OUT - length)
    body = text.ids[start : start + length].tolist()
    count = draw.randint(0, max(2, length // 100))
    chosen = draw.sample(text.words, 2 * count)
    events: list[tuple[int, int, int, bool]] = []
    for key, value in zip(chosen[:count], chosen[count:], strict=True):
        first = draw.randrange(length)
        events.append((first, key, value, False))
        events += [(draw.randrange(first, length), key, value, True) for _ in range(draw.randint(1, 2))]
    ids, weights, done = [text.bos], [0.0], 0
    for at, key, value, told in sorted(events, key=lambda e: (e[0], e[3])):
        ids += body[done:at]
        weights += [1.0] * (at - done)
        done = max(done, at)
        tokens = line(text, key, value)
        ids += tokens
        weights += [ANSWER_WEIGHT if told and token == value else 0.0 for token in tokens]
    ids += body[done:]
    weights += [1.0] * (length - done)
    return ids[:length], weights[:length]


def batch(text: Text, stage: Stage, draw: random.Random) -> tuple[Tensor, Tensor]:
    """Ids and loss weights [rows, length]."""
    makers = [lists if draw.random() < stage.lists else prose for _ in range(stage.batch // stage.length)]
    rows = [make(text, stage, draw) for make in makers]
    return torch.tensor([r for r, _ in rows]), torch.tensor([w for _, w in rows])


def losses(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Loss of each token but the first [rows, length - 1]."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)


@torch.no_grad()
def recalled(model: LlamaForCausalLM, text: Text, stage: Stage) -> tuple[float, float]:
    """Share of keys found again in fresh lists, and in prose, of the stage."""
    draw, found = random.Random(7), []
    for make in (lists, prose):
        hits = total = 0
        for _ in range(4):
            ids, weights = (torch.tensor(t) for t in make(text, stage, draw))
            asked = weights[1:] > 0 if make is lists else weights[1:] > 1
            choice = model(ids[None], use_cache=False).logits[0, :-1].argmax(-1)
            hits += int((choice == ids[1:])[asked].sum())
            total += int(asked.sum())
        found.append(hits / max(1, total))
    return found[0], found[1]


def train(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    text = prepare(args.start, args.text, args.out)
    print(f"{len(text.ids) / 1e6:.1f}M tokens, {len(text.words)} words for keys", flush=True)
    torch.manual_seed(args.seed)
    model = longer(args.start)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.97))
    spent, step, tokens, state = 0.0, 0, 0, args.out / "training.pt"
    if state.exists():
        saved = torch.load(state)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        spent, step, tokens = saved["spent"], saved["step"], saved["tokens"]

    def save() -> None:
        partial = state.with_suffix(".partial")
        counts = {"spent": spent, "step": step, "tokens": tokens}
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), **counts}, partial)
        partial.replace(state)

    end, piece, last = 60 * args.minutes, time.monotonic() + 60 * args.piece, time.monotonic()
    while spent < end and time.monotonic() < piece:
        begun = time.process_time()  # not the clock, which also runs while other programs do
        share = spent / end
        stage = next(s for s in CURRICULUM if share < s.until)
        rate = args.lr * min(1, (step + 1) / 100) * (1 if share < 0.6 else max(0.05, (1 - share) / 0.4))
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids, weights = batch(text, stage, random.Random(f"{args.seed}/{step}"))
        loss = (losses(model, ids) * weights[:, 1:]).sum() / weights[:, 1:].sum().clamp(min=1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step, tokens = step + 1, tokens + ids.numel()
        spent += time.process_time() - begun
        if time.monotonic() - last > SAVE_SECONDS:
            in_lists, in_prose = recalled(model, text, stage)
            print(
                f"{share:5.1%} step {step} length {stage.length} loss {loss.item():.3f} recalled {in_lists:.2f} of lists, "
                f"{in_prose:.2f} in prose",
                flush=True,
            )
            save()
            last = time.monotonic()
    save()
    if spent >= end:
        print("the training is complete", flush=True)
    held = text.ids[-HELD_OUT:].view(-1, 200)[:256]
    with torch.no_grad():
        nll = float(torch.cat([losses(model, rows).flatten() for rows in held.split(32)]).mean())
    print(f"{step} steps, {tokens / 1e6:.1f}M tokens, held-out perplexity {math.exp(nll):.2f}", flush=True)
    model.save_pretrained(args.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("start", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=6, help="of processor time for the training in all")
    parser.add_argument("--piece", type=float, default=14, help="minutes by the clock after which this run stops")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    train(args)


if __name__ == "__main__":
    main()
