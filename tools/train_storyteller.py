"""Train the small language model that ships with pared, on stories sampled from another model.

    python tools/train_storyteller.py sample TEACHER --out stories.jsonl --minutes 10
    python tools/train_storyteller.py train stories.jsonl --out DIR --minutes 60

`sample` draws stories from a small Llama checkpoint (the shipped model's teacher was karpathy's
stories260K, MIT); `train` fits a byte-level BPE tokenizer and a Llama to them. No story is shipped.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB = 1024
CONFIG = dict(
    vocab_size=VOCAB,
    hidden_size=192,
    intermediate_size=384,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,  # a head size that CPU serving engines have kernels for
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    tie_word_embeddings=True,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)


class Sampler:
    """Batched ancestral sampling from a small Llama with a preallocated cache (generate() re-copies its own)."""

    def __init__(self, path: str, batch: int, length: int) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        c = self.model.config
        self.head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        self.q_heads, self.kv_heads = c.num_attention_heads, c.num_key_value_heads
        shape = (c.num_hidden_layers, batch, self.kv_heads, length, self.head_dim)
        self.k, self.v = torch.zeros(shape), torch.zeros(shape)
        inv = 1.0 / c.rope_parameters["rope_theta"] ** (torch.arange(0, self.head_dim, 2) / self.head_dim)
        angle = torch.outer(torch.arange(length), torch.cat([inv, inv]))
        self.cos, self.sin = angle.cos(), angle.sin()
        self.batch, self.length = batch, length

    def _rope(self, x: torch.Tensor, t: int) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        return x * self.cos[t] + torch.cat([-b, a], -1) * self.sin[t]

    @torch.inference_mode()
    def draw(self, temperature: float, generator: torch.Generator) -> list[str]:
        eos = self.tokenizer.eos_token_id
        bos = self.tokenizer.bos_token_id
        tokens = torch.full((self.batch, 1), bos)
        out = [tokens]
        done = torch.zeros(self.batch, dtype=torch.bool)
        for t in range(self.length - 1):
            x = self.model.model.embed_tokens(tokens[:, 0])
            for i, layer in enumerate(self.model.model.layers):
                a, h = layer.self_attn, layer.input_layernorm(x)
                q = self._rope(a.q_proj(h).view(self.batch, self.kv_heads, -1, self.head_dim), t)
                self.k[i, :, :, t] = self._rope(a.k_proj(h).view(self.batch, self.kv_heads, self.head_dim), t)
                self.v[i, :, :, t] = a.v_proj(h).view(self.batch, self.kv_heads, self.head_dim)
                y = F.scaled_dot_product_attention(q, self.k[i, :, :, : t + 1], self.v[i, :, :, : t + 1])
                x = x + a.o_proj(y.reshape(self.batch, -1))
                x = x + layer.mlp(layer.post_attention_layernorm(x))
            logits = self.model.lm_head(self.model.model.norm(x)) / temperature
            tokens = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            tokens[done] = eos
            # A second <s> starts another story in this teacher's training text.
            done |= (tokens[:, 0] == eos) | (tokens[:, 0] == bos)
            out.append(tokens)
            if done.all():
                break
        rows = torch.cat(out, 1).tolist()
        return [self.tokenizer.decode([t for t in r if t not in (bos, eos)]).strip() for r in rows]


def sample(args: argparse.Namespace) -> None:
    sampler = Sampler(args.teacher, args.batch, 512)
    generator = torch.Generator().manual_seed(args.seed)
    end = time.time() + 60 * args.minutes
    with open(args.out, "w") as f:
        while time.time() < end:
            for text in sampler.draw(args.temperature, generator):
                f.write(json.dumps({"text": text}) + "\n")
            f.flush()


def fit_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tok.train_from_iterator(texts, trainer)
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    out = Path(args.out)
    texts = [json.loads(line)["text"] for path in args.stories for line in Path(path).read_text().splitlines()]
    tokenizer = fit_tokenizer(texts)
    eos = tokenizer.eos_token_id
    ids = [[*t, eos] for t in tokenizer(texts)["input_ids"]]
    stream = torch.tensor([t for row in ids for t in row])
    held, stream = stream[:100_000], stream[100_000:]
    print(
        f"{len(texts)} stories, {len(stream) / 1e6:.1f}M tokens, {sum(map(len, texts)) / len(stream):.2f} characters a token",
        flush=True,
    )
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters", flush=True)
    forward = torch.compile(model) if args.compile else model
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=args.lr, betas=(0.9, 0.95)
    )
    window, batch = args.window, args.batch
    start, step, smooth, last = time.time(), 0, None, 0.0
    while (share := (time.time() - start) / (60 * args.minutes)) < 1:
        rate = args.lr * min(1, (step + 1) / 100) * (1 if share < 0.6 else max(0.02, (1 - share) / 0.4))
        for group in optimizer.param_groups:
            group["lr"] = rate
        at = torch.randint(0, len(stream) - window - 1, (batch,))
        x = torch.stack([stream[a : a + window] for a in at])
        y = torch.stack([stream[a + 1 : a + window + 1] for a in at])
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            logits = forward(x).logits
        loss = F.cross_entropy(logits.float().view(-1, VOCAB), y.view(-1))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        if time.time() - last > 30:
            last = time.time()
            print(
                f"{share:5.1%} step {step} tokens {step * window * batch / 1e6:.1f}M loss {smooth:.4f} lr {rate:.2e}",
                flush=True,
            )
    with torch.no_grad():
        windows = held[: len(held) // window * window].view(-1, window)
        nll = sum(model(w, labels=w).loss.item() * len(w) for w in windows.split(16)) / len(windows)
    print(f"held-out perplexity {math.exp(nll):.3f} after {step * window * batch / 1e6:.1f}M tokens", flush=True)
    model.generation_config.update(do_sample=True, max_new_tokens=256)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    prompt = torch.tensor([[1]] * 3)
    for row in model.float().generate(prompt, do_sample=True, max_new_tokens=200):
        print("---", tokenizer.decode(row, skip_special_tokens=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    p = verbs.add_parser("sample")
    p.add_argument("teacher")
    p.add_argument("--out", required=True)
    p.add_argument("--minutes", type=float, default=10)
    p.add_argument("--temperature", type=float, default=0.8)
    p.add_argument("--batch", type=int, default=256)
    p.add_argument("--seed", type=int, default=0)
    p.set_defaults(do=sample)
    p = verbs.add_parser("train")
    p.add_argument("stories", nargs="+")
    p.add_argument("--out", required=True)
    p.add_argument("--minutes", type=float, default=60)
    p.add_argument("--lr", type=float, default=3e-3)
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--window", type=int, default=256)
    p.add_argument("--bf16", action="store_true")
    p.add_argument("--compile", action="store_true")
    p.add_argument("--seed", type=int, default=0)
    p.set_defaults(do=train)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.do(args)


if __name__ == "__main__":
    main()
