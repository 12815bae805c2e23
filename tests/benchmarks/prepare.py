"""torchladder prepare against the tokenizer library alone: tokens per second on the same documents.

python -m tests.benchmarks.prepare [--workers 2] [--megabytes 200] [--kind bpe]

The bare tokenizer is the library on texts in memory, in one thread and in one process per worker: the upper bound here.
Preparing reads and parses .jsonl, encodes, adds document boundaries, verifies, hashes, writes and merges; its
time includes the start of its processes. The CPU column compares CPU time, which other load on the machine hardly
changes. If datatrove is installed and --kind is byte-bpe, its tokenization of the same files is measured too, including
the merge of its per-worker files into one.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import random
import tempfile
import time
from pathlib import Path

from tests.benchmarks.timing import table
from torchladder.data import tokenizer
from torchladder.data.prepare import dataset_builder, tasks
from torchladder.data.prepare.document_encoder import DocumentEncoder
from torchladder.data.prepare.executor import LocalExecutor
from torchladder.data.text import installed_text
from torchladder.data.tokenizer import TokenizerTrainingConfig, train_tokenizer

PIECE = 4000
FILES = 8
SINGLE = ("bare tokenizer, one thread", "prepare --workers 1")


def corpus(folder, megabytes):
    """Writes random pieces of the standard library as .jsonl until it is large enough; returns the texts."""
    whole = [document.text for document in installed_text.python_stdlib().documents()]
    pieces = [text[at : at + PIECE] for text in whole for at in range(0, len(text), PIECE)]
    rng, texts, size = random.Random(0), [], 0
    while size < megabytes * 1e6:
        texts.append(rng.choice(pieces))
        size += len(texts[-1])
    (folder / "texts").mkdir()
    for number in range(FILES):
        with open(folder / "texts" / f"{number}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts[number::FILES])
    return texts


def bare(part, texts):
    """Returns the number of tokens that the tokenizer library produces in one thread."""
    if hasattr(part, "_model"):
        return sum(len(part._model.encode(text)) for text in texts)
    return sum(len(part._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids) for text in texts)


def _bare_part(job):
    number, count = job
    return bare(_shared[0], _shared[1][number::count])


def prepared(part, folder, workers, turn):
    """Returns the number of tokens of a complete preparation."""
    output = str(folder / f"{workers}-{turn}")
    preparation = tasks.PrepareConfig(inputs=[str(folder / "texts")], output=output, encoder=DocumentEncoder(part))
    return dataset_builder.prepare_dataset(preparation, LocalExecutor(workers)).tokens


def datatrove(eos, folder, workers, turn):
    """Returns the number of tokens that datatrove writes, merged into one file."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer, DocumentTokenizerMerger

    out = folder / f"datatrove-{turn}"
    tokens = DocumentTokenizer(
        str(out / "parts"),
        tokenizer_name_or_path=str(folder / "tokenizer.json"),
        eos_token=eos,
        shuffle_documents=False,
    )
    reader = JsonlReader(str(folder / "texts"))
    quiet = {"logging_dir": str(out / "logs"), "skip_completed": False}
    LocalPipelineExecutor([reader, tokens], tasks=FILES, workers=workers, **quiet).run()
    merge = DocumentTokenizerMerger(str(out / "parts"), str(out / "whole"), "whole", shuffle=False)
    LocalPipelineExecutor([merge], tasks=1, **{**quiet, "logging_dir": str(out / "merge")}).run()
    return sum(path.stat().st_size for path in (out / "whole").glob("*.ds")) // 2


def rate(work):
    """Returns tokens per second of wall-clock time and of this process's CPU time."""
    begin, busy = time.perf_counter(), time.process_time()
    tokens = work()
    return tokens / (time.perf_counter() - begin), tokens / (time.process_time() - busy)


def contenders(part, folder, texts, arguments):
    """Returns name → function of the turn that returns its number of tokens."""
    workers = arguments.workers
    pool = multiprocessing.get_context("fork").Pool(workers)
    jobs = [(number, workers) for number in range(workers)]
    pool.map(len, [""] * workers)
    found = {
        SINGLE[0]: lambda turn: bare(part, texts),
        f"bare tokenizer, {workers} processes": lambda turn: sum(pool.map(_bare_part, jobs, chunksize=1)),
        SINGLE[1]: lambda turn: prepared(part, folder, 1, turn),
        f"prepare --workers {workers}": lambda turn: prepared(part, folder, workers, turn),
    }
    if arguments.kind == "byte-bpe" and importlib.util.find_spec("datatrove"):
        eos = part._tokenizer.id_to_token(part.eos)
        found[f"datatrove, {workers} workers"] = lambda turn: datatrove(eos, folder, workers, turn)
    return found


def main():
    global _shared
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--kind", default="bpe")
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = corpus(folder, arguments.megabytes)
        for file, content in train_tokenizer(
            texts[:2000], TokenizerTrainingConfig(kind=arguments.kind, vocab_size=4096)
        ).items():
            (folder / file).write_bytes(content)
        part = tokenizer.load_tokenizer(str(folder))
        _shared = part, texts
        works, rates = contenders(part, folder, texts, arguments), {}
        for turn in range(arguments.turns):
            for what, work in works.items():
                rates.setdefault(what, []).append(rate(lambda work=work, turn=turn: work(turn)))
    best = {what: [max(column) for column in zip(*found, strict=True)] for what, found in rates.items()}
    first = next(iter(best.values()))
    rows = []
    for what, (wall, cpu) in best.items():
        count = 1 if what in SINGLE else arguments.workers
        by_cpu = f"{cpu / first[1]:.2f}" if count == 1 else ""  # CPU time excludes subprocesses
        rows.append([what, f"{wall:,.0f}", f"{wall / first[0] / count:.2f}", by_cpu])
    kind = f"{arguments.kind} of {part.vocab_size:,} tokens"
    print(f"{arguments.megabytes} MB of .jsonl, {kind}, best of {arguments.turns} turns")
    table(["", "tokens/s", "of workers x bare", "by CPU time"], rows)


if __name__ == "__main__":
    main()
