"""docs/contributing.md says where to add what: its files and names exist, and the README's tree leads there."""

import ast
import re
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TABLE = re.findall(
    r"^\| (an? [^|]+|[^|`]+) \| `(torchladder/[^`]+)` \| (.+) \|$", (ROOT / "docs/contributing.md").read_text(), re.M
)
ASKED = {
    "a mask kind", "a kernel", "a learning-rate decay", "a tokenizer", "a model family", "checkpoint storage",
    "a metric", "what is validated", "a kind of data source", "a command",
}  # fmt: skip


def test_the_table_answers_every_question():
    assert {task.strip() for task, _, _ in TABLE} >= ASKED


@pytest.mark.parametrize(("task", "file", "text"), TABLE, ids=[task for task, _, _ in TABLE])
def test_a_row_names_what_is_there(task, file, text):
    """The file exists, the README's tree leads to it, and it defines the classes and registers that the row names."""
    module = import_module(file.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    assert (ROOT / file).is_file()
    for name in re.findall(r"`([A-Z]\w+)`", text):
        assert hasattr(module, name), f"{file} has no {name}"
    for other in re.findall(r"`(torchladder/[\w/]+\.py)`", text):
        assert (ROOT / other).is_file()
    for register in re.findall(r"`@(?:\w+\.)*?((?:decays\.)?register\w*)\(", text):
        target = module
        for part in register.split("."):
            target = getattr(target, part)
        assert callable(target), f"{file} has no {register}"


@pytest.mark.parametrize(("task", "file"), [(task, file) for task, file, _ in TABLE if task.strip() in ASKED])
def test_the_tree_of_the_readme_leads_there(task, file):
    """Every folder and file on the way, or its folder with a word on it, stands in the README's tree."""
    tree = re.search(r"```\ntorchladder/\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    names = [part for part in file.removeprefix("torchladder/").removesuffix("/__init__.py").split("/")]
    assert any(name in tree for name in (names[-1], f"{names[-2]}/" if len(names) > 1 else names[-1])), task
    assert f"{names[0].removesuffix('.py')}" in tree


def test_names_of_modules_and_classes_are_unique():
    files = [file for file in (ROOT / "torchladder").rglob("*.py") if not file.stem.startswith("__")]
    classes = Counter(
        node.name for file in files for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ClassDef)
    )
    assert [name for name, count in Counter(file.stem for file in files).items() if count > 1] == []
    assert [name for name, count in classes.items() if count > 1] == []
