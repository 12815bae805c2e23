"""Peak memory of converting a model to a checkpoint and back, beside its size and that of its largest tensor.

python -m tests.benchmarks.convert [MiB of the embedding] [blocks]

Each direction runs in its own process. Memory is the peak (VmHWM, with pages of mapped files) minus the memory after
all imports. Linux only.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from torchladder import models
from torchladder.models.hf import conversion, hf_folder, hf_weights
from torchladder.models.hf.adapter import HFMetadata

DIM, FFN = 1024, 3072


def config(mib: int, blocks: int) -> models.LlamaConfig:
    vocab = mib * 2**20 // (2 * DIM)  # bfloat16
    return models.LlamaConfig(dim=DIM, n_layers=blocks, n_heads=8, ffn_dim=FFN, vocab_size=vocab, tie_embeddings=True)


def peak() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def convert(direction: str, root: Path, shape: models.LlamaConfig) -> None:
    """Converts in this process and prints the peak in MiB."""
    hf_folder.MAX_SHARD_BYTES = 16 << 20
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = peak()
    if direction == "from-hf":
        conversion.hf_to_checkpoint(hf_folder.HFFolder(root / "source"), root / "step-0")
    elif direction == "from-hf, 1,000 new rows":
        conversion.hf_to_checkpoint(hf_folder.HFFolder(root / "source"), root / "step-1", shape.vocab_size + 1000)
    else:
        (root / "back").mkdir()
        conversion.checkpoint_to_hf(root / "step-0", root / "back", ("llama", shape), HFMetadata(64))
    print(round(peak() - before))


def main(mib: int = 64, blocks: int = 20) -> None:
    shape = config(mib, blocks)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        (root / "source").mkdir()
        hf_folder.MAX_SHARD_BYTES = 16 << 20
        hf_weights.save_hf_weights(
            models.Llama(shape, seq_len=8), root / "source", HFMetadata(64), torch.bfloat16, is_writer=True
        )
        size = sum(file.stat().st_size for file in (root / "source").glob("*.safetensors")) >> 20
        print(f"model of {size:,} MiB in shards of 16 MiB, largest tensor {mib} MiB; peak beyond the start:")
        for direction in ("from-hf", "from-hf, 1,000 new rows", "to-hf"):
            command = [sys.executable, "-m", "tests.benchmarks.convert", direction, place, str(mib), str(blocks)]
            found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            print(f"  {direction:26} {found.strip():>5} MiB")


if __name__ == "__main__":
    if len(sys.argv) == 5:
        convert(sys.argv[1], Path(sys.argv[2]), config(int(sys.argv[3]), int(sys.argv[4])))
    else:
        main(*map(int, sys.argv[1:]))
