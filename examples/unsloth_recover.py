"""Fine-tune a pruned uniform checkpoint with unsloth's FastLanguageModel: LoRA on instructions. Needs a GPU.

    pip install unsloth
    python examples/unsloth_recover.py PRUNED --data alpaca.jsonl --out ADAPTER [--steps 500]

PRUNED is a checkpoint that pared wrote with --shape uniform: stock to unsloth, which knows nothing of pruning. Data is
JSON lines with instruction, input and output, or the id of a data set on the hub. What unsloth reads of such a
checkpoint is tested (tests/test_unsloth_reads.py); this script itself was not run on a GPU.
"""

from __future__ import annotations

import argparse

PROMPT = "### Instruction:\n{instruction}\n\n{input}\n\n### Response:\n{output}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pruned")
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--max-seq-length", type=int, default=512)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    args = parser.parse_args()
    # unsloth patches transformers and has to come before it.
    from unsloth import FastLanguageModel  # isort: skip
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=args.pruned, max_seq_length=args.max_seq_length, dtype=None, load_in_4bit=False
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=args.rank,
        lora_alpha=2 * args.rank,
        lora_dropout=0,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        use_gradient_checkpointing="unsloth",
    )
    local = args.data.endswith((".json", ".jsonl"))
    rows = load_dataset("json", data_files=args.data, split="train") if local else load_dataset(args.data, split="train")
    end = tokenizer.eos_token or ""
    texts = rows.map(lambda row: {"text": PROMPT.format(**{"input": "", **row}) + end})
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=texts,
        args=SFTConfig(
            output_dir=args.out,
            dataset_text_field="text",
            max_length=args.max_seq_length,
            max_steps=args.steps,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=4,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, args.steps // 20),
            report_to=[],
        ),
    )
    trainer.train()
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
