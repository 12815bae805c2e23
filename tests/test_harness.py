"""Tasks of the lm-evaluation-harness: against its own model of Hugging Face folders, and what the command refuses."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import run

from torchladder import commands
from torchladder.commands import convert
from torchladder.commands import evaluate as command
from torchladder.inference.evaluation.harness_jobs import TASKS
from torchladder.inference.evaluation.harness_model import HarnessModel
from torchladder.inference.evaluation.harness_tasks import load_tasks
from torchladder.inference.evaluation.result_table import ResultTable
from torchladder.inference.trained_model import TrainedModel
from torchladder.models.attention.sdpa import SdpaKernel

QUESTIONS = [
    {"question": "The sky is", "choices": ["blue", "made of stone"], "answer": 0, "text": "blue"},
    {"question": "Snow is", "choices": ["red", "white"], "answer": 1, "text": "white"},
    {"question": "x = 1\n" * 30, "choices": ["y", "x = 1"], "answer": 1, "text": "x = 1"},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{ data_files: {{ test: {data} }}, cache_dir: {cache} }}
test_split: test
fewshot_split: test
doc_to_text: "{{{{question}}}}"
"""
CHOICE = """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{ metric: acc }, { metric: acc_norm }]
"""
GENERATION = """
output_type: generate_until
doc_to_target: "{{text}}"
generation_kwargs: { until: ["e", "\\n"], max_gen_toks: 12 }
metric_list: [{ metric: exact_match }]
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_target: "{{question}}"
metric_list: [{ metric: bits_per_byte }]
"""
GENERATES = {"until": ["e"], "max_gen_toks": 12}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A run of two checkpoints, and three tasks over one local file."""
    pytest.importorskip("lm_eval")
    root = tmp_path_factory.mktemp("harness")
    (root / "test.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    for name, rest in ("choice", CHOICE), ("generation", GENERATION), ("rolling", ROLLING):
        text = TASK.format(name=name, data=root / "test.jsonl", cache=root / "cache")
        (root / f"{name}.yaml").write_text(text + rest)
    run(root / "run", "--training.steps", "2", "--training.seq_len", "64", "--training.local_batch_size", "1",
        "--optimizer.lr", "1e-2", "--validation.no-enable", "--data.cache_folder", str(root / "data"),
        "--checkpoint.enable", "--checkpoint.interval", "1", "--metrics.no_enable_tensorboard")  # fmt: skip
    return root


def evaluate(root, *argv, tasks=("choice", "generation"), model="run", output=None, code=0):
    """Evaluates tasks; returns the rows of the output."""
    output = output or root / "results.csv"
    files = [str(root / f"{name}.yaml") for name in tasks]
    assert command.run([str(root / model), "--tasks", *files, "--output", str(output), *argv]) == code
    return ResultTable(Path(output), TASKS).rows()


def model_of(root, context=64):
    trained = TrainedModel.open(root / "run")
    loaded = trained.load(SdpaKernel.attention, context)
    return HarnessModel(trained, loaded, trained.build_tokenizer(), context, False, torch.float32, 256, lambda count: 0)


def requests(*args):
    return [SimpleNamespace(args=one) for one in args]


def test_each_metric_of_each_checkpoint_is_a_row_and_is_not_measured_twice(root, tmp_path, monkeypatch, capsys):
    output = tmp_path / "tasks.jsonl"
    rows = evaluate(root, output=output)
    assert [(row["step"], row["task"], row["metric"]) for row in rows] == [
        (step, *one)
        for step in (1, 2)
        for one in (("choice", "acc"), ("choice", "acc_norm"), ("generation", "exact_match"))
    ]
    names = ("documents", "context", "num_fewshot", "filter")
    assert {tuple(row[name] for name in names) for row in rows} == {(3, 64, 0, "none")}
    assert all(0 <= row["value"] <= 1 for row in rows)
    out, err = capsys.readouterr()
    assert f"{rows[0]['value']:.4f}" in out
    assert "requests/s" in err
    monkeypatch.setattr(TrainedModel, "load", None)
    assert evaluate(root, output=output) == rows


def test_limit_and_shots_are_other_results(root, tmp_path):
    ask = {"tasks": ("choice",), "model": "run/checkpoint/step-2", "output": tmp_path / "tasks.csv"}
    evaluate(root, **ask)
    rows = evaluate(root, "--limit", "2", "--num-fewshot", "1", **ask)
    assert [(row["documents"], row["num_fewshot"]) for row in rows] == [(3, 0)] * 2 + [(2, 1)] * 2
    rows = evaluate(root, "--limit", "0.5", **ask)
    assert [row["documents"] for row in rows[4:]] == [2, 2]


def test_scores_and_texts_are_those_of_the_harness_on_the_exported_model(root, tmp_path):
    """Long contexts are cut, batches are padded, and a text that fills several contexts is read in slices."""
    pytest.importorskip("safetensors")
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM

    assert convert.run(["to-hf", str(root / "run" / "checkpoint" / "step-2"), "--output", str(tmp_path / "hf")]) == 0
    ours = model_of(root)
    theirs = HFLM(str(tmp_path / "hf"), device="cpu", dtype="float32", batch_size=1, max_length=64)
    pairs = requests(
        *((one["question"], f" {choice}") for one in QUESTIONS for choice in one["choices"]),
        ("spaces at the end  ", "belong to the continuation"),
        ("", "nothing before"),
    )
    expected = theirs.loglikelihood(pairs, disable_tqdm=True)
    for (score, is_greedy), (their_score, their_greedy) in zip(ours.loglikelihood(pairs), expected, strict=True):
        assert score == pytest.approx(their_score, rel=1e-5)
        assert is_greedy == their_greedy
    texts = requests(("short",), (QUESTIONS[2]["question"],))
    expected = theirs.loglikelihood_rolling(texts, disable_tqdm=True)
    assert ours.loglikelihood_rolling(texts) == pytest.approx(expected, rel=1e-5)
    prompts = requests(*((one["question"], GENERATES) for one in QUESTIONS))
    assert ours.generate_until(prompts) == theirs.generate_until(prompts, disable_tqdm=True)


def test_the_likeliest_token_is_the_greedy_one(root):
    letters = [chr(code) for code in range(32, 127)]
    scores = model_of(root).loglikelihood(requests(*(("x =", letter) for letter in letters)))
    best = max(scores)[0]
    assert [is_greedy for _, is_greedy in scores] == [score == best for score, _ in scores]


def test_repeats_are_sampled_with_other_seeds_and_each_again_alike(root):
    model = model_of(root)
    (request,) = requests(("x = ", {"max_gen_toks": 12, "do_sample": True, "temperature": 5.0}))
    texts = model.generate_until([request] * 3)
    assert len(set(texts)) == 3
    assert model.generate_until([request] * 3) == texts


def test_a_context_may_be_longer_than_the_rows_of_the_run(root, tmp_path):
    ask = {"tasks": ("generation", "rolling"), "model": "run/checkpoint/step-2"}
    rows = evaluate(root, "--context", "64", "128", output=tmp_path / "tasks.csv", **ask)
    assert [(row["task"], row["context"]) for row in rows] == [
        (task, context) for task in ("generation", "rolling") for context in (64, 128)
    ]
    assert rows[2]["value"] != rows[3]["value"]


def test_the_task_of_the_docs_works(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    page = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text()
    for name, kind in ("my_task.yaml", "yaml"), ("questions.jsonl", "json"):
        (tmp_path / name).write_text(re.search(rf"```{kind}\n(.*?)```", page, flags=re.DOTALL)[1])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (task,) = load_tasks(["my_task.yaml"], None, None)
    assert (task.num_requests, task.metrics) == (2, [("my_task", "acc", "none"), ("my_task", "acc_norm", "none")])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--tasks missing.yaml", "--tasks missing.yaml: no such file."),
        ("--tasks ROOT/broken.yaml", "the task 'ROOT/broken.yaml' cannot be loaded: "),
        ("--tasks ROOT/generation.yaml --context 8", "generates up to 12 tokens after its prompts"),
        ("--tasks ROOT/choice.yaml --limit 1.5", "--limit 1.5: must be a number of documents, or a fraction"),
        ("--tasks ROOT/choice.yaml --num-fewshot -1", "--num-fewshot -1: must be 0 or more"),
        ("--tasks ROOT/zero.yaml --num-fewshot 2", "the task zero is defined without examples (num_fewshot 0)"),
        ("--tasks ROOT/choice.yaml --files ROOT/test.jsonl", "--files does not apply to --tasks."),
        ("--tasks ROOT/choice.yaml --stride 8", "--stride does not apply to --tasks."),
        ("--tasks ROOT/choice.yaml --seed 0", "--seed does not apply to --tasks."),
        ("--tasks ROOT/choice.yaml --on-error skip", "--on-error does not apply to --tasks."),
        ("--files ROOT/test.jsonl --probe-rows 2", "--probe-rows applies only to --probes."),
        ("--tasks ROOT/choice.yaml --bos", "--bos: the tokenizer has no bos token."),
        ("--tasks ,", "--tasks: name at least one task."),
        ("--files ROOT/test.jsonl --limit 2", "--limit applies only to --tasks."),
        ("--tasks ROOT/beams.yaml", "generation_kwargs has num_beams. Known: do_sample"),
    ],
)
def test_one_error(root, argv, message, capsys):
    text = TASK.format(name="zero", data=root / "test.jsonl", cache=root / "cache")
    (root / "zero.yaml").write_text(text + CHOICE + "num_fewshot: 0\n")
    (root / "broken.yaml").write_text(text.replace("test.jsonl", "absent.jsonl") + CHOICE)
    (root / "beams.yaml").write_text(text + GENERATION.replace("12 }", "12, num_beams: 2 }"))
    words = ["evaluate", str(root / "run" / "checkpoint" / "step-2"), *argv.replace("ROOT", str(root)).split()]
    assert commands.main([*words, "--output", str(root / "refused.csv")]) == 2
    assert message.replace("ROOT", str(root)) in re.sub(r"\s+", " ", capsys.readouterr().err)


def test_unknown_tasks_name_the_nearest(monkeypatch):
    pytest.importorskip("lm_eval")
    known = SimpleNamespace(all_tasks=["hellaswag", "piqa"], match_tasks=lambda names: [])
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **options: known)  # the index of all takes seconds
    with pytest.raises(ValueError, match=r"unknown task 'helaswag'\. Nearest: hellaswag\."):
        load_tasks(["helaswag"], None, None)


def test_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ValueError, match=r"--tasks needs the package lm-eval: pip install 'torchladder\[eval\]'"):
        load_tasks(["hellaswag"], None, None)
