"""Preparing against the bare tokenizer: tokens per second of the same documents, in turns.

python -m tests.benchmarks.prepare [workers] [MB of text]

The bare tokenizer is one thread of the library itself over texts that are in memory already. Preparing reads .jsonl,
parses it, encodes, frames, checks, hashes, writes and joins; the start of its processes is in its time. The CPU column
compares the work alone, which a busy machine does not change.
"""

import json
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks.timing import table
from torchladder.data import tokenizer
from torchladder.data.prepare import parts
from torchladder.data.prepare.executor import local
from torchladder.data.prepare.framing import Framing
from torchladder.data.text import sources

TURNS = 3
PIECE = 4000


def corpus(folder, megabytes):
    """Writes pieces of the standard library as .jsonl in some order, again and again; returns the texts."""
    whole = [document.text for document in sources.python_stdlib().documents()]
    pieces = [text[at : at + PIECE] for text in whole for at in range(0, len(text), PIECE)]
    rng, texts, size = random.Random(0), [], 0
    while size < megabytes * 1e6:
        texts.append(rng.choice(pieces))
        size += len(texts[-1])
    with open(folder / "texts.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    return texts


def bare(part, texts):
    """Returns the tokens that one thread of the tokenizer's own library makes."""
    return sum(len(part._model.encode(text)) for text in texts)


def prepared(part, folder, workers, turn):
    """Returns the tokens of a whole preparation."""
    output = str(folder / f"{workers}-{turn}")
    preparation = parts.Preparation(inputs=[str(folder / "texts.jsonl")], output=output, framing=Framing(part))
    return parts.run(preparation, local(workers)).tokens


def rate(work):
    """Returns tokens per second, and per second of this process's CPU."""
    begin, busy = time.perf_counter(), time.process_time()
    tokens = work()
    return tokens / (time.perf_counter() - begin), tokens / (time.process_time() - busy)


def main(workers, megabytes):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = corpus(folder, megabytes)
        part = tokenizer.sentencepiece(lambda: iter(texts[:2000]), folder / "cache")
        rates = {0: [], 1: [], workers: []}
        for turn in range(TURNS):
            rates[0].append(rate(lambda: bare(part, texts)))
            for count in sorted({1, workers}):
                rates[count].append(rate(lambda count=count, turn=turn: prepared(part, folder, count, turn)))
    best = {count: [max(column) for column in zip(*found, strict=True)] for count, found in rates.items()}
    wall, cpu = best[0]
    rows = [["bare tokenizer, one thread", f"{wall:,.0f}", "1.00", "1.00"]]
    for count in sorted({1, workers}):
        by_cpu = f"{best[1][1] / cpu:.2f}" if count == 1 else ""  # the work of others is not in this process's time
        rows.append(
            [f"prepare --workers {count}", f"{best[count][0]:,.0f}", f"{best[count][0] / wall / count:.2f}", by_cpu]
        )
    print(f"{megabytes} MB of .jsonl, SentencePiece BPE of {part.vocab_size:,} tokens, best of {TURNS} turns")
    table(["", "tokens/s", "of workers x bare", "by CPU time"], rows)


if __name__ == "__main__":
    main(*([int(word) for word in sys.argv[1:]] or [2, 200]))
