"""Two tokenizers on the same rows: what is aligned, how far their classes of tokens reach, and how fast.

    OMP_NUM_THREADS=1 python benchmarks/alignment.py --tokenizers A B [C ...] --files rows.jsonl [...] [--rows N]

Tokenizers are folders, Hub ids or SentencePiece files; each pair is taken both ways. Files hold JSON lines with ``prompt`` and
``completion``, or with the columns of GSM8K or MBPP. Times are of the processor, and do not count what else it does. Prints a
Markdown table, and then all numbers as JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase

from hf_semalign.method.alignment import Alignment, TokenRow, align_rows
from hf_semalign.method.prefix_classes import prefix_classes
from hf_semalign.method.vocabularies import rows_by_bytes
from hf_semalign.models.token_bytes import TokenBytes
from hf_semalign.tokenization import tokenize

COLUMNS = (("prompt", "completion"), ("question", "answer"), ("text", "code"))
REPEATS = 5
LONG = 10**9  # rows of a head that is longer than any vocabulary
Side = tuple[TokenBytes, list[TokenRow]]
SHARES = ("aligned", "comparable", "one to one")


def load_tokenizer(place: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, a Hub id or a SentencePiece file."""
    if not Path(place).is_file():
        return AutoTokenizer.from_pretrained(place)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(place, Path(folder) / "tokenizer.model")
        return LlamaTokenizer.from_pretrained(folder)


def read_rows(file: str, count: int | None) -> list[dict[str, str]]:
    """Prompt and completion of each row of a file."""
    records = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()[:count]]
    asked, answered = next(names for names in COLUMNS if set(names) <= records[0].keys())
    return [{"prompt": f"{record[asked]}\n", "completion": record[answered]} for record in records]


def encoded(tokenizer: PreTrainedTokenizerBase, records: list[dict[str, str]]) -> Side:
    """What a tokenizer's tokens spell, and the rows in its tokens."""
    return TokenBytes.of(tokenizer), [TokenRow(*tokenize(record, tokenizer, "a row")) for record in records]


def shares(target: Side, alignments: list[Alignment | None]) -> dict[str, float]:
    """Of the target's valid positions, those aligned and comparable; of the spans between aligned positions, those of one token
    on both sides.
    """
    counts = dict.fromkeys(("valid", "aligned", "comparable", "spans", "one to one"), 0)
    for row, found in zip(target[1], alignments, strict=True):
        if found is not None:
            steps = np.diff(found.pairs, axis=0)
            counts["valid"] += row.supervised[1:].sum()
            counts["aligned"] += len(found.pairs)
            counts["comparable"] += found.comparable.sum()
            counts["spans"] += len(steps)
            counts["one to one"] += (steps == 1).all(1).sum()
    return {share: float(counts[share] / counts["spans" if share == "one to one" else "valid"]) for share in SHARES}


def measure(source: Side, target: Side) -> dict[str, Any]:
    """One pair of tokenizers on one file."""
    start = time.process_time()
    classes = prefix_classes(source[0], target[0], LONG, LONG)
    classes_seconds, seconds = time.process_time() - start, []
    for _ in range(REPEATS):
        rows = [[TokenRow(row.ids, row.labels) for row in side[1]] for side in (source, target)]  # which keep nothing yet
        start = time.process_time()
        alignments = align_rows(*rows, source[0], target[0], classes, split="rows")
        seconds.append(time.process_time() - start)
    return {
        "rows": len(alignments),
        "left out": alignments.count(None),
        **shares(target, alignments),
        "rows a minute": [60 * len(alignments) / second for second in seconds],
        "classes": classes.count,
        "classes s": classes_seconds,
        "shared rows": len(rows_by_bytes(source[0], target[0], LONG, LONG, width=0)[0]),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a line a pair and file."""
    heads = ("file", "source", "target", "rows", "left out", *SHARES, "thousand rows a minute", "classes", "s", "shared rows")
    lines = []
    for row in rows:
        low, median, high = (f(row["rows a minute"]) / 1000 for f in (min, statistics.median, max))
        cells = [*(str(row[key]) for key in heads[:5]), *(f"{row[share]:.1%}" for share in SHARES)]
        cells += [
            f"{median:.0f} ({low:.0f} to {high:.0f})",
            str(row["classes"]),
            f"{row['classes s']:.1f}",
            str(row["shared rows"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|", *lines])


def main() -> None:
    """Read tokenizers and files, and measure each pair on each file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizers", nargs="+", required=True, help="two or more")
    parser.add_argument("--files", nargs="+", required=True)
    parser.add_argument("--rows", type=int, help="the first so many of each file")
    given = parser.parse_args()
    tokenizers = {Path(place).name.removesuffix(".model"): load_tokenizer(place) for place in given.tokenizers}
    results = []
    for file in given.files:
        records = read_rows(file, given.rows)
        sides = {name: encoded(tokenizer, records) for name, tokenizer in tokenizers.items()}
        for source, target in permutations(sides, 2):
            facts = {"file": Path(file).name, "source": source, "target": target}
            results.append(facts | measure(sides[source], sides[target]))
    print(table(results))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
