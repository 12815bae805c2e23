"""What the pages for people who come from other systems show, on data and weights in those systems' formats."""

import json
import re
import shlex

import numpy as np
import pytest
import torch

from tests.test_data_formats import chunk
from tests.test_docs import ROOT
from tests.test_docs import commands as shown
from torchladder import commands, models, train
from torchladder.models.hf import hf_weights
from torchladder.models.hf.adapter import HFMetadata

TINY = [
    *("--training.seq_len", "32", "--training.local_batch_size", "2", "--training.global_batch_size", "2"),
    *("--training.steps", "2", "--training.mixed_precision_param", "float32", "--compile.no_enable"),
    *("--lr_scheduler.warmup_steps", "1", "--validation.steps", "1"),
]
SHAPE = {"dim": 32, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "ffn_dim": 32, "vocab_size": 300}
SET_SHAPE = [word for key, value in SHAPE.items() for word in (f"--model.{key}", str(value))]


def write_config(page, folder):
    """Writes the run.toml of a page; it extends a shipped config."""
    (text,) = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / page).read_text(), flags=re.DOTALL)
    (folder / "run.toml").write_text(text.replace("train_configs/", f"{ROOT}/train_configs/"))


def execute(page, *extra, only=""):
    """Runs the commands of a page that contain a word."""
    for command in [command for command in shown(ROOT / "docs" / page) if only in command]:
        words = shlex.split(command)
        if words[1] == "train":
            assert train.main([*words[2:], *TINY, *extra]) == 0, command
        else:
            assert commands.main([*words[1:], *([*TINY, *extra] if "--row" in words else [])]) == 0, command


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_from_skyladders_data_and_weights_to_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_config("skyladder.md", tmp_path)
    for split in ("train", "valid"):
        (tmp_path / "cc_8k").mkdir(exist_ok=True)
        tokens = np.random.default_rng(0).integers(97, 123, 660)
        tokens[50::50] = 256  # eos of the bytes tokenizer, which stands in for SentencePiece
        chunk(tmp_path / "cc_8k" / f"{split}_cc_0_0000000000.bin", tokens)
    fused = {"attn.attn": (64, 32), "attn.proj": (32, 32), "mlp.swiglu.w1": (32, 32), "mlp.swiglu.w2": (32, 32)}
    layer = {**fused, "mlp.swiglu.w3": (32, 32), "norm_1": (32,), "norm_2": (32,)}
    shapes = {"lm_head": (300, 32), "transformer.wte": (300, 32), "transformer.ln_f": (32,)}
    shapes |= {f"transformer.h.0.{name}": shape for name, shape in layer.items()}
    weights = {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    (tmp_path / "out").mkdir()
    torch.save({"model": weights, "step_count": 50_000}, tmp_path / "out/iter-200000-ckpt-step-50000.pth")
    execute("skyladder.md", "--model.flavor", "debug", *SET_SHAPE, "--tokenizer.name", "bytes", only=" run.toml")
    said = capsys.readouterr().out
    assert "row 0: from cc_8k/train" in said
    assert metrics(tmp_path / "outputs/1b_8k_dm8_cc")[-1]["step"] == 2
    execute("skyladder.md", only="to-hf")
    model = models.Llama(models.LlamaConfig(**SHAPE), attention_fn=None, seq_len=8)
    hf_weights.load_hf_weights(model, tmp_path / "outputs/from_pth_hf")
    assert torch.equal(model.state_dict()["head.weight"], weights["lm_head.weight"])
    fused_value = weights["transformer.h.0.attn.attn.weight"][-16:]
    assert torch.equal(model.state_dict()["layers.0.attention.v_proj.weight"], fused_value)


def test_from_mathcoders_tokens_and_text_to_a_run(tmp_path, monkeypatch, capsys):
    tokenizers, pyarrow = pytest.importorskip("tokenizers"), pytest.importorskip("pyarrow")
    pytest.importorskip("safetensors")
    from pyarrow import parquet

    monkeypatch.chdir(tmp_path)
    write_config("mathcoder2.md", tmp_path)
    folder = tmp_path / "models/Meta-Llama-3-8B"
    folder.mkdir(parents=True)
    letters = {letter: i for i, letter in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(letters, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>"])
    made.save(str(folder / "tokenizer.json"))
    model = models.Llama(models.LlamaConfig(**SHAPE, initialization="normal"), attention_fn=None, seq_len=8)
    model.init_weights(0)
    hf_weights.save_hf_weights(model, folder, HFMetadata(32), torch.float32, is_writer=True)

    document = [256, *made.encode("one and one").ids, 257]
    rows = [[*document, *document, *[257] * 6]] * 8  # grouped: padded with eos to 32 tokens
    labels = [[*document, *document, *[-100] * 6]] * 8
    parquet.write_table(pyarrow.table({"input_ids": rows, "labels": labels}), tmp_path / "grouped.parquet")
    (tmp_path / "data/math").mkdir(parents=True)
    lines = [json.dumps({"text": f"{i} and {i} make {2 * i}. " * 5}) for i in range(20)]
    (tmp_path / "data/math/a.jsonl").write_text("\n".join(lines))
    execute("mathcoder2.md", "--model.flavor", "")
    said = capsys.readouterr().out
    assert said.count("one and one") >= 2
    assert "20 documents" in said
    for run in ("MathCoder2-Llama-3-8B", "from_text"):
        assert metrics(tmp_path / "outputs" / run)[-1]["step"] == 2
    assert (tmp_path / "outputs/MathCoder2-Llama-3-8B/checkpoint/step-2-hf/config.json").is_file()
