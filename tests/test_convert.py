"""Hugging Face folders through commands and runs: converted, trained from, exported."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from torchladder import checkpoint, commands, config, data, mask, train
from torchladder.checkpoint import CheckpointConfig, step_folders
from torchladder.commands import convert, evaluate, generate
from torchladder.data import tokenizer
from torchladder.data.formats.indexed import IndexedWriter
from torchladder.inference import hf_export
from torchladder.inference.evaluation.result_table import ResultTable
from torchladder.inference.trained_model import TrainedModel
from torchladder.models import attention
from torchladder.models.hf.hf_folder import HFFolder
from torchladder.registry import ConfigError

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

ROOT = Path(__file__).parents[1]


def _tokenizer(settings):
    return data.build_tokenizer(settings.tokenizer, settings.data)


SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1,
    "tie_word_embeddings": False,
}  # fmt: skip
WORDS = "the ladder climbs from a few tokens to the full row while the model trains and every mask is one integer "


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A Llama and a Mistral, each with a tokenizer, and a text to train on."""
    root = tmp_path_factory.mktemp("folders")
    part = tokenizers.Tokenizer(tokenizers.models.BPE())
    part.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    part.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    part.train_from_iterator(
        [WORDS] * 3,
        tokenizers.trainers.BpeTrainer(special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False),
    )
    size = part.get_vocab_size()
    for kind in (
        transformers.LlamaConfig(**SHAPE, vocab_size=size),
        transformers.MistralConfig(**SHAPE, vocab_size=size, sliding_window=16),
    ):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(kind)
        model.save_pretrained(root / kind.model_type, max_shard_size="40KB")
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=part, bos_token="<s>", eos_token="</s>")
        fast.save_pretrained(root / kind.model_type)
    (root / "text.txt").write_text(WORDS * 60)
    return root


def argv(folders, out, *more):
    """The command line of a short run on a small text."""
    return [
        *("--job.dump_folder", str(out), "--data.sources", f'{{ path = "{folders / "text.txt"}" }}'),
        *("--data.cache_folder", str(folders / "cache"), "--validation.no_enable", "--training.seq_len", "64"),
        *("--training.local_batch_size", "2", "--training.mixed_precision_param", "float32"),
        *("--metrics.log_freq", "1", "--checkpoint.enable", "--lr_scheduler.warmup_steps", "1", *more),
    ]  # fmt: skip


def losses(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_a_run_starts_from_a_folder_and_ends_in_one(folders, tmp_path, capsys):
    straight = ["--model.hf_assets_path", str(folders / "llama"), "--checkpoint.initial_load_in_hf"]
    ends = ["--checkpoint.last_save_in_hf", "--checkpoint.export_dtype", "bfloat16", "--training.steps", "3"]
    assert train.main(argv(folders, tmp_path / "one", *straight, *ends)) == 0
    out = tmp_path / "one" / "checkpoint" / "step-3-hf"
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= {
        file.name for file in out.iterdir()
    }
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert (model.dtype, model.config.eos_token_id) == (torch.bfloat16, 1)
    assert transformers.AutoTokenizer.from_pretrained(out)("the ladder")["input_ids"]

    # The same from a converted checkpoint and its config.toml.
    assert convert.run(["from-hf", str(folders / "llama"), "--output", str(tmp_path / "converted")]) == 0
    by_file = ["--job.config_file", str(tmp_path / "converted" / "config.toml"), "--training.steps", "3"]
    assert train.main(argv(folders, tmp_path / "two", *by_file)) == 0
    assert losses(tmp_path / "two") == losses(tmp_path / "one")
    whole = [*by_file, "--checkpoint.no_initial_load_model_only"]
    assert train.main(argv(folders, tmp_path / "three", *whole)) == 2
    assert "holds only weights" in capsys.readouterr().err

    # The checkpoint converts to the same folder, and the run continues from it instead of from its initial weights.
    step = tmp_path / "one" / "checkpoint" / "step-3"
    assert convert.run(["to-hf", str(step), "--output", str(tmp_path / "back"), "--dtype", "bfloat16"]) == 0
    assert (tmp_path / "back" / "config.json").read_text() == (out / "config.json").read_text()
    for name in HFFolder(out).tensors:
        assert torch.equal(HFFolder(tmp_path / "back").read_tensor(name), HFFolder(out).read_tensor(name)), name
    longer = ["--training.steps", "4", "--checkpoint.accept_changes", "training.steps"]
    assert train.main(argv(folders, tmp_path / "one", *straight, *longer)) == 0
    assert len(losses(tmp_path / "one")) == 4

    # Greedy text is the same: in transformers, from the checkpoint and from the folder.
    assert convert.run(["to-hf", str(step), "--output", str(tmp_path / "whole")]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "whole")
    prompt = tokenizer("the ladder", return_tensors="pt", add_special_tokens=False)
    expected = tokenizer.decode(
        model.generate(**prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)[0], skip_special_tokens=True
    )
    capsys.readouterr()
    for place in (step, tmp_path / "whole"):
        greedy = ["--prompt", "the ladder", "--max-new-tokens", "12", "--temperature", "0"]
        assert generate.run(["--checkpoint", str(place), *greedy]) == 0
        assert capsys.readouterr().out.strip() == expected.strip()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that has trained its own tokenizer, its command line and its text."""
    root = tmp_path_factory.mktemp("trained")
    text = (ROOT / "docs" / "layout.md").read_text()
    (root / "text.txt").write_text(text)
    words = [
        *argv(root, root / "run", "--tokenizer.name", "sentencepiece", "--tokenizer.vocab_size", "400"),
        *("--model.flavor", "debug", "--model.vocab_size", "401", "--training.steps", "2"),
        *("--attention.masks", "causal", "--curriculum.name", "constant", "--checkpoint.last_save_in_hf"),
    ]
    assert train.main(words) == 0
    return root, words, text


def files_in(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_tokenizer_that_a_run_has_trained_is_exported(trained, tmp_path):
    root, words, text = trained
    out = root / "run" / "checkpoint" / "step-2-hf"
    own = _tokenizer(config.load(words))
    assert own.vocab_size == 400
    assert tokenizer.load_tokenizer(str(out / "tokenizer.model")).fingerprint == own.fingerprint
    with_folder = ["--model.hf_assets_path", str(out), "--tokenizer.name", "sentencepiece"]
    assert _tokenizer(config.load(with_folder)).fingerprint == own.fingerprint
    exported = transformers.AutoTokenizer.from_pretrained(out)
    for piece in (text[:200], "  two spaces, a\n\ttab and é", "the ladder"):
        assert exported(piece, add_special_tokens=False)["input_ids"] == own.encode(piece)
    step = str(root / "run" / "checkpoint" / "step-2")
    assert convert.run(["to-hf", step, "--output", str(tmp_path / "back")]) == 0
    assert files_in(tmp_path / "back") == files_in(out)


def test_a_checkpoint_keeps_its_tokenizer_when_the_texts_are_gone(trained, tmp_path, capsys):
    root, _, text = trained
    step = shutil.copytree(root / "run" / "checkpoint" / "step-2", tmp_path / "elsewhere" / "step-2")
    (root / "text.txt").rename(root / "away")
    greedy = ["--prompt", text[:60], "--max-new-tokens", "4", "--temperature", "0"]
    assert generate.run(["--checkpoint", str(step), *greedy]) == 0
    of_step = capsys.readouterr().out
    assert of_step.startswith(text[:60])
    assert generate.run(["--checkpoint", str(root / "run"), greedy[0], text[:60], *greedy[1:]]) == 0
    assert capsys.readouterr().out == f"--- 1 of 2\n{of_step}--- 2 of 2\n{of_step}"
    assert convert.run(["to-hf", str(step), "--output", str(tmp_path / "a")]) == 0
    assert files_in(tmp_path / "a") == files_in(root / "run" / "checkpoint" / "step-2-hf")
    assert convert.run(["to-hf", str(step), "--output", str(tmp_path / "b"), "--tokenizer", "none"]) == 0
    assert set(files_in(tmp_path / "b")) == {"config.json", "model.safetensors"}
    (root / "away").rename(root / "text.txt")


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface", "mine"])
def test_a_checkpoint_reads_the_tokenizer_of_its_run(tmp_path, monkeypatch, kind):
    """One beside a file of another kind, one of another name than the usual, one of a plugin that has no path."""
    texts = [page.read_text() for page in sorted((ROOT / "docs").glob("*.md"))]
    here = tmp_path / "here"
    here.mkdir()
    made = tokenizer.train_tokenizer(texts, tokenizer.TokenizerTrainingConfig(kind="byte-bpe", vocab_size=400))
    bpe = made["tokenizer.json"].replace(b"<|end_of_text|>", b"<|stop|>")
    if kind == "sentencepiece":
        made = tokenizer.train_tokenizer(texts, tokenizer.TokenizerTrainingConfig(kind="bpe", vocab_size=400))
        (here / "tokenizer.model").write_bytes(made["tokenizer.model"])
        (here / "tokenizer.json").write_bytes(bpe)
        words = ["--tokenizer.path", str(here / "tokenizer.model")]
    elif kind == "huggingface":
        (here / "mine.json").write_bytes(bpe)
        (here / "tokenizer_config.json").write_text('{"eos_token": "<|stop|>"}')
        words = ["--tokenizer.path", str(here / "mine.json")]
    else:
        monkeypatch.setattr(tokenizer.ByteTokenizer, "files", lambda self: {"tokenizer.json": bpe})
        monkeypatch.setitem(tokenizer.registry._components, "mine", tokenizer.ByteTokenizer)
        words = []
    run = config.load(["--tokenizer.name", kind, *words])
    own = _tokenizer(run)
    for name, content in hf_export.checkpoint_assets(
        run, hf_export.exported_tokenizer_files(own, getattr(run.tokenizer, "path", ""))
    ).items():
        file = tmp_path / "step-1" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    shutil.rmtree(here)
    for name in (step_folders.METADATA_FILE, checkpoint.CHECKSUM_FILE):
        (tmp_path / "step-1" / name).write_text("{}")
    (tmp_path / "step-1" / checkpoint.RUN_STATE_FILE).write_text(checkpoint.RunState(step=1, row=8).to_json())
    monkeypatch.setattr(TrainedModel, "tokenizer_fingerprint", own.fingerprint)
    assert TrainedModel.open(tmp_path / "step-1").build_tokenizer().fingerprint == own.fingerprint


def test_another_tokenizer_than_the_runs_is_refused(tmp_path, monkeypatch):
    words = [*argv(tmp_path, tmp_path, "--tokenizer.name", "bytes"), "--data.sources", '{ name = "python-stdlib" }']
    words += ["--model.flavor", "debug", "--training.steps", "1", "--attention.masks", "causal"]
    assert train.main([*words, "--curriculum.name", "constant"]) == 0
    monkeypatch.setattr(tokenizer.ByteTokenizer, "fingerprint", "other")
    step = str(tmp_path / "checkpoint" / "step-1")
    with pytest.raises(ConfigError, match="tokenizer"):
        convert.run(["to-hf", step, "--output", str(tmp_path / "a")])
    with pytest.raises(ConfigError, match="tokenizer"):
        generate.run(["--checkpoint", step, "--prompt", "x"])


def test_a_run_that_was_killed_before_its_export_makes_it_when_restarted(trained, tmp_path, capsys):
    root, words, _ = trained
    run, dump = tmp_path / "run", ["--job.dump_folder", str(tmp_path / "run")]
    shutil.copytree(root / "run", run)
    out = run / "checkpoint" / "step-2-hf"
    expected, metrics = files_in(out), (run / "metrics.jsonl").read_bytes()
    (out / "model.safetensors").unlink()
    out.rename(out.with_name("step-2-hf.partial"))  # as far as it came
    assert train.main([*words, *dump]) == 0
    assert files_in(out) == expected
    assert not out.with_name("step-2-hf.partial").exists()
    assert (run / "metrics.jsonl").read_bytes() == metrics  # nothing was trained

    (out / "model.safetensors").write_bytes(b"of a run that this one branched off from")
    os.utime(run / "checkpoint" / "step-2" / "SHA256SUMS")  # saved again since
    assert train.main([*words, *dump]) == 0
    assert files_in(out) == expected
    assert train.main([*words, *dump]) == 0  # nothing to do

    shutil.rmtree(out)
    weights = next((run / "checkpoint" / "step-2").glob("*.distcp"))
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    assert train.main([*words, *dump]) == 2
    assert f"{weights.parent} is damaged: {weights.name}" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("context", [12, 50])
def test_the_loss_under_a_sliding_window_is_that_of_transformers(tmp_path, context):
    """A Mistral without a tokenizer, on tokens: documents shorter and longer than its window and than the context."""
    torch.manual_seed(0)
    other = transformers.MistralForCausalLM(
        transformers.MistralConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=60, sliding_window=16, max_position_embeddings=128, initializer_range=0.3,
        )
    )  # fmt: skip
    other.save_pretrained(tmp_path / "hf")
    documents = [torch.randint(60, (length,)) for length in (45, 10, 1, 100)]
    with IndexedWriter(tmp_path / "tokens", np.dtype(np.uint16)) as writer:
        for document in documents:
            writer.add(document.numpy())
    expected = []
    for document in documents:
        for begin in range(0, len(document) - 1, context):
            part = document[None, begin : begin + context + 1]
            with torch.no_grad():
                log_p = other(part).logits.log_softmax(-1)[:, :-1]
            expected += (-log_p.gather(2, part[:, 1:, None])).flatten().tolist()
    files = ["--files", str(tmp_path / "tokens.bin"), "--context", str(context)]
    assert evaluate.run([str(tmp_path / "hf"), *files]) == 0
    (row,) = ResultTable(tmp_path / "hf" / "evaluation.csv").rows()
    assert row["tokens"] == len(expected) == 44 + 9 + 99
    assert row["total_loss"] == pytest.approx(sum(expected), rel=1e-5)


def test_a_vocabulary_grows_and_shrinks_again(folders, tmp_path):
    size = HFFolder(folders / "llama").config["vocab_size"]
    straight = ["--model.hf_assets_path", str(folders / "llama"), "--checkpoint.initial_load_in_hf"]
    ends = ["--training.steps", "1", "--optimizer.lr", "1e-9", "--checkpoint.last_save_in_hf"]
    more = ["--model.vocab_size", str(size + 5)]
    assert train.main(argv(folders, tmp_path / "run", *straight, *ends, *more)) == 0
    grown = HFFolder(tmp_path / "run" / "checkpoint" / "step-1-hf")
    rows = grown.read_tensor("lm_head.weight")
    assert (grown.config["vocab_size"], len(rows)) == (size + 5, size + 5)
    torch.testing.assert_close(rows[size:], rows[:size].mean(dim=0).expand(5, -1), atol=1e-6, rtol=0)
    step = str(tmp_path / "run" / "checkpoint" / "step-1")
    assert convert.run(["to-hf", step, "--output", str(tmp_path / "cut"), "--vocab-size", str(size)]) == 0
    cut = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    assert cut.config.vocab_size == size
    assert torch.equal(cut.lm_head.weight, rows[:size])


def test_mistral_keeps_its_window(folders, tmp_path, capsys):
    path = ["--model.hf_assets_path", str(folders / "mistral")]
    found = config.load([*path, "--training.seq_len", "64"])
    assert (found.attention.masks, found.curriculum.window, found.tokenizer.name) == (["sliding"], 16, "huggingface")
    assert config.load([*path, "--training.seq_len", "16"]).attention.masks == ["causal"]
    other = config.load([*path, "--training.seq_len", "64", "--attention.masks", "document"])
    assert other.attention.masks == ["document"]
    assert "sliding window of 16" in capsys.readouterr().err

    assert convert.run(["from-hf", str(folders / "mistral"), "--output", str(tmp_path / "converted")]) == 0
    assert (
        convert.run(
            [
                "to-hf",
                str(tmp_path / "converted/checkpoint/step-0"),
                "--output",
                str(tmp_path / "back"),
                "--seq-len",
                "4096",
            ]
        )
        == 0
    )
    back = HFFolder(tmp_path / "back").config
    assert (back["sliding_window"], back["max_position_embeddings"], back["bos_token_id"]) == (16, 4096, 0)
    assert type(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")).__name__ == "MistralForCausalLM"


def test_a_step_in_mid_run_is_exported_with_the_window_and_the_rope_theta_of_its_step(folders, tmp_path):
    """The logits are those of transformers under the window of the step, on rows longer than it."""
    straight = ["--model.hf_assets_path", str(folders / "llama"), "--checkpoint.initial_load_in_hf"]
    grows = ["--attention.masks", "sliding", "--curriculum.name", "linear", "--curriculum.initial_window", "7"]
    phases = ["--phases", "{ from_step = 0, rope_theta = 5e5 }", "{ from_step = 3, rope_theta = 1e6 }"]
    steps = ["--curriculum.every", "1", "--training.steps", "5", "--checkpoint.interval", "2"]
    assert train.main(argv(folders, tmp_path, *straight, *grows, *phases, *steps)) == 0
    for step, window, theta in ((2, 8, 5e5), (4, 10, 1e6), (5, 11, 1e6)):
        source, out = tmp_path / "checkpoint" / f"step-{step}", tmp_path / f"hf-{step}"
        assert convert.run(["to-hf", str(source), "--output", str(out)]) == 0
        written = HFFolder(out).config
        assert (written["sliding_window"], written["rope_theta"]) == (window, theta)
        kernel = attention.build_kernel("dense", ["sliding"], "cpu", training=False)
        model = TrainedModel.open(source).load(kernel.attention, 64).model
        tokens = torch.arange(64)[None]
        start = mask.sliding(torch.arange(64, dtype=torch.int32)[None], window)
        other = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
        with torch.no_grad():
            found = model(tokens, kernel.prepare(start, torch.device("cpu")))
            torch.testing.assert_close(found, other(tokens).logits, atol=1e-4, rtol=1e-3)


def test_the_special_tokens_of_the_settings_are_those_of_every_exported_file(folders, tmp_path):
    words = ["--tokenizer.name", "huggingface", "--tokenizer.path", str(folders / "llama" / "tokenizer.json")]
    words += ["--tokenizer.bos_token", "!", "--tokenizer.eos_token", "#", "--model.hf_assets_path"]
    words += [str(folders / "llama"), "--training.steps", "1", "--checkpoint.last_save_in_hf"]
    assert train.main(argv(folders, tmp_path / "run", *words)) == 0
    step = tmp_path / "run" / "checkpoint" / "step-1"
    assert convert.run(["to-hf", str(step), "--output", str(tmp_path / "out")]) == 0
    for out in (step.with_name("step-1-hf"), tmp_path / "out"):
        own = transformers.AutoTokenizer.from_pretrained(out)
        model = transformers.AutoModelForCausalLM.from_pretrained(out)
        assert (own.bos_token, own.eos_token) == ("!", "#")
        for ids in (model.config, model.generation_config):
            assert (ids.bos_token_id, ids.eos_token_id) == (own.bos_token_id, own.eos_token_id)


def test_a_folder_without_a_tokenizer_converts_there_and_back(folders, tmp_path):
    folder, out = tmp_path / "bare", tmp_path / "converted"
    shutil.copytree(folders / "llama", folder, ignore=shutil.ignore_patterns("tokenizer*"))
    assert convert.run(["from-hf", str(folder), "--output", str(out)]) == 0
    assert convert.run(["to-hf", str(out / "checkpoint" / "step-0"), "--output", str(tmp_path / "back")]) == 0
    assert set(files_in(tmp_path / "back")) == {"config.json", "model.safetensors"}
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert (back.config.bos_token_id, back.config.eos_token_id) == (None, None)
    for name in HFFolder(folder).tensors:
        assert torch.equal(HFFolder(folder).read_tensor(name), HFFolder(tmp_path / "back").read_tensor(name))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.positional_embedding", "none"], "positional_embedding = 'none'"),
        (["--model.rope_restart", "8"], "model.rope_restart"),
        (["--model.logit_softcap", "30"], "logit_softcap = 30.0: Hugging Face's llama has no final_logit_softcapping"),
        (
            [
                "--model.name",
                "qwen3",
                "--model.layer_types",
                "sliding_attention",
                "full_attention",
                "--attention.sliding_attention.masks",
                "chunk",
                "--attention.sliding_attention.window",
                "16",
            ],
            "qwen3 needs the mask 'sliding'",
        ),
    ],
)
def test_a_run_whose_model_cannot_be_exported_is_refused_before_it_starts(tmp_path, capsys, words, message):
    words = [*words, "--checkpoint.last_save_in_hf", "--model.flavor", "debug", "--curriculum.name", "constant"]
    (tmp_path / "text.txt").write_text(WORDS * 60)
    assert train.main(argv(tmp_path, tmp_path / "run", *words)) == 2
    error = capsys.readouterr().err
    assert "checkpoint.last_save_in_hf: " in error
    assert message in error
    assert not (tmp_path / "run" / "checkpoint").exists()


BAD_FOLDERS = {
    "no config": {"config.json": None},
    "config no JSON": {"config.json": "{"},
    "config no object": {"config.json": "[]"},
    "string": {"config.json": '{"model_type": "llama", "vocab_size": "96"}'},
    "no weights": {"*.safetensors*": None},
    "empty weights": {"*.safetensors*": None, "pytorch_model.bin": ""},
    "missing shard": {"*00002*.safetensors": None},
    "damaged index": {"model.safetensors.index.json": '{"weight_map": {"a": ["b"]}}'},
    "tokenizer no JSON": {"tokenizer.json": "{"},
    "unknown tokenizer": {"tokenizer.json": "hello"},
    "tokenizer config no JSON": {"tokenizer_config.json": "{"},
    "special token no string": {"tokenizer_config.json": '{"eos_token": 5}'},
    "unknown special token": {"tokenizer_config.json": '{"eos_token": "<end>"}'},
}


@pytest.mark.parametrize("bad", BAD_FOLDERS)
def test_a_bad_folder_is_one_clear_line_for_every_command(folders, tmp_path, monkeypatch, capsys, bad):
    folder = shutil.copytree(folders / "llama", tmp_path / "bad")
    for pattern, content in BAD_FOLDERS[bad].items():
        for file in folder.glob(pattern):
            file.unlink()
        if content is not None:
            (folder / pattern).write_text(content)
    calls = [
        ["evaluate", str(folder), "--files", str(folders / "text.txt"), "--context", "32"],
        ["generate", "--checkpoint", str(folder), "--prompt", "the ladder", "--max-new-tokens", "1"],
    ]
    if "token" not in bad:  # a conversion copies the files of the tokenizer
        calls.append(["convert", "from-hf", str(folder), "--output", str(tmp_path / "out")])
    for words in calls:
        monkeypatch.setattr(sys, "argv", ["torchladder", *words])
        assert commands.main() == 2, words
        error = capsys.readouterr().err.strip()
        assert str(folder) in error
        assert len(error.splitlines()) == 1, error
    assert not (tmp_path / "out").exists()


def test_the_row_length_and_the_rope_theta_of_phases_are_exported(folders, tmp_path):
    straight = ["--model.hf_assets_path", str(folders / "llama"), "--checkpoint.initial_load_in_hf"]
    phases = ["--phases", "{ from_step = 0, rope_theta = 5e5 }", "--training.steps", "1"]
    assert train.main(argv(folders, tmp_path, *straight, *phases, "--checkpoint.last_save_in_hf")) == 0
    written = HFFolder(tmp_path / "checkpoint" / "step-1-hf").config
    assert (written["rope_theta"], written["max_position_embeddings"]) == (5e5, 64)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--model.n_layers", "3"], ["model.n_layers = 2", "3"]),
        (["--model.rope_theta", "1e6"], ["model.rope_theta", "[[phases]]"]),
        (["--model.vocab_size", "10"], ["model.vocab_size", "10"]),
        (["--model.name", "qwen3"], ["model.name = 'qwen3'", "llama"]),
        (["--model.flavor", "1b"], ["model.dim = 32", "2048"]),
    ],
)
def test_settings_that_contradict_the_folder_are_refused(folders, tmp_path, capsys, more, words):
    straight = ["--model.hf_assets_path", str(folders / "llama"), "--checkpoint.initial_load_in_hf"]
    assert train.main(argv(folders, tmp_path, *straight, *more)) == 2
    shown = capsys.readouterr().err
    assert all(word in shown for word in words)


def test_a_run_without_a_folder_to_start_from_is_refused():
    with pytest.raises(ConfigError, match=r"model\.hf_assets_path or checkpoint\.initial_load_path"):
        config.load(["--checkpoint.enable", "--checkpoint.initial_load_in_hf"])
    with pytest.raises(ConfigError, match=r"last_save_in_hf needs checkpoint\.enable"):
        config.load(["--checkpoint.last_save_in_hf"])
    with pytest.raises(ConfigError, match=r"last_save_in_hf needs checkpoint\.enable"):
        CheckpointConfig(last_save_in_hf=True)
    with pytest.raises(ConfigError, match="not a Hugging Face folder"):
        config.load(["--model.hf_assets_path", "/nowhere"])


def test_commands_refuse_invalid_arguments(folders, tmp_path, monkeypatch, capsys):
    assert convert.run(["from-hf", str(folders / "llama"), "--output", str(tmp_path / "converted")]) == 0
    back = ["convert", "to-hf", str(tmp_path / "converted" / "checkpoint" / "step-0"), "--output", str(tmp_path / "a")]
    for words, message in (
        (["convert", "from-hf", str(tmp_path), "--output", str(tmp_path / "a")], "is not a Hugging Face folder"),
        (["convert", "from-hf", str(folders / "llama"), "--output", str(tmp_path)], "exists already; --overwrite"),
        (["convert", "from-hf", str(folders / "llama"), "--output", str(folders), "--overwrite"], "would replace"),
        (["convert", "from-hf", str(folders / "llama"), "--output", __file__, "--overwrite"], "is a file"),
        (["convert", "to-hf", str(tmp_path), "--output", str(tmp_path / "a")], "is not a complete checkpoint"),
        ([*back, "--vocab-size", "0"], "--vocab-size 0: must be 1 or more"),
        ([*back, "--seq-len", "-3"], "--seq-len -3: must be 1 or more"),
        ([*back, "--vocab-size", "100"], "--vocab-size 100: the tokenizer has"),
        (["generate", "--checkpoint", str(tmp_path), "--prompt", "a"], "neither a complete checkpoint"),
    ):
        monkeypatch.setattr(sys, "argv", ["torchladder", *words])
        assert commands.main() == 2
        assert message in capsys.readouterr().err


def test_a_folder_without_a_tokenizer_is_an_error_for_text(folders, tmp_path, monkeypatch, capsys):
    folder, converted = tmp_path / "bare", tmp_path / "converted"
    shutil.copytree(folders / "llama", folder, ignore=shutil.ignore_patterns("tokenizer*"))
    assert convert.run(["from-hf", str(folder), "--output", str(converted)]) == 0
    for words, message in (
        (["generate", "--checkpoint", str(folder), "--prompt", "a"], f"{folder} has no tokenizer for the prompts"),
        (["evaluate", str(folder), "--files", str(folders / "text.txt")], "text.txt is raw text: it needs a tokenizer"),
        (
            ["generate", "--checkpoint", str(converted / "checkpoint" / "step-0"), "--prompt", "a"],
            "step-0 has no tokenizer for the prompts",
        ),
    ):
        monkeypatch.setattr(sys, "argv", ["torchladder", *words])
        assert commands.main() == 2
        assert message in " ".join(capsys.readouterr().err.split())


def test_the_examples_of_the_page_work(folders, tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "huggingface.md").read_text()
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "Llama-3.2-1B").symlink_to(folders / "llama")
    monkeypatch.chdir(tmp_path)
    shown = [line for block in re.findall(r"```sh\n(.*?)```", page, flags=re.DOTALL) for line in block.splitlines()]
    assert len(shown) == 4
    for line in shown:
        monkeypatch.setattr(sys, "argv", shlex.split(line))
        assert commands.main() == 0
    assert capsys.readouterr().out.count("The ladder") == 2
    training = re.search(r"    \./run_train\.sh (.*?)\n\n", page, flags=re.DOTALL)[1].replace("\\\n", " ")
    given = [word for word in shlex.split(training) if word not in ("--job.config_file", "my.toml")]
    assert train.main([*argv(folders, tmp_path / "out"), *given, "--training.steps", "1"]) == 0
    assert (tmp_path / "out" / "checkpoint" / "step-1-hf").is_dir()
    names = {}
    exec(re.search(r"```python\n(.*?)```", page, flags=re.DOTALL)[1], names)
    assert names["River"].hf_adapter.hf_name("norm.weight") == "model.last_norm.weight"
    assert names["River"].hf_adapter.hf_name("layers.3.attention.q_proj.weight").startswith("model.layers.3.")


MEASURED = """
import resource, sys
from pathlib import Path
import torch
from torchladder import models
from torchladder.models.hf import conversion, hf_folder
from torchladder.models.hf.adapter import HFMetadata

source, out, hf_folder.MAX_SHARD_BYTES = Path(sys.argv[1]), Path(sys.argv[2]), 2 << 20
kept = hf_folder.HFFolder(source)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
conversion.hf_to_checkpoint(kept, out / "step-0")
model = models.LlamaConfig(dim=256, n_layers=40, n_heads=8, ffn_dim=512, vocab_size=1024)
(out / "back").mkdir()
conversion.checkpoint_to_hf(out / "step-0", out / "back", ("llama", model), HFMetadata(64))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_converting_holds_a_shard_and_not_the_model(tmp_path):
    """A model of 100 MiB in shards of 2 MiB: both ways never take a quarter of it."""
    (tmp_path / "source").mkdir()
    make = MEASURED.split("kept =")[0] + (
        "from torchladder.models.hf import hf_weights\n"
        "config = models.LlamaConfig(dim=256, n_layers=40, n_heads=8, ffn_dim=512, vocab_size=1024)\n"
        "model = models.Llama(config, seq_len=8)\n"
        "hf_weights.save_hf_weights(model, source, HFMetadata(64), torch.float32, is_writer=True)\n"
    )
    for code in (make, MEASURED):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "source"), str(tmp_path)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
    size = sum(file.stat().st_size for file in (tmp_path / "source").glob("*.safetensors"))
    assert size > 100 << 20
    assert float(done.stdout) < 25
