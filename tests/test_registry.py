import importlib
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from torchladder import data
from torchladder.registry import ConfigError, Registry, unknown_name


@pytest.fixture
def shapes():
    registry = Registry("shape", runtime_args={"size": "how large"})

    @registry.register("square")
    @dataclass(frozen=True)
    class Square:
        """A square.

        Attributes:
            color: its paint.
        """

        size: int
        color: str = "red"
        holes: list[int] = field(default_factory=list)

    @registry.register("disc")
    def disc(radius: float, size: int) -> tuple:
        """A disc.

        Args:
            radius: from the middle to the rim.
        """
        return radius, size

    return registry


def test_a_component_is_built_from_its_settings_and_the_runtime_arguments_it_declares(shapes):
    square = shapes.build(SimpleNamespace(name="square", color="blue", holes=[1]), size=3, weight=9)
    assert (square.size, square.color, square.holes) == (3, "blue", [1])
    assert shapes.build(SimpleNamespace(name="disc", radius=2.0), size=3) == (2.0, 3)


def test_the_parameters_except_runtime_arguments_are_the_settings(shapes):
    assert list(shapes.parameters("square")) == ["color", "holes"]
    assert shapes.parameters("disc")["radius"].annotation is float


def test_docs_speak_of_the_settings(shapes):
    assert shapes.docs("disc")["radius"] == "from the middle to the rim."
    assert shapes.docs("square")["color"] == "its paint."


def test_unknown_names_come_with_the_nearest(shapes):
    with pytest.raises(ConfigError, match=r"unknown shape 'sqare'. Did you mean 'square'\? Known: disc, square."):
        shapes.get("sqare")
    assert "Did you mean" not in str(unknown_name("shape", "xyz", ["square"]))
    assert str(unknown_name("key", "x", ["a"], "[b] of c.toml")) == "unknown key 'x' in [b] of c.toml. Known: a."


def test_a_name_is_taken_once(shapes):
    with pytest.raises(ConfigError, match="twice"):
        shapes.register("disc")(lambda: None)


def test_a_plugin_extends_a_component_whose_annotations_it_has_not_imported(tmp_path, monkeypatch):
    (tmp_path / "stretched_plugin.py").write_text(
        "from dataclasses import dataclass\n"
        "from torchladder import data\n"
        "from torchladder.data.row_loader import RowLoader\n\n\n"
        "@data.register('stretched')\n@dataclass(kw_only=True)\nclass Stretched(RowLoader):\n    extra: int = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(data.registry, "_components", dict(data.registry._components))
    importlib.import_module("stretched_plugin")
    assert data.registry.parameters("stretched")["extra"].annotation is int
    assert set(data.registry.parameters("rows")) < set(data.registry.parameters("stretched"))
