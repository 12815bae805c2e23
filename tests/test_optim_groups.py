"""Parameter groups: matching, precedence, errors; from file and command line; in plans; in resumed runs."""

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layouts import CONFIG as DEBUG
from runs import losses, run
from torch import nn

from torchladder import config, models, optim
from torchladder.commands import plan
from torchladder.optim import Adam, AdamW, GroupConfig, LRScheduler, Muon
from torchladder.optim.param_groups import match_groups
from torchladder.registry import ConfigError
from torchladder.training.run_plan import make_plan

SHAPE = models.LlamaConfig(dim=8, n_layers=2, n_heads=2, ffn_dim=12, vocab_size=16)
GROUPS = [
    GroupConfig(pattern="embedding|head", lr_factor=0.3, weight_decay=0.0),
    GroupConfig(pattern=r"layers\.0\.", lr_factor=2.0),
    GroupConfig(pattern="norm", weight_decay=0.05),
]


def llama():
    return models.Llama(SHAPE, seq_len=16)


def rows(groups):
    return [(g.algorithm, g.pattern, g.lr, g.weight_decay, len(g.parameters)) for g in groups]


@given(
    st.lists(st.text("ab.0", min_size=1, max_size=6), min_size=1, max_size=8, unique=True),
    st.lists(st.sampled_from(["a", "b", "a.", "^b", "0$", "ab|ba", ".", "[.]", "b+a"]), max_size=4),
)
def test_the_first_pattern_that_is_found_takes_a_parameter(names, patterns):
    groups = [GroupConfig(pattern=pattern) for pattern in patterns]
    expected = {}
    for name in names:
        expected[name] = -1
        for index in reversed(range(len(patterns))):
            if re.search(patterns[index], name):
                expected[name] = index
    idle = [index for index in range(len(patterns)) if index not in expected.values()]
    if idle:
        with pytest.raises(ConfigError, match=r"optimizer\.groups: (no parameter matches|pattern = .* takes no param)"):
            match_groups(names, groups)
    else:
        assert match_groups(names, groups) == expected


def test_groups_of_adamw():
    found = AdamW(lr=0.01, groups=GROUPS).parameter_groups(llama())
    assert rows(found) == [
        ("AdamW", "", 0.01, 0.1, 7),  # the matrices of the second block
        ("AdamW", "embedding|head", 0.003, 0.0, 2),
        ("AdamW", r"layers\.0\.", 0.02, 0.1, 7),
        ("AdamW", r"layers\.0\.", 0.02, 0.0, 2),  # its norms
        ("AdamW", "norm", 0.01, 0.05, 3),
    ]
    assert sum(group.num_parameters for group in found) == llama().num_parameters()


def test_groups_of_muon():
    found = Muon(lr=0.01, adamw_lr=0.001, groups=GROUPS).parameter_groups(llama())
    assert rows(found) == [
        ("Muon", "", 0.01, 0.1, 7),
        ("AdamW", "embedding|head", 0.0003, 0.0, 2),
        ("Muon", r"layers\.0\.", 0.02, 0.1, 7),
        ("AdamW", r"layers\.0\.", 0.002, 0.0, 2),
        ("AdamW", "norm", 0.001, 0.05, 3),
    ]
    muon = sum(group.num_parameters for group in found if group.algorithm == "Muon")
    assert sum(group.state_elements for group in found) == 2 * llama().num_parameters() - muon


@pytest.mark.parametrize("kind", [AdamW, Adam, Muon])
def test_the_optimizer_has_the_groups(kind):
    model = llama()
    settings = kind(lr=0.01, groups=GROUPS)
    made = settings(model)
    expected = settings.parameter_groups(model)
    for group, own in zip(made.param_groups, expected, strict=True):
        assert list(map(id, group["params"])) == list(map(id, own.parameters.values()))
        assert (group["lr"], group["weight_decay"]) == (own.lr, own.weight_decay)
    assert LRScheduler(made).set_factor(0.5) == 0.005
    assert [group["lr"] for group in made.param_groups] == [0.5 * group.lr for group in expected]
    assert made.param_groups[1]["betas"] == (0.9, 0.95)


def test_a_factor_of_zero_freezes_and_half_the_rate_takes_half_the_step():
    models_ = [nn.Linear(3, 2) for _ in range(2)]
    models_[1].load_state_dict(models_[0].state_dict())
    before = models_[0].weight.detach().clone()
    half = [GroupConfig(pattern="weight", lr_factor=0.5), GroupConfig(pattern="bias", lr_factor=0.0)]
    for model, groups in zip(models_, ([], half), strict=True):
        bias = model.bias.detach().clone()
        optimizer = AdamW(lr=0.01, weight_decay=0.5, groups=groups)(model)
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        assert torch.equal(model.bias, bias) == bool(groups)
    whole, half_step = (model.weight.detach() - before for model in models_)
    torch.testing.assert_close(half_step, 0.5 * whole)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"pattern": ""}, "pattern is empty"),
        ({"pattern": "("}, r"pattern = '\(' is not a regular expression: missing \)"),
        ({"pattern": "a", "lr_factor": -1.0}, r"optimizer\.groups\.lr_factor = -1\.0: must be 0 or more"),
        ({"pattern": "a", "weight_decay": -0.1}, r"optimizer\.groups\.weight_decay = -0\.1"),
    ],
)
def test_impossible_groups(group, message):
    with pytest.raises(ConfigError, match=message):
        GroupConfig(**group)


def test_a_group_without_parameters_is_refused():
    with pytest.raises(
        ConfigError, match=r"no parameter matches. Did you mean 'embedding.weight'\? Known: .*layers\.\*"
    ):
        AdamW(groups=[GroupConfig(pattern="embeding")])(llama())
    late = [GroupConfig(pattern="layers"), GroupConfig(pattern="q_proj")]
    with pytest.raises(
        ConfigError, match=r"'q_proj' takes no parameter: the first match wins.*\('layers'\). Move it up"
    ):
        AdamW(groups=late)(llama())


def test_names_are_those_without_wrappers():
    model = nn.ModuleDict({"_checkpoint_wrapped_module": nn.ModuleDict({"_orig_mod": nn.Linear(2, 2)})})
    assert [list(group.parameters) for group in AdamW().parameter_groups(model)] == [["weight"], ["bias"]]


# --- settings --------------------------------------------------------------------------------------------------------

TOML = """
[optimizer]
name = "Muon"

[[optimizer.groups]]
pattern = "embedding|head"
lr_factor = 0.3
weight_decay = 0.0
"""
WORD = '{ pattern = "embedding|head", lr_factor = 0.3, weight_decay = 0.0 }'


def test_file_and_command_line_say_the_same(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(TOML)
    read = config.load(["--job.config_file", str(file)])
    given = config.load(["--optimizer.name", "Muon", "--optimizer.groups", WORD])
    assert read.optimizer.groups == given.optimizer.groups == [GROUPS[0]]
    file.write_text(read.to_toml())
    assert vars(config.load(["--job.config_file", str(file)]).optimizer) == vars(read.optimizer)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ('pattern = "a"\nlr = 1.0', "unknown key 'lr'. Known: lr_factor, pattern, weight_decay"),
        ("lr_factor = 0.5", "the key 'pattern' is required"),
        ('pattern = "["', "is not a regular expression"),
        ("pattern = 3", "pattern = 3: must be a valid string"),
    ],
)
def test_a_wrong_table_is_one_error(tmp_path, table, message):
    file = tmp_path / "run.toml"
    file.write_text(f"[[optimizer.groups]]\n{table}\n")
    with pytest.raises(ConfigError, match=re.escape(message)):
        config.load(["--job.config_file", str(file)])


def test_every_recipe_of_the_docs_makes_a_plan(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "optim.md").read_text()
    recipes = re.findall(r"```toml\n(.*?)```", page, flags=re.DOTALL)
    assert len(recipes) >= 8
    for recipe in recipes:
        (tmp_path / "run.toml").write_text(f'[job]\nextends = "{DEBUG[1]}"\n{recipe}')
        made = make_plan(config.load(["--job.config_file", str(tmp_path / "run.toml")]))
        assert sum(group.num_parameters for group in made.optimizer_groups) == made.num_parameters


def test_a_plan_shows_the_groups(capsys):
    argv = [*DEBUG, "--optimizer.name", "Muon", "--optimizer.groups", WORD]
    assert plan.run([*argv, "--json"]) == 0
    muon, vectors, tables = json.loads(capsys.readouterr().out)["optimizer_groups"]
    assert [group["algorithm"] for group in (muon, tables, vectors)] == ["Muon", "AdamW", "AdamW"]
    assert tables == {
        "algorithm": "AdamW", "pattern": "embedding|head", "lr": 0.3 * 8e-4, "weight_decay": 0.0,
        "num_parameters": 65536, "tensors": 2, "names": ["embedding.weight", "head.weight"],
    }  # fmt: skip
    assert "layers.*.attention.q_proj.weight" in muon["names"]
    assert plan.run(argv) == 0
    text = capsys.readouterr().out
    assert "optimizer   Muon, lr 0.0008, weight decay 0.1: 98,304 parameters in 14 tensors" in text
    with pytest.raises(ConfigError, match="no parameter matches"):
        plan.run([*argv[:-1], WORD.replace("embedding|head", "nothing")])


def test_a_plugin_without_groups_has_none():
    class Section:
        name = "plain"

    try:
        optim.register("plain")(lambda: lambda model: torch.optim.SGD(model.parameters()))
        assert optim.parameter_groups(Section, llama()) == []
    finally:
        optim.registry._components.pop("plain", None)


# --- resuming --------------------------------------------------------------------------------------------------------


def test_groups_may_change_when_a_run_continues(tmp_path):
    """State belongs to parameters, not to groups: one more group with the settings of the others changes no loss."""
    argv = ["--checkpoint.enable", "--checkpoint.interval", "2", "--training.steps", "6", "--validation.no_enable"]
    same = ["--optimizer.groups", '{ pattern = "head" }', '{ pattern = "q_proj|k_proj" }']
    run(tmp_path / "one", *argv)
    run(tmp_path / "other", *argv, "--job.exit_interval", "2", code=75)
    run(tmp_path / "other", *argv, *same, "--job.exit_interval", "4", code=75)
    run(tmp_path / "other", *argv)
    assert losses(tmp_path / "other") == losses(tmp_path / "one")
