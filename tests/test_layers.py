"""The house's law: who may import whom."""

import ast
from pathlib import Path

import pytest

import torchladder

ROOT = Path(torchladder.__file__).parent

PARTS = [
    "curriculum",
    "data",
    "models",
    "distributed",
    "optim",
    "probes",
    "ema",
    "checkpoint",
    "metrics",
    "profiling",
    "plots",
    "resilience",
]
LAYERS = [
    ["registry", "disk_errors"],
    ["batch_schedule"],
    ["mask", "schedule"],
    PARTS,
    ["config"],
    ["inference"],
    ["training"],
    ["train"],
    ["commands"],
    ["__main__"],
]
OPTIONAL = {
    "flash_attn",
    "cutlass",  # comes with flash-attn-4
    "codecarbon",
    "wandb",
    "trackio",
    "lm_eval",
    "matplotlib",
    "pyarrow",
    "datasets",
    "zstandard",
    "tokenizers",
    "tiktoken",
    "ray",
    "torchao",
    "safetensors",
    "jinja2",
    "plotly",
}
"""Third-party packages that may be imported inside a function: extras, and what would slow down every start."""


def files():
    return sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def layer(name: str) -> int:
    return next(number for number, rooms in enumerate(LAYERS) if name in rooms)


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "torchladder":
            rooms |= {alias.name for alias in node.names if alias.name != "__version__"}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torchladder."):
            rooms.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            rooms |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("torchladder.")}
    return rooms


def test_every_file_has_a_layer():
    known = {name for rooms in LAYERS for name in rooms}
    assert {room(path) for path in files()} <= known


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_only_from_below(path):
    own = room(path)
    for other in imported_rooms(path) - {own}:
        assert layer(other) < layer(own), f"{own} imports {other}"


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_stand_at_the_top(path):
    for function in ast.walk(ast.parse(path.read_text())):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                assert {str(name).split(".")[0] for name in names} <= OPTIONAL, f"{function.name} imports {names}"


def test_the_curriculum_knows_no_tensors():
    source = (ROOT / "curriculum.py").read_text()
    assert "torch" not in {name.split(".")[0] for name in _all_imports(source)}


SCHEDULED = {"window", "windows", "lr", "lr_factor", "learning_rate", "rope_theta", "theta", "curriculum"}
"""What changes from step to step and is none of the data's business."""


@pytest.mark.parametrize("path", sorted((ROOT / "data").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_data_knows_no_masks_windows_or_learning_rates(path):
    assert not imported_rooms(path) & {"mask", "curriculum", "schedule"}
    named = set()
    for node in ast.walk(ast.parse(path.read_text())):
        named |= {getattr(node, key, None) for key in ("id", "attr", "arg", "name")}
    assert not named & SCHEDULED


def _all_imports(source: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names
