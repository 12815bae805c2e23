"""The model contract, and the registry of models by name and flavor.

The section ``[model]`` selects a model and a flavor, and can override any field of the flavor's config. A model
registers with its flavors::

    @models.register("llama", flavors={"debug": LlamaConfig(dim=64, ...), "1b": LlamaConfig(dim=2048, ...)})
    class Llama(Model):
        def __init__(self, config: LlamaConfig, attention_fn: AttentionFunction, seq_len: int) -> None: ...
"""

from __future__ import annotations

import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, fields, replace
from typing import Any, ClassVar, get_type_hints

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from torchladder.models import loss
from torchladder.models.hf.adapter import HFAdapter
from torchladder.registry import Component, ConfigError, Registry, parameter_docs, require, unknown_name
from torchladder.schedule import FULL_ATTENTION


class Model(nn.Module, ABC):
    """A language model: the interface that training, inference and parallelism use.

    Attributes:
        config: the frozen dataclass that the model was built from.
        layers: name -> block, in forward order: the unit of compilation, activation checkpointing and FSDP.
        hf_adapter: maps the model to Hugging Face and back; None if it cannot be imported or exported.
    """

    config: Any
    layers: nn.ModuleDict
    hf_adapter: ClassVar[HFAdapter | None] = None

    @abstractmethod
    def forward(self, tokens: Tensor, attn_mask: Any, labels: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        """Returns logits (B, T, V), or with labels the fp32 sum of the loss over all labels that are not -100.

        Args:
            tokens: (B, T) int64.
            attn_mask: the attention mask that the kernel prepared, passed to ``attention_fn`` unchanged; if there are
                several layer types, that of each type.
            labels: (B, T) int64, the token to predict at each position, -100 for none.

        A model that supports ``training.z_loss_multiplier`` has another argument of that name, by default 0. With any
        other value it returns a pair: the sum with the z-loss added, and the z-loss by itself without a gradient.

        A model that supports ``training.context_weight_exponent`` has an argument ``label_weights``, by default None:
        (B, T), the weight of each label. With it the model returns three sums: the weighted loss with the weighted
        z-loss added, then without weights and without a gradient the loss and the z-loss, 0 if there is none.

        A model that can compute few logits has an argument ``logits_at``: (B, n) int64, positions in each row; it then
        returns the logits (B, n, V) there.
        """

    @abstractmethod
    def init_weights(self, seed: int) -> None:
        """Initializes the weights, each parameter from its own random generator (``init_normal_``)."""

    @abstractmethod
    def parallel_plan(self) -> dict[str, str]:
        """Returns the tensor-parallel style of each module with parameters: module path -> style.

        Styles: ``embedding``, ``sequence`` (norms), ``qk_norm`` (norms per head), ``joint_qk_norm`` (norms
        over all heads), ``sinks``, ``gather`` (the tokens of a module's input), ``colwise``, ``rowwise``, ``lm_head``.
        A ``*`` in a path matches every block.
        """

    @abstractmethod
    def head_counts(self) -> tuple[int, ...]:
        """Returns the head counts that the tensor-parallel degree must divide."""

    @abstractmethod
    def flops(self, tokens: int, pairs: int) -> int:
        """Returns the FLOPs of one forward and backward pass.

        Args:
            tokens: tokens in the batch.
            pairs: attended (query, key) pairs in the batch, summed over layers: ``mask.layer_pairs``.
        """

    @property
    def layer_types(self) -> list[str]:
        """The type of each layer: those of one type share masks, window and RoPE theta."""
        return [FULL_ATTENTION] * len(self.layers)

    def set_rope_theta(self, theta: float) -> None:
        """Sets the base of the RoPE frequencies for the following forward passes."""
        raise ConfigError(f"rope_theta = {theta}: {type(self).__name__} has no RoPE, remove rope_theta.")

    def set_position_offset(self, offset: int | Tensor) -> None:
        """Sets the position of the first token in the following forward passes: of all rows, or of each, (B) int64."""
        raise ConfigError(
            f"{type(self).__name__} does not implement set_position_offset, which context parallelism "
            "(parallelism.context_parallel_degree) and decoding with a KV cache need."
        )

    def keep_stage(self, layers: Collection[str], first: bool, last: bool) -> None:
        """Removes what is not on a stage of a pipeline; called before the model has weights.

        Afterwards ``forward`` takes the output of the block before (B, T, d) instead of tokens unless ``first``, and
        returns that of its last block instead of logits or a loss unless ``last``.

        Args:
            layers: names of the blocks to keep.
            first: keep the embedding.
            last: keep what follows the last block, norm and head.
        """
        raise ConfigError(
            f"{type(self).__name__} does not implement keep_stage, which pipeline parallelism "
            "(parallelism.pipeline_parallel_degree) needs."
        )

    @torch.no_grad()
    def per_token_loss(self, tokens: Tensor, attn_mask: Any, labels: Tensor) -> Tensor:
        """Returns the loss of each label (B, T) fp32, 0 where the label is -100; without gradients, on one rank.

        This default computes all logits at once; override it to save memory. The arguments are those of ``forward``.
        """
        logits = self(tokens, attn_mask)
        return torch.stack([loss.logits_cross_entropy(row, label) for row, label in zip(logits, labels, strict=True)])

    def logits_at(self, tokens: Tensor, attn_mask: Any, positions: Tensor) -> Tensor:
        """Returns the logits (B, n, V) at positions (B, n) of each row, on a model that may be parallelized."""
        if "logits_at" in inspect.signature(self.forward).parameters:
            logits = self(tokens, attn_mask, logits_at=positions)
        else:
            logits = loss.take_tokens(self(tokens, attn_mask), positions)
        assert isinstance(logits, Tensor)
        return logits

    def num_parameters(self) -> int:
        """Returns the number of parameters; shared ones count once."""
        return sum(parameter.numel() for parameter in self.parameters())


@torch.no_grad()
def init_normal_(parameter: Tensor, name: str, seed: int, std: float) -> None:
    """Fills a parameter from a normal distribution with mean 0, using its own random generator.

    The values depend only on the seed, the name and the device type, not on the order of parameters or the sharding:
    each rank generates the full parameter and keeps its shard.

    Args:
        parameter: a tensor or a DTensor.
        name: its name in ``named_parameters``; prefixes of checkpoint and compile wrappers are ignored.
        seed: the run's seed.
        std: standard deviation.
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


class ModelRegistry(Registry[Model]):
    """Models by name, each with its flavors: one config per size."""

    def __init__(self) -> None:
        super().__init__(
            "model", {"attention_fn": "the kernel's attention, or by layer type", "seq_len": "tokens in a row"}
        )
        self._flavors: dict[str, dict[str, Any]] = {}

    def register(self, name: str, flavors: Mapping[str, Any] | None = None) -> Callable[[Component], Component]:
        """Returns a decorator that registers a model class under ``name``.

        Args:
            name: the model's name in the section.
            flavors: flavor -> config, at least one; the first is the default.
        """
        if not flavors:
            raise ConfigError(f"model {name!r} needs at least one flavor.")
        add = super().register(name)

        def add_with_flavors(model: Component) -> Component:
            self._flavors[name] = dict(flavors)
            return add(model)

        return add_with_flavors

    def flavors(self, name: str) -> dict[str, Any]:
        """Returns flavor -> config of a model, in registration order."""
        self.get(name)
        return dict(self._flavors[name])

    def parameters(self, name: str) -> dict[str, inspect.Parameter]:
        """Returns the settings of a model: flavor, hf_assets_path and all fields of its config, which default to None.

        None keeps the value of the flavor. ``hf_assets_path`` is resolved by ``torchladder.config``, which sets the
        fields from the folder's config.json.
        """
        hints = get_type_hints(self.config_type(name))
        settings: dict[str, tuple[Any, Any]] = {
            "flavor": (str, next(iter(self.flavors(name)))),
            "hf_assets_path": (str, ""),
            **{field: (hint | None, None) for field, hint in hints.items()},
        }
        return {
            key: inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
            for key, (kind, default) in settings.items()
        }

    def docs(self, name: str) -> dict[str, str]:
        """Returns the help text of each setting, from the docstrings of the config's fields."""
        return {
            "flavor": f"Size of the model: {', '.join(self.flavors(name))}; empty to set every field.",
            "hf_assets_path": "A Hugging Face folder: use the model of its config.json, and its tokenizer.",
            **parameter_docs(self.config_type(name)),
        }

    def config_type(self, name: str) -> type:
        """Returns the config dataclass of a model."""
        return type(next(iter(self.flavors(name).values())))

    def resolve(self, section: Any) -> Any:
        """Returns the config of a section: the flavor's, with the section's fields over it.

        Args:
            section: an object with ``name``, ``flavor`` and any of the config's fields; None keeps the flavor's value.
        """
        flavors, kind = self.flavors(section.name), self.config_type(section.name)
        if section.flavor and section.flavor not in flavors:
            raise unknown_name(f"{section.name} flavor", section.flavor, flavors)
        chosen = {field.name: getattr(section, field.name, None) for field in fields(kind)}
        chosen = {name: value for name, value in chosen.items() if value is not None}
        if section.flavor:
            return replace(flavors[section.flavor], **chosen)
        for field in fields(kind):
            has_default = field.default is not MISSING or field.default_factory is not MISSING
            require(
                field.name in chosen or has_default,
                f"model.{field.name} is required: set it, or choose a model.flavor.",
            )
        return kind(**chosen)

    def build(self, section: Any, **runtime_args: Any) -> Model:
        """Builds the model of a section on the current default device, which may be ``meta``.

        Args:
            section: see ``resolve``.
            **runtime_args: ``attention_fn`` and ``seq_len``; the model receives those that it declares.
        """
        model = self.get(section.name)
        declared = inspect.signature(model).parameters
        runtime_args = {key: value for key, value in runtime_args.items() if key in declared}
        return model(config=self.resolve(section), **runtime_args)


registry = ModelRegistry()
register = registry.register
