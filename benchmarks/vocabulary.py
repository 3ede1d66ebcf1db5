"""What a pruned vocabulary saves, and what it costs on text that it was not chosen by.

    python benchmarks/vocabulary.py MODEL --keep-tokens-from TRAIN --text TEST --out FILE

Each row is `pared prune MODEL --structures vocab --keep-tokens-from TRAIN --min-count N` and `pared eval` of it against
MODEL on TEST. Bits per byte are of the same text, each model in its own tokens; the text's length in tokens is what
generation and the cache pay. Where every token of TEST is kept, both lengths are the same.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from transformers import AutoTokenizer

from pared.calibration import read_documents, tokenize_documents
from pared.errors import UsageError
from pared.evaluate.report import evaluate
from pared.run import prune


def length(path: Path, documents: list[str]) -> int:
    """Tokens of the documents under the tokenizer that lies there."""
    return sum(map(len, tokenize_documents(documents, AutoTokenizer.from_pretrained(path))))


def row(model: Path, keep: Path, text: Path, min_count: int, max_windows: int, out: Path) -> list[str]:
    """One line of the table, and the dense model's numbers of the same run."""
    try:
        report = prune(model, out=out, structures=("vocab",), keep_tokens_from=keep, min_count=min_count).report
    except UsageError as error:
        return [str(min_count), error.what, *[""] * 6]
    found = evaluate(out, against=model, text=text, max_windows=max_windows, speed=False)
    documents, words, dense = read_documents(text), report["vocabulary"], found["against"]
    return [
        str(min_count),
        f"{words['after']:,} of {words['before']:,}",
        f"{found['params']:,}",
        f"{report['removed']:.1%}",
        f"{1 - found['macs_per_token'] / dense['macs_per_token']:.1%}",
        f"{dense['bits_per_byte']:.3f}",
        f"{found['bits_per_byte']:.3f}",
        f"{length(out, documents) / length(model, documents) - 1:+.1%}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--keep-tokens-from", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--min-count", type=int, nargs="+", default=[1, 10, 20, 50, 100])
    parser.add_argument("--max-windows", type=int, default=32)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    columns = (
        *("min-count", "tokens kept", "parameters", "parameters saved", "multiply-adds saved"),
        *("bits per byte, dense", "bits per byte, pruned", "length of the text in tokens"),
    )
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            row(args.model, args.keep_tokens_from, args.text, n, args.max_windows, Path(folder) / str(n))
            for n in args.min_count
        ]
    lines = ["| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns), *rows)]
    about = (__doc__ or "").split("\n\n")[2].strip()
    files = f"TRAIN {args.keep_tokens_from.name}, TEST {args.text.name}, its first {args.max_windows} windows."
    args.out.write_text(f"# Vocabulary: {args.model.name}\n\n{about}\n\n{files}\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
