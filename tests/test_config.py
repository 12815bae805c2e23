import math
import re
from functools import partial
from pathlib import Path

import pytest
import tomli

from torchladder import config, curriculum, data, mask, metrics, models, optim
from torchladder.registry import ConfigError

PLUGIN = '''
from dataclasses import dataclass
from torchladder import curriculum

@curriculum.register("staircase")
@dataclass(frozen=True)
class Staircase:
    """A few fixed windows, each for the same number of steps."""
    stairs: list[int]
    steps_per_stair: int = 1000
    """Steps on each stair."""

    def __call__(self, step: int) -> int:
        return self.stairs[min(step // self.steps_per_stair, len(self.stairs) - 1)]
'''


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "run.toml") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def load(file: str, *argv: str) -> config.Config:
    return config.load(["--job.config_file", file, *argv])


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(write):
    file = write("[training]\nsteps = 7\nseq_len = 64\n")
    loaded = load(file, "--training.steps", "9")
    assert (loaded.training.steps, loaded.training.seq_len) == (9, 64)
    assert loaded.training.local_batch_size == config.TrainingConfig().local_batch_size


def test_a_part_has_its_own_keys_and_no_others(write):
    file = write('[curriculum]\nname = "linear"\nevery = 8\n')
    assert load(file).curriculum.every == 8
    with pytest.raises(ConfigError, match="stages") as error:
        load(write('[curriculum]\nname = "stages"\nevery = 8\n'))
    assert "every" in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[trainnig]\nsteps = 1\n", ["run.toml", "trainnig", "training"]),
        ("[training]\nstep = 1\n", ["run.toml", "step", "'steps'"]),
        ("[training]\nsteps = 'many'\n", ["run.toml", "training.steps", "integer"]),
        ("[training]\nsteps = 1.5\n", ["run.toml", "training.steps", "integer"]),
        ("[training]\nsteps = 0\n", ["run.toml", "training.steps = 0", "1 or more"]),
        ("[attention]\nmasks = 'chunk'\n", ["run.toml", "attention.masks", "list"]),
        ("[attention]\nkernel = 'flx'\n", ["run.toml", "flx", "'flex'"]),
        ("[curriculum]\nname = 'linaer'\n", ["linaer", "'linear'"]),
        ("[model]\nname = 'lama'\n", ["lama", "'llama'"]),
        ("[tokenizer]\nname = 'byte'\n", ["byte", "'bytes'"]),
        ("steps = 1\n", ["run.toml", "steps", "section"]),
        ("[training\n", ["run.toml"]),
        ("[job]\nplugins = ['no_such_plugin_anywhere']\n", ["no_such_plugin_anywhere"]),
        ("[training]\nsteps = 2020-01-01\n", ["training.steps"]),
        ("[data]\nsources = [{ name = 'python-stdlib', wieght = 2 }]\n", ["run.toml", "data.sources", "wieght"]),
    ],
)
def test_a_wrong_file_is_one_error_that_names_the_place(write, text, words):
    with pytest.raises(ConfigError) as error:
        load(write(text))
    for word in words:
        assert word in str(error.value)


def test_a_missing_file_names_the_nearest(write):
    write("[training]\nsteps = 1\n", "small.toml")
    file = write("", "run.toml")
    with pytest.raises(ConfigError, match=r"small\.toml"):
        load(file.replace("run.toml", "smal.toml"))


@pytest.mark.parametrize("argv", [["--training.stepz", "3"], ["--training.steps", "three"], ["--trainig.steps", "3"]])
def test_a_wrong_command_line_is_an_error(argv):
    with pytest.raises(ConfigError, match=r"training\.step.*steps|--training\.steps"):
        config.load(argv)


def test_files_extend_files(write):
    write('[curriculum]\nname = "linear"\nevery = 4\n[training]\nsteps = 5\nseq_len = 128\n', "base.toml")
    child = load(write('[job]\nextends = "base.toml"\n[training]\nsteps = 6\n'))
    assert (child.training.steps, child.training.seq_len, child.curriculum.every) == (6, 128, 4)
    # Another part starts its section afresh.
    child = load(write('[job]\nextends = "base.toml"\n[curriculum]\nname = "constant"\n'))
    assert child.curriculum.name == "constant"
    assert not hasattr(child.curriculum, "every")


@pytest.mark.parametrize(
    ("section", "key", "value", "rest"),
    [
        ("training", "epochs", 2.0, "steps = 6\n"),
        ("curriculum", "every", 4, "ramp = 0.5\n"),
        ("lr_scheduler", "decay_ratio", 0.1, ""),
    ],
)
def test_an_inherited_optional_key_is_unset(write, section, key, value, rest):
    name = 'name = "linear"\n' if section == "curriculum" else ""
    base = write(f"[{section}]\n{name}{key} = {value}\n", "base.toml")
    derived = f'[job]\nextends = "base.toml"\n[{section}]\n{name}'
    assert getattr(getattr(load(write(derived)), section), key) == value
    unset = load(write(f'{derived}{key} = "None"\n{rest}'))
    assert getattr(getattr(unset, section), key) is None
    assert getattr(getattr(load(base, f"--{section}.{key}", "None"), section), key) is None
    with pytest.raises(ConfigError, match=rf"{section}\.{key} = 'none'"):
        load(write(f'{derived}{key} = "none"\n'))


def test_extending_in_a_circle_is_an_error(write):
    write('[job]\nextends = "run.toml"\n', "base.toml")
    with pytest.raises(ConfigError, match="extends"):
        load(write('[job]\nextends = "base.toml"\n'))


def test_another_part_on_the_command_line_drops_the_files_settings_and_says_so(write, capsys):
    file = write('[curriculum]\nname = "linear"\nevery = 4\n')
    assert load(file, "--curriculum.name", "constant").curriculum.name == "constant"
    assert "every" in capsys.readouterr().err


def test_resolved_settings_give_the_same_run(write):
    file = write(
        '[curriculum]\nname = "stages"\nstages = [[0, 32], [4, 64]]\n[training]\nseq_len = 64\n'
        '[data]\nsources = [{ name = "python-stdlib", weight = 2.0 }]\n'
    )
    first = load(file)
    second = load(write(first.to_toml(), "resolved.toml"))
    assert first.to_toml() == second.to_toml()
    assert tomli.loads(second.to_toml())["curriculum"]["stages"] == [[0, 32], [4, 64]]


def test_a_plugin_beside_the_file_is_a_part_like_any_other(write, capsys):
    write(PLUGIN, "my_staircase_plugin.py")
    file = write(
        '[job]\nplugins = ["my_staircase_plugin"]\n[curriculum]\nname = "staircase"\nstairs = [8, 16]\n'
        "[training]\nseq_len = 16\n"
    )
    assert load(file, "--curriculum.steps_per_stair", "500").curriculum.steps_per_stair == 500
    with pytest.raises(SystemExit) as end:
        load(file, "--help")
    assert not end.value.code
    shown = capsys.readouterr().out
    assert "--curriculum.steps_per_stair" in shown
    assert "Steps on each stair." in shown


def test_tables_on_the_command_line_are_as_in_a_file(write):
    file = write('[data]\nsources = [{ name = "python-stdlib" }]\n')
    found = load(file, "--data.sources", '{ path = "a.txt", weight = 2.0 }', '{ path = "b/*.bin" }').data.sources
    assert [(source.path, source.weight) for source in found] == [("a.txt", 2.0), ("b/*.bin", 1.0)]
    for word in ('{ pth = "a.txt" }', "a.txt"):
        with pytest.raises(ConfigError, match=word.split('"')[0].strip("{ =")):
            load(file, "--data.sources", word)


def test_a_required_key_may_come_from_the_command_line_alone(write):
    write(PLUGIN.replace("staircase", "staircase2"), "my_second_plugin.py")
    file = write('[job]\nplugins = ["my_second_plugin"]\n[curriculum]\nname = "staircase2"\n')
    assert load(file, "--curriculum.stairs", "4", "8").curriculum.stairs == [4, 8]
    with pytest.raises(ConfigError, match=r"--curriculum\.stairs .* is required"):
        load(file)


def test_help_explains_every_key(capsys):
    with pytest.raises(SystemExit) as end:
        config.load(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    for section, field in config.fields(config.config_type({}, [])).items():
        keys = [f"{section}.{key}" for key in config.fields(field.type)] if section != "phases" else [section]
        for key in keys:
            assert f"--{key}" in shown, f"--help lacks {key}"


@pytest.mark.parametrize("section", config.COMPONENTS)
def test_every_setting_of_every_part_is_documented(section):
    registry, _ = config.COMPONENTS[section]
    ours = [name for name in registry.names() if registry.get(name).__module__.startswith("torchladder.")]
    silent = [f"{part}.{key}" for part in ours for key in registry.parameters(part) if not registry.docs(part).get(key)]
    assert not silent


def test_the_docs_list_every_registry():
    page = (Path(__file__).parents[1] / "docs" / "config.md").read_text()
    exported = {
        f"{package.__name__.removeprefix('torchladder.')}.{name}"
        for package in (curriculum, mask, models, models.attention, optim, data, data.sources, data.packing,
                        data.tokenizer, metrics)
        for name in vars(package) if name.startswith("register") and callable(getattr(package, name))
    }  # fmt: skip
    listed = set(re.findall(r"^\| `(\S+)`", page.partition("| registry |")[2], re.MULTILINE))
    assert listed == exported | {"optim.decays.register"}


@pytest.mark.parametrize(
    ("section", "key", "value", "allowed"),
    [
        ("training", "seq_len", 0, "1 or more."),
        ("training", "steps", -2, "1 or more, or -1."),
        ("training", "epochs", math.nan, "above 0 and below inf."),
        ("samples", "top_p", 1.5, "above 0 and at most 1."),
        ("curriculum", "initial_window", 0, "1 or more."),
    ],
)
def test_bounds_hold_for_files_command_lines_and_plain_construction(write, section, key, value, allowed):
    message = re.escape(f"{section}.{key} = {value}: must be {allowed}")
    name = {"curriculum": 'name = "linear"\n'}.get(section, "")
    with pytest.raises(ConfigError, match=message):
        load(write(f"[{section}]\n{name}{key} = {value}\n")).schedule(1)
    with pytest.raises(ConfigError, match=message):
        load(write(f"[{section}]\n{name}"), f"--{section}.{key}={value}").schedule(1)
    kinds = {"training": config.TrainingConfig, "samples": config.SamplesConfig}
    with pytest.raises(ConfigError, match=message):
        kinds.get(section, partial(curriculum.Linear, steps=9, seq_len=64))(**{key: value})


@pytest.mark.parametrize(
    ("text", "argv", "words"),
    [
        ("[data]\nphases = [{ from_step = 1, window = 4 }]", [], ["data.phases", "[[phases]]"]),
        ("[experimental]\ncustom_import = 'mine'", [], ["experimental.custom_import", "job.plugins"]),
        ("[resilience]\nnorm_deviations = 6.0", [], ["resilience.norm_deviations", "resilience.sigma_factor"]),
        ("[[phases]]\nfrom_share = 0.5\nwindow = 4", [], ["phases.from_share", "phases.from_fraction"]),
        ("", ["--data.phases", "{ from_step = 1, window = 4 }"], ["the command line", "[[phases]]"]),
        ("", ["--resilience.norm_deviations=6"], ["resilience.sigma_factor"]),
    ],
)
def test_a_renamed_key_has_its_new_name_in_the_error(write, text, argv, words):
    with pytest.raises(ConfigError) as error:
        load(write(text, "a.toml"), *argv)
    for word in words:
        assert word in str(error.value)


def test_phases_are_an_array_of_tables_that_the_command_line_and_other_files_replace(write):
    write("[[phases]]\nfrom_step = 0\nwindow = 4\n\n[[phases]]\nfrom_step = 2\nlr_factor = 0.5", "base.toml")
    inherits = write('[job]\nextends = "base.toml"', "b.toml")
    assert [phase.from_step for phase in load(inherits).phases] == [0, 2]
    replaces = write('[job]\nextends = "base.toml"\n[[phases]]\nfrom_step = 1\nwindow = 8', "c.toml")
    assert [phase.from_step for phase in load(replaces).phases] == [1]
    assert [phase.from_step for phase in load(inherits, "--phases", "{ from_step = 3, window = 9 }").phases] == [3]
    again = write(load(inherits).to_toml(), "d.toml")
    assert load(again).phases == load(inherits).phases
    with pytest.raises(ConfigError, match=r"write \[\[phases\]\] above each entry"):
        load(write("[phases]\nfrom_step = 1", "e.toml"))


def test_load_file_is_a_file_with_overrides(write):
    file = Path(write("[training]\nsteps = 7"))
    made = config.load_file(file, {"training.seq_len": 64, "model.flavor": "debug"})
    assert (made.training.steps, made.training.seq_len, made.model.flavor) == (7, 64, "debug")
    with pytest.raises(ConfigError, match=r"unknown key .* in \[training\]"):
        config.load_file(file, {"training.sequence": 64})
    with pytest.raises(ConfigError, match=r"curriculum\.stages is required"):
        config.load_file(None, {"curriculum.name": "stages"})


def test_a_file_with_a_byte_order_mark_is_read_and_another_encoding_is_named(tmp_path):
    file = tmp_path / "a.toml"
    file.write_bytes("[job]\ndescription = 'é'\n".encode("utf-8-sig"))
    assert config.load(["--job.config_file", str(file)]).job.description == "é"
    file.write_bytes("[job]\ndescription = 'é'\n".encode("utf-16"))
    with pytest.raises(ConfigError, match=r"a\.toml: byte 0 is not UTF-8: save the file as UTF-8"):
        config.load(["--job.config_file", str(file)])
