"""The contract of a model, and the registry that knows models by name and flavor.

A model section names a model, one of its flavors, and any field of the model's config that should differ from the
flavor. Registering a model declares all three:

    @models.register("llama", flavors={"debug": LlamaConfig(dim=64, ...), "1b": LlamaConfig(dim=2048, ...)})
    class Llama(Model):
        def __init__(self, config: LlamaConfig, attend: Attend, seq_len: int) -> None: ...
"""

from __future__ import annotations

import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, replace
from typing import Any, ClassVar, get_type_hints

import torch
from docstring_parser import parse_from_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from torchladder.models import loss
from torchladder.models.hf.adapter import HFAdapter
from torchladder.registry import Component, ConfigError, Registry, unknown_name

Attend = Callable[[Tensor, Tensor, Tensor, Any], Tensor]
"""``(q (B, H, T, K), k (B, G, T, K), v (B, G, T, K), form) -> (B, H, T, K)``: what a kernel offers a model."""


class Model(nn.Module, ABC):
    """A language model, as the rest of the library sees it.

    Attributes:
        config: the facts the model was built from, a frozen dataclass.
        layers: name -> block, in the order of the forward pass: the unit of compilation, checkpointing and sharding.
        hf_adapter: maps the model to Hugging Face and back; None if it cannot be imported or exported.
    """

    config: Any
    layers: nn.ModuleDict
    hf_adapter: ClassVar[HFAdapter | None] = None

    @abstractmethod
    def forward(self, tokens: Tensor, attention_mask: Any, labels: Tensor | None = None) -> Tensor:
        """Returns logits (B, T, V), or with labels the fp32 sum of the loss over all labels that are not -100.

        Args:
            tokens: (B, T) int64.
            attention_mask: the form that the kernel derived from ``start``; the model hands it on unread.
            labels: (B, T) int64, the token to predict at each place, -100 for none.
        """

    @abstractmethod
    def init_weights(self, seed: int) -> None:
        """Draws the initial weights, each parameter from a generator of its own (``draw``)."""

    @abstractmethod
    def parallel_plan(self) -> dict[str, str]:
        """Returns how tensor parallelism shares each module that has parameters: module path -> style.

        Styles: ``embedding``, ``sequence`` (norms), ``gather`` (the tokens of a module's input), ``colwise``,
        ``rowwise``, ``head``. A ``*`` in a path stands for every block.
        """

    @abstractmethod
    def heads(self) -> tuple[int, ...]:
        """Returns the numbers of heads that tensor-parallel ranks have to share evenly."""

    @abstractmethod
    def flops(self, tokens: int, pairs: int) -> int:
        """Returns the floating-point operations of one forward and backward pass.

        Args:
            tokens: tokens in the batch.
            pairs: attended (query, key) pairs in the batch, ``mask.pairs(start)``.
        """

    @abstractmethod
    def palm_flops(self, tokens: int) -> int:
        """Returns the operations by the PaLM convention (arXiv 2204.02311, appendix B): full attention, no mask."""

    def set_rope_theta(self, theta: float) -> None:
        """Rotates positions by another base (RoPE theta) from here on.

        Raises:
            ConfigError: the model has no rotary positions.
        """
        raise ConfigError(f"rope_theta = {theta}: {type(self).__name__} has no rotary positions to turn.")

    def set_position_offset(self, first: int | Tensor) -> None:
        """Takes the rows that come to begin at this position from here on, or each row at its own: (B) int64.

        Raises:
            ConfigError: the model reads rows from their beginning only.
        """
        raise ConfigError(
            f"{type(self).__name__} cannot start rows at an offset (set_position_offset): ranks cannot share "
            "rows (parallelism.context_parallel_degree), and text cannot be continued from a cache."
        )

    @torch.no_grad()
    def losses(self, tokens: Tensor, attention_mask: Any, labels: Tensor) -> Tensor:
        """Returns the loss at each label (B, T) fp32, 0 where it is -100; of a whole model, without gradients.

        Here from all logits at once; a model that has a way to need less memory takes it.

        Args:
            tokens: (B, T) int64.
            attention_mask: as ``forward`` takes it.
            labels: (B, T) int64.
        """
        logits = self(tokens, attention_mask)
        return torch.stack([loss.of_logits(row, label) for row, label in zip(logits, labels, strict=True)])

    def num_parameters(self) -> int:
        """Returns the number of parameters, each shared one counted once."""
        return sum(parameter.numel() for parameter in self.parameters())


@torch.no_grad()
def init_normal_(parameter: Tensor, name: str, seed: int, std: float) -> None:
    """Fills a parameter with normal numbers of that deviation, from a generator of its own.

    The numbers depend on the seed, the name and the kind of device alone: not on the order of parameters, and not on
    how ranks share the parameter, since each rank draws all of it and keeps its part.

    Args:
        parameter: a tensor or a distributed one.
        name: the parameter's, as ``named_parameters`` gives it; what wrappers add to it does not count.
        seed: of the run.
        std: the deviation.
    """
    for wrapper in ("_checkpoint_wrapped_module.", "_orig_mod."):
        name = name.replace(wrapper, "")
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator(parameter.device).manual_seed(int.from_bytes(digest, "little") >> 1)
    values = torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device)
    values.normal_(std=std, generator=generator)
    if isinstance(parameter, DTensor):
        values = distribute_tensor(values, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(values)


FACTS = {
    "attend": "what the attention kernel offers",
    "seq_len": "tokens in a row",
}


class ModelRegistry(Registry[Model]):
    """Models by name, each with its flavors: one config per size."""

    def __init__(self) -> None:
        super().__init__("model", FACTS)
        self._flavors: dict[str, dict[str, Any]] = {}

    def register(self, name: str, flavors: Mapping[str, Any] | None = None) -> Callable[[Component], Component]:
        """Returns a decorator that makes ``name`` stand for the decorated model class.

        Args:
            name: what the section calls the model.
            flavors: flavor -> config, at least one; the first is the section's default.

        Raises:
            ConfigError: another model already has that name, or there is no flavor.
        """
        if not flavors:
            raise ConfigError(f"model {name!r} needs at least one flavor.")
        add = super().register(name)

        def add_with_flavors(model: Component) -> Component:
            self._flavors[name] = dict(flavors)
            return add(model)

        return add_with_flavors

    def flavors(self, name: str) -> dict[str, Any]:
        """Returns flavor -> config of a model, in the order of their registration."""
        self.get(name)
        return dict(self._flavors[name])

    def parameters(self, name: str) -> dict[str, inspect.Parameter]:
        """Returns the settings of a model: its flavor or folder, and each field of its config; None keeps their value.

        ``hf_assets_path`` is for whoever reads the settings, who gives each field the folder's value.
        """
        hints = get_type_hints(self.config_type(name))
        settings = {
            "flavor": _setting("flavor", str, next(iter(self.flavors(name)))),
            "hf_assets_path": _setting("hf_assets_path", str, ""),
        }
        return settings | {field: _setting(field, hint | None, None) for field, hint in hints.items()}

    def docs(self, name: str) -> dict[str, str]:
        """Returns one line of help per setting, taken from the docstrings below the config's fields."""
        kinds = reversed(self.config_type(name).__mro__[:-1])
        parsed = [field for kind in kinds for field in parse_from_object(kind).params]
        return {
            "flavor": f"Size of the model: {', '.join(self.flavors(name))}; empty where every field is given.",
            "hf_assets_path": "A Hugging Face folder: its config.json sets the model, its tokenizer the tokenizer.",
            **{field.arg_name: field.description or "" for field in parsed},
        }

    def config_type(self, name: str) -> type:
        """Returns the dataclass of a model's config."""
        return type(next(iter(self.flavors(name).values())))

    def resolve(self, section: Any) -> Any:
        """Returns the config that a section describes: its flavor with the section's own values over it.

        Args:
            section: an object with ``name``, ``flavor`` and any of the config's fields; None keeps the flavor's value.
                An empty flavor has no values.

        Raises:
            ConfigError: no such model, no such flavor, or values that do not fit together.
        """
        flavors, kind = self.flavors(section.name), self.config_type(section.name)
        if section.flavor and section.flavor not in flavors:
            raise unknown_name(f"{section.name} flavor", section.flavor, flavors)
        chosen = {field.name: getattr(section, field.name, None) for field in fields(kind)}
        chosen = {name: value for name, value in chosen.items() if value is not None}
        if section.flavor:
            return replace(flavors[section.flavor], **chosen)
        for field in fields(kind):
            if field.default is MISSING and field.name not in chosen:
                raise ConfigError(f"model.{field.name} is not set, and there is no model.flavor to set it.")
        return kind(**chosen)

    def build(self, section: Any, **facts: Any) -> Model:
        """Makes the model that a section describes, on the current default device (``meta`` included).

        Args:
            section: as for ``resolve``.
            **facts: ``attend`` and ``seq_len``; the model receives the ones it declares.
        """
        model = self.get(section.name)
        declared = inspect.signature(model).parameters
        return model(config=self.resolve(section), **{key: facts[key] for key in facts if key in declared})


def _setting(name: str, kind: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)


registry = ModelRegistry()
register = registry.register
