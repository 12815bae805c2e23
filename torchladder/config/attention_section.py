"""The section ``[attention]``: masks and kernel, and those of each further layer type in its own table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

from annotated_types import Ge

from torchladder import curriculum, mask
from torchladder.config.values import build_component, table_argument
from torchladder.models import attention
from torchladder.models.layer_types import LAYER_TYPES
from torchladder.registry import ConfigError, check_bounds, require, unknown_name
from torchladder.schedule import FULL_ATTENTION


@dataclass(frozen=True)
class LayerAttentionConfig:
    """Layers of this type, in a model that has several (model.layer_types): their masks and their window."""

    masks: list[str] = field(default_factory=list)
    """Masks of these layers; required if the model has such layers."""

    window: Annotated[int | None, Ge(1)] = None
    """Tokens a query may attend to, including itself, at every step."""

    curriculum: Annotated[dict[str, Any] | None, table_argument(dict[str, Any])] = None
    """Instead of window: a table with the name and the settings of a curriculum, as in [curriculum]."""

    kernel: str = ""
    """Attention kernel of these layers; default: attention.kernel."""

    @property
    def is_set(self) -> bool:
        return self != LayerAttentionConfig()

    def check(self, key: str) -> None:
        """Raises ``ConfigError`` for the table ``key`` if its settings do not fit together."""
        check_bounds(self, key)
        require(bool(self.masks), f'{key} has no masks: set {key}.masks, such as ["sliding"] or ["causal"].')
        _check_names(self.masks, self.kernel or "auto", key)
        both = self.window is not None and self.curriculum is not None
        require(not both, f"{key}.window and {key}.curriculum both set the window: remove one.")
        reads = any(mask.reads_window(name) for name in self.masks)
        given = self.window is not None or self.curriculum is not None
        key_of_window = f"{key}.window = {self.window}" if self.curriculum is None else f"{key}.curriculum"
        require(reads or not given, f"{key_of_window}: none of {key}.masks = {self.masks} reads a window, remove it.")
        require(given or not reads, f"{key}.masks = {self.masks} reads a window: set {key}.window or .curriculum.")

    def build_curriculum(self, key: str, steps: int, seq_len: int) -> Callable[[int], int]:
        """Returns step -> window of the layers of the table ``key``."""
        if self.curriculum is None:
            window = seq_len if self.window is None else self.window
            return lambda step: window
        try:
            built: Callable[[int], int] = build_component(
                curriculum.registry, self.curriculum, f"{key}.curriculum", steps=steps, seq_len=seq_len
            )
        except ConfigError as error:
            message = str(error)
            raise ConfigError(message if message.startswith(key) else f"{key}: {message}") from None
        return built


@dataclass(frozen=True)
class AttentionConfig:
    """Attention masks, and the kernel that computes attention under them."""

    masks: list[str] = field(default_factory=lambda: ["causal"])
    """Masks that are combined: causal, document, chunk, sliding, or a plugin's."""

    kernel: str = "auto"
    """Attention kernel: flex, fold, varlen, flash, sdpa, dense, or auto, which chooses by device and masks."""

    sliding_attention: LayerAttentionConfig = field(default_factory=LayerAttentionConfig)
    chunked_attention: LayerAttentionConfig = field(default_factory=LayerAttentionConfig)

    def __post_init__(self) -> None:
        require(bool(self.masks), 'attention.masks is empty: set a mask; "causal" is plain causal attention.')
        _check_names(self.masks, self.kernel, "attention")
        for name, table in self.tables.items():
            table.check(f"attention.{name}")

    @property
    def tables(self) -> dict[str, LayerAttentionConfig]:
        """Layer type -> its table, of the types that have one."""
        tables = {name: getattr(self, name) for name in LAYER_TYPES if name != FULL_ATTENTION}
        return {name: table for name, table in tables.items() if table.is_set}

    def of_types(self, types: list[str]) -> dict[str, AttentionConfig | LayerAttentionConfig]:
        """Returns the settings of each layer type of a model, as ``types_of_config`` returns its types.

        Raises:
            ConfigError: a type has no table, or the model has no layers of a table's type.
        """
        others = [name for name in types if name != FULL_ATTENTION] if len(types) > 1 else []
        for name in others:
            require(
                name in self.tables,
                f"model.layer_types has {name} layers, and nothing sets their masks: add [attention.{name}] with masks "
                "and, if one of them reads a window, window or curriculum.",
            )
        for name in self.tables:
            layers = f"the model's layers are {' and '.join(types)} (model.layer_types)"
            hint = "its masks are attention.masks" if name in types else "remove the table"
            require(name in others, f"[attention.{name}] sets masks, but {layers}: {hint}.")
        return {types[0]: self, **{name: self.tables[name] for name in others}}

    def settings(self) -> dict[str, Any]:
        """Returns the section without the tables that are not set."""
        unset = {name for name in LAYER_TYPES if name != FULL_ATTENTION} - self.tables.keys()
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in unset}


def check_mask_names(masks: list[str], key: str) -> None:
    """Raises ``ConfigError`` for the section ``key`` if one of its masks is not registered."""
    for name in masks:
        if name not in mask.registry.names():
            raise unknown_name("mask", name, mask.registry.names(), f"{key}.masks")


def _check_names(masks: list[str], kernel: str, key: str) -> None:
    check_mask_names(masks, key)
    if kernel != "auto" and kernel not in attention.registry.names():
        raise unknown_name("kernel", kernel, ["auto", *attention.registry.names()], f"{key}.kernel")
