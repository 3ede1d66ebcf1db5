"""Train small reference models of unlike families on one text, with one tokenizer for all of them.

    python benchmarks/train_reference.py TEXT --shape llama-gqa --out REFS/llama-gqa --tokens 2967552

TEXT is prose (.txt) or stories (.jsonl, one document a line), also .xz or .gz. Every twentieth part of the text is held
out: it is written beside the tokenizer as held-out.jsonl and never trained on; the rest is there as train.jsonl. The
tokenizer lies in the parent directory of OUT, so that models trained beside each other share it.

Windows of text are drawn by (seed, step) alone: all shapes see the same. Killed and started again, it goes on from the
last state that it saved.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from pared.calibration import read_documents

TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
POSITIONS = 512
HELD_OUT = 20  # every so many-th piece of the text
PIECE = 8192  # characters; a document longer than that is several pieces
SAVE_EVERY = 60.0  # seconds of CPU time, which a busy machine does not stretch


def shape_config(shape: str, hidden: int, layers: int, vocab: int) -> transformers.PreTrainedConfig:
    """The config of a shape: heads of 32, two query heads to a KV head where the family groups them."""
    heads = hidden // 32
    common: dict[str, Any] = {"vocab_size": vocab, "hidden_size": hidden, "num_hidden_layers": layers, **TOKENS}
    common |= {"tie_word_embeddings": True}
    grouped = common | {
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2),
        "head_dim": 32,
        "max_position_embeddings": POSITIONS,
    }
    ffn = int(hidden * 8 / 3) // 16 * 16
    if shape == "llama-gqa":
        return transformers.LlamaConfig(**grouped, intermediate_size=ffn)
    if shape == "qwen3":
        return transformers.Qwen3Config(**grouped, intermediate_size=ffn)
    if shape == "qwen2":
        return transformers.Qwen2Config(**{k: v for k, v in grouped.items() if k != "head_dim"}, intermediate_size=ffn)
    if shape == "gpt-neox":
        parallel = {"num_attention_heads": heads, "intermediate_size": 4 * hidden, "max_position_embeddings": POSITIONS}
        return transformers.GPTNeoXConfig(**common, **parallel, use_parallel_residual=True, hidden_dropout=0.0)
    if shape == "bloom":
        return transformers.BloomConfig(
            **{k: v for k, v in common.items() if k != "num_hidden_layers"}, n_layer=layers, n_head=heads
        )
    routed = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.01}
    if shape == "mixtral":
        return transformers.MixtralConfig(**grouped, **routed, num_local_experts=4, intermediate_size=ffn // 2)
    sizes = {"num_experts": 4, "intermediate_size": ffn, "moe_intermediate_size": ffn // 2}
    return transformers.Qwen3MoeConfig(**grouped, **routed, **sizes, norm_topk_prob=True)


SHAPES = ("llama-gqa", "qwen3", "qwen2", "gpt-neox", "bloom", "mixtral", "qwen3_moe")


def pieces(path: Path) -> list[str]:
    """The documents, those longer than PIECE cut at the first space after it."""
    out: list[str] = []
    for document in read_documents(path):
        at = 0
        while at < len(document):
            end = len(document) if at + PIECE >= len(document) else document.find(" ", at + PIECE)
            end = len(document) if end < 0 else end
            out.append(document[at:end].strip())
            at = end
    return [p for p in out if p]


def fit_tokenizer(texts: list[str], vocab: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that opens each text with <s>."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tok, **names, model_max_length=POSITIONS)


def prepare(text: Path, folder: Path, vocab: int) -> tuple[PreTrainedTokenizerFast, np.ndarray, np.ndarray]:
    """The tokenizer, the tokens to train on and those held out; made once for all models in a folder."""
    cache = folder / "tokens.npz"
    if cache.exists():
        data = np.load(cache)
        return PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer"), data["train"], data["held"]
    folder.mkdir(parents=True, exist_ok=True)
    found = pieces(text)
    parts = {
        "train": [p for i, p in enumerate(found) if i % HELD_OUT != HELD_OUT - 1],
        "held-out": [p for i, p in enumerate(found) if i % HELD_OUT == HELD_OUT - 1],
    }
    tokenizer = fit_tokenizer(parts["train"], vocab)
    tokenizer.save_pretrained(folder / "tokenizer")
    arrays = []
    for name, texts in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
        ids = [[*row, TOKENS["eos_token_id"]] for row in tokenizer(texts)["input_ids"]]
        arrays.append(np.array([t for row in ids for t in row], dtype=np.uint16))
    partial = folder / "tokens.partial.npz"
    np.savez(partial, train=arrays[0], held=arrays[1])
    partial.replace(cache)
    return tokenizer, arrays[0], arrays[1]


def optimizers(model: PreTrainedModel, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for everything else: twice as far in so few steps as AdamW alone."""
    tables = {id(p) for m in (model.get_input_embeddings(), model.get_output_embeddings()) for p in m.parameters()}
    inside = [p for p in model.parameters() if p.ndim == 2 and id(p) not in tables]
    rest = [p for p in model.parameters() if p.ndim != 2 or id(p) in tables]
    return [
        torch.optim.Muon(inside, lr=rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=rate, weight_decay=0.0, betas=(0.9, 0.95)),
    ]


def schedule(share: float, step: int) -> float:
    """Of the peak rate: warmup over 50 steps, constant to 40% of the tokens, then linear to 2%."""
    return min(1.0, (step + 1) / 50) * min(1.0, max(0.02, (1 - share) / 0.6))


def draw(tokens: np.ndarray, batch: int, window: int, seed: int, step: int) -> torch.Tensor:
    """Windows int64 [batch, window]; half of them open with <s>, as text does that is read from its beginning."""
    at = np.random.default_rng([seed, step]).integers(0, len(tokens) - window, batch)
    ids = torch.from_numpy(np.stack([tokens[a : a + window] for a in at]).astype(np.int64))
    ids[::2, 0] = TOKENS["bos_token_id"]
    return ids


def held_out_loss(model: PreTrainedModel, held: np.ndarray, window: int, limit: int = 256) -> float:
    """Mean loss in nats per token over windows of the held-out text."""
    whole = torch.from_numpy(held[: len(held) // window * window].astype(np.int64)).view(-1, window)[:limit]
    model.eval()
    with torch.no_grad():
        losses = [F.cross_entropy(model(w).logits[:, :-1].flatten(0, 1), w[:, 1:].flatten()) for w in whole.split(16)]
    model.train()
    return float(torch.stack(losses).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--hidden", type=int, default=128, help="a multiple of 64")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=2967552)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="what products are computed in")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if (args.out / "config.json").exists():
        raise SystemExit(f"{args.out} is there already")
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    tokenizer, train, held = prepare(args.text, args.out.parent, args.vocab)
    model = AutoModelForCausalLM.from_config(shape_config(args.shape, args.hidden, args.layers, args.vocab)).float().train()
    steps = optimizers(model, args.rate)
    state_file = args.out.with_name(args.out.name + ".state.pt")
    step = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(steps, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step = state["step"]
    count = sum(p.numel() for p in model.parameters())
    print(f"{args.shape}: {count / 1e6:.2f}M parameters, {len(train) / 1e6:.1f}M tokens of text, from step {step}", flush=True)
    routed = hasattr(model.config, "router_aux_loss_coef")
    saved_at, loss_sum = time.process_time(), None
    while (seen := step * args.batch * args.window) < args.tokens:
        factor = schedule(seen / args.tokens, step)
        for optimizer in steps:
            for group in optimizer.param_groups:
                group["lr"] = args.rate * factor
        ids = draw(train, args.batch, args.window, args.seed, step)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bfloat16"):
            out = model(ids, use_cache=False, **({"output_router_logits": True} if routed else {}))
        loss = F.cross_entropy(out.logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
        balanced = loss + model.config.router_aux_loss_coef * out.aux_loss if routed else loss
        balanced.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in steps:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        loss_sum = loss.item() if loss_sum is None else 0.98 * loss_sum + 0.02 * loss.item()
        if time.process_time() - saved_at > SAVE_EVERY:
            saved_at = time.process_time()
            partial = state_file.with_suffix(".partial")
            torch.save({"model": model.state_dict(), "optimizers": [o.state_dict() for o in steps], "step": step}, partial)
            partial.replace(state_file)
            print(f"step {step}, {seen / 1e6:.1f}M tokens, loss {loss_sum:.4f}, rate {args.rate * factor:.1e}", flush=True)
    nll = held_out_loss(model, held, args.window)
    print(f"{args.shape}: held-out loss {nll:.4f}, perplexity {math.exp(nll):.2f}, after {seen / 1e6:.1f}M tokens", flush=True)
    partial_out = args.out.with_name(args.out.name + ".partial")
    model.eval().save_pretrained(partial_out)
    tokenizer.save_pretrained(partial_out)
    facts = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    facts |= {"text": args.text.name, "out": args.out.name, "tokens": seen, "held_out_loss": nll}
    (partial_out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    partial_out.replace(args.out)
    state_file.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
