import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from torchladder import commands, config, mask, models, train
from torchladder.commands import plan as command
from torchladder.data.formats.indexed import IndexedWriter
from torchladder.registry import ConfigError
from torchladder.training import run_plan as plans
from torchladder.training.plan_report import summary_lines

CONFIGS = Path(__file__).parents[1] / "train_configs"


def load(name: str, *argv: str) -> config.Config:
    return config.load(["--job.config_file", str(CONFIGS / f"{name}.toml"), *argv])


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.toml")))
def test_every_shipped_config_makes_a_plan(name):
    plan = plans.make_plan(load(name), ranks=8 if name.startswith("llama") else 1)
    assert plan.num_parameters > 0
    assert 0 <= plan.saved < 1
    windows = [plan.schedule.window(step) for step in (0, plan.steps // 2, plan.steps - 1)]
    assert all(1 <= window <= plan.config.training.seq_len for window in windows)


def test_flops_are_the_sum_over_all_steps():
    plan = plans.make_plan(load("debug", "--attention.masks", "chunk", "--training.steps", "7"))
    row = torch.arange(plan.config.training.seq_len, dtype=torch.int32)[None]
    with torch.device("meta"):
        model = models.registry.build(plan.config.model, attention_fn=None, seq_len=row.shape[1])
    rows = plan.batch.global_batch_size
    starts = [mask.chunk(row, plan.schedule.window(step)) for step in range(7)]
    expected = sum(model.flops(rows * row.shape[1], 2 * rows * mask.pairs(start)) for start in starts)
    assert plan.flops == expected
    assert plan.flops_full_context == 7 * model.flops(rows * row.shape[1], 2 * rows * mask.pairs(mask.causal(row, 1)))
    assert plan.saved == pytest.approx(1 - expected / plan.flops_full_context)


def test_random_windows_are_planned_step_by_step():
    drawn = ["--curriculum.name", "random", "--curriculum.min_window", "4", "--curriculum.max_window", "100"]
    plan = plans.make_plan(load("debug", "--attention.masks", "sliding", "--training.steps", "50", *drawn))
    row = torch.arange(256, dtype=torch.int32)[None]
    windows = [plan.schedule.window(step) for step in range(50)]
    attended = sum(mask.pairs(mask.sliding(row, window)) for window in windows)
    assert plan.attention_saved == pytest.approx(1 - attended / (50 * mask.pairs(mask.causal(row, 1))))
    assert plan.layer_types[0].window_range == (min(windows), 100)
    line = summary_lines(plan)[3]
    assert line == (
        f"curriculum  random, window {windows[0]} at step 0, then {min(windows)} to 100, "
        "100 at the last step: never the full 256"
    )
    words = ["--attention.masks", "causal", "--curriculum.name", "random", "--curriculum.windows", "8", "256"]
    with pytest.raises(ConfigError, match=r"curriculum 'random' sets a window, but none of attention\.masks"):
        plans.make_plan(load("debug", *words))


def test_llama1b_dm8_is_skyladders():
    plan = plans.make_plan(load("llama1b_dm8"), ranks=8)
    assert plan.tokens_per_step == 1_048_576
    assert plan.num_parameters == 1_100_048_384
    assert plan.full_context_step == 65_280
    assert [plan.schedule.window(step) for step in (0, 1000, 65_279, 65_280, 99_999)] == [32, 157, 8191, 8192, 8192]
    assert plan.saved == pytest.approx(0.0939, abs=0.0001)
    assert (plan.batch.local_batch_size, plan.batch.accumulation_steps) == (4, 4)


def test_json_is_one_object(capsys):
    argv = ["--job.config_file", str(CONFIGS / "llama1b_dm8.toml"), "--json", "--at", "0,1000,65280"]
    assert command.run([*argv, "--training.local_batch_size", "4"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["windows"] == {"0": 32, "1000": 157, "65280": 8192}
    assert {"steps", "tokens_per_step", "parameters", "flops", "flops_full_context", "saved"} <= set(shown)


def test_json_stays_json_where_the_command_line_replaces_a_component(capsys):
    argv = ["--job.config_file", str(CONFIGS / "debug.toml"), "--json", "--curriculum.name", "constant"]
    assert command.run(argv) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["steps"] == 20
    assert "its keys are ignored: initial_window, ramp" in shown.err


def test_the_picture_is_written(tmp_path, capsys):
    file = tmp_path / "ladder.png"
    command.run(["--job.config_file", str(CONFIGS / "debug.toml"), "--plot", str(file)])
    assert file.read_bytes().startswith(b"\x89PNG")
    assert "window" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--training.global_batch_size", "7"], ["global_batch_size = 7", "local_batch_size 4", "4 or 8"]),
        (["--curriculum.initial_window", "999"], ["curriculum.initial_window = 999", "256"]),
        (["--attention.masks", "document"], ["chunk", "sliding", "sets a window"]),
        (["--model.flavor", "debgu"], ["debgu", "debug"]),
        (["--parallelism.data_parallel_replicate_degree", "3"], ["3", "data_parallel_replicate_degree 1"]),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(argv, words):
    with pytest.raises(ConfigError) as error:
        plans.make_plan(load("debug", *argv))
    for word in words:
        assert word in str(error.value)


def test_commands_fail_with_one_message(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["torchladder", "plam"])
    assert commands.main() == 2
    assert "plan" in capsys.readouterr().err


# --- what the data decides -------------------------------------------------------------------------------------------


@pytest.fixture
def pairs(tmp_path):
    """A config over two sources of 1,000 and 500 tokens, on rows of 16 tokens and 4 rows a step."""
    for name, tokens in (("web", 1000), ("math", 500)):
        with IndexedWriter(tmp_path / name, np.dtype(np.uint16)) as writer:
            for begin in range(0, tokens, 25):
                writer.add(np.arange(begin, begin + 25) % 250)
    sources = [f'{{ path = "{tmp_path}/{name}.bin", label = "{name}" }}' for name in ("web", "math")]
    argv = ["--training.seq_len", "16", "--training.local_batch_size", "4", "--curriculum.initial_window", "2"]
    validation = ["--data.validation_sources", sources[1]]
    return ["--job.config_file", str(CONFIGS / "debug.toml"), *argv, *validation, "--data.sources", *sources]


def test_a_plan_says_what_documents_give_to_the_final_window(pairs, tmp_path, capsys):
    """Documents of 25 tokens: under a window of 16 the first 15 tokens see less, the others 16."""
    argv = [*pairs, "--training.steps", "10"]
    assert command.run([*argv, "--json"]) == 0
    context = json.loads(capsys.readouterr().out.splitlines()[-1])["final_context"]  # after what the log says
    mean = (sum(range(1, 17)) + 9 * 16) / 25
    assert (context["window"], context["long_share"]) == (16, 1.0)
    assert context["mean_effective_context"] == pytest.approx(mean)
    assert [source["source"] for source in context["sources"]] == ["web", "math"]
    assert command.run(argv) == 0
    out, err = capsys.readouterr()
    assert "context of 16" in out
    assert re.search(rf"web +{mean:,.0f} +{mean / 16:.1%} +100.0%", out)
    assert re.search(rf"all +{mean:,.0f} +", out)
    assert "warning: the final window" not in err


def test_a_final_window_that_documents_do_not_fill_is_a_warning(pairs, tmp_path, capsys):
    with IndexedWriter(tmp_path / "long", np.dtype(np.uint16)) as writer:
        writer.add(np.arange(100) % 250)
    sources = [f'{{ path = "{tmp_path}/{name}.bin", label = "{name}", weight = {weight} }}'
               for name, weight in (("web", 3), ("long", 1))]  # fmt: skip
    words = [*pairs[: pairs.index("--data.sources") + 1], *sources, "--training.steps", "100"]
    assert command.run([*words, "--training.seq_len", "64", "--json"]) == 0
    context = json.loads(capsys.readouterr().out)["final_context"]
    assert [source["long_share"] for source in context["sources"]] == [0.0, 1.0]
    assert context["long_share"] == pytest.approx(0.25, abs=0.01)  # over the tokens that the run reads
    assert command.run([*pairs, "--training.steps", "10", "--training.seq_len", "64"]) == 0
    assert "the final window of 64 tokens is longer than nearly all documents: only 0.00%" in capsys.readouterr().err


def test_steps_follow_from_epochs(pairs):
    plan = plans.make_plan(config.load([*pairs, "--training.steps", "-1", "--training.epochs", "3"]))
    assert plan.steps == plan.config.training.steps == -(-3 * 1500 // 64)
    assert plan.config.training.epochs is None  # the resolved settings give the same run, and do not say it twice
    assert plan.full_context_step < plan.steps  # the ladder is drawn over the steps that the data gave
    assert plans.make_plan(config.load([*pairs, "--training.steps", "-1"])).steps == 10_000


def test_steps_and_epochs_exclude_each_other(pairs):
    with pytest.raises(ConfigError, match="both set the run's length"):
        config.load([*pairs, "--training.steps", "5", "--training.epochs", "3"])


def test_running_out_is_an_error_before_the_run(pairs):
    with pytest.raises(ConfigError, match="source math runs out at step 16 of 20, 140 tokens are missing"):
        plans.make_plan(config.load([*pairs, "--data.no_repeat"]))
    assert plans.make_plan(config.load([*pairs, "--data.no_repeat", "--training.steps", "16"])).steps == 16


def test_the_plan_tells_each_phase(pairs, capsys):
    phases = [
        "{ from_step = 5, source_weights = { web = 3, math = 1 }, window = 4 }",
        "{ from_fraction = 0.5, rope_theta = 5e4 }",
    ]
    argv = [*pairs, "--phases", *phases]
    assert command.run([*argv, "--json", "--at", "4,5,19"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])  # below what the logger of an earlier test prints
    assert [(phase["step"], phase["steps"]) for phase in found["phases"]] == [(0, 5), (5, 5), (10, 10)]
    assert found["phases"][2]["sets"] == {"source_weights": {"web": 3, "math": 1}, "window": 4, "rope_theta": 5e4}
    assert [one["tokens"] for phase in found["phases"] for one in phase["sources"]] == [160, 160, 240, 80, 480, 160]
    assert found["phases"][2]["sources"][1]["epochs_before"] == pytest.approx(240 / 500)
    assert found["windows"]["4"] > 4 == found["windows"]["5"] == found["windows"]["19"]
    assert command.run(argv) == 0
    shown = capsys.readouterr().out
    assert "0.48 to 0.80" in shown
    assert "rope_theta 50000.0" in shown


@pytest.mark.parametrize("label", ["web", "a-label-that-is-longer-than-what-a-terminal-has-left-for-it"])
def test_the_plan_names_its_sources_on_a_narrow_terminal(pairs, capsys, monkeypatch, label):
    monkeypatch.setenv("COLUMNS", "80")
    phase = "{ from_step = 5, window = 4, rope_theta = 5e4, lr_factor = 0.5 }"
    source = pairs[-2].replace('label = "web"', f'label = "{label}"')
    assert command.run([*pairs[:-2], source, pairs[-1], "--phases", phase]) == 0
    shown = capsys.readouterr().out.splitlines()
    header = next(line for line in shown if "tokens read" in line)
    table = shown[shown.index(header) :]
    assert max(map(len, table)) <= 80
    columns = slice(header.index("source"), header.index("tokens read"))
    assert label in "".join(line[columns].strip() for line in table)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--data.domains", "x", "2"], "unknown domain 'x'"),
        (["--data.exclude", "nothing.bin"], "unknown entry 'nothing.bin' in data.exclude"),
        (["--phases", "{ from_step = 5, source_weights = { code = 1 } }"], "unknown source 'code'"),
        (["--data.validation_sources"], "no documents are held out for validation"),
        (["--data.packing", "tight"], "unknown packing 'tight'"),
        (["--data.validation_fraction", "2"], "data.validation_fraction = 2.0"),
        (["--tokenizer.name", "sentencepiece"], 'set tokenizer.path, or tokenizer.name = "none"'),
        (["--data.sources", '{ name = "python-stdlib" }', "--tokenizer.name", "none"], "it needs a tokenizer"),
    ],
)
def test_what_training_refuses_the_plan_refuses(pairs, tmp_path, capsys, argv, words):
    shown = []
    for main in (train.main, lambda argv: commands.main(["plan", *argv])):
        assert main([*pairs, *argv, "--job.dump_folder", str(tmp_path / "out")]) == 2
        shown.append(capsys.readouterr().err)
    assert words in shown[0]
    assert shown[0] == shown[1]
    assert not (tmp_path / "out").exists()


def test_a_prefix_and_a_folder_of_tokens_are_sources(pairs, tmp_path, capsys):
    for path, tokens in (("web", 1000), ("", 1500)):
        source = f'{{ path = "{tmp_path}/{path}", label = "x" }}'
        assert command.run([*pairs[:-2], source, "--json"]) == 0
        (phase,) = json.loads(capsys.readouterr().out.splitlines()[-1])["phases"]
        (source,) = phase["sources"]
        assert source["epochs"] == pytest.approx(source["tokens"] / tokens)
    (tmp_path / "note.txt").write_text("text")
    assert command.run([*pairs[:-2], f'{{ path = "{tmp_path}" }}']) == 0
    assert "is raw text" in capsys.readouterr().out


def test_the_plan_needs_no_data(capsys):
    phases = ["--phases", "{ from_step = 5, source_weights = [2] }"]
    argv = ["--job.config_file", str(CONFIGS / "llama120m_doc.toml"), "--training.local_batch_size", "32"]
    assert command.run([*argv, *phases]) == 0
    shown = capsys.readouterr().out
    assert "data        epochs not counted: no file matches" in shown
    assert "weights [2" in shown


@pytest.mark.parametrize(
    ("phase", "argv", "words"),
    [
        ("{ from_step = 5, window = 17 }", [], ["window = 17", "a row has 16 tokens"]),
        (
            "{ from_step = 5, window = 8 }",
            ["--curriculum.initial_window", "16", "--attention.masks", "causal"],
            ["phases"],
        ),
        ("{ from_step = 5, rope_theta = 5e4 }", ["--model.positional_embedding", "none"], ["has no RoPE"]),
        ("{ from_step = 20, window = 8 }", [], ["begins at step 20", "20 steps"]),
    ],
)
def test_phases_that_cannot_be(pairs, phase, argv, words):
    with pytest.raises(ConfigError) as error:
        plans.make_plan(config.load([*pairs, *argv, "--phases", phase]))
    for word in words:
        assert word in str(error.value)


def test_the_plan_in_hours_money_and_disk(capsys):
    argv = ["--job.config_file", str(CONFIGS / "llama1b_dm8.toml"), "--world-size", "8", "--model.n_layers", "2"]
    argv += ["--training.local_batch_size", "1", "--compile.no-enable"]
    assert command.run([*argv, "--tokens-per-second", "400000", "--gpu-hour-price", "0.5", "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["hours_full_context"] == pytest.approx(told["tokens"] / 400_000 / 3600)
    assert told["hours"] == pytest.approx(told["hours_full_context"] * (1 - told["saved"]))
    assert told["cost"] == pytest.approx(told["hours"] * 8 * 0.5)
    assert told["checkpoint_bytes"] == 12 * told["parameters"]
    assert (
        command.run([*argv, "--tokens-per-second", "400000", "--checkpoint.enable", "--checkpoint.interval", "50000"])
        == 0
    )
    shown = capsys.readouterr().out
    assert f"time        {told['hours']:,.1f} hours" in shown
    assert "for at most 2 at a time" in shown
    with pytest.raises(ConfigError, match="--gpu-hour-price needs --tokens-per-second or --measure"):
        command.run([*argv, "--gpu-hour-price", "2"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lr_scheduler.batch_size_scaling", "sqrt"], "batch_size_scaling = 'sqrt': the batch does not change"),
        (["--ema.enable", "--ema.start_step", "20"], "ema.start_step = 20: the run has 20 steps"),
        (["--validation.no_enable", "--validation.probes", "needle"], "validation.probes needs validation.enable"),
        (
            [
                *("--batch_size_warmup.initial_batch_size", "4", "--batch_size_warmup.steps", "20"),
                *("--training.global_batch_size", "8"),
            ],
            "the last batch begins at step 20, but the run has 20 steps",
        ),
    ],
)
def test_settings_without_effect_are_refused(argv, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        plans.make_plan(load("debug", *argv))


def test_the_memory_of_a_model_with_sinks_is_estimated(capsys):
    assert (
        command.run(["--job.config_file", str(CONFIGS / "debug.toml"), "--model.attention_sinks", "full_attention"])
        == 0
    )
    assert "memory" in capsys.readouterr().out
