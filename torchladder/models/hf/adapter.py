"""What a family of models is called in Hugging Face's form: its types and its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torchladder.registry import ConfigError


@dataclass(frozen=True)
class HFAdapter:
    """How one of our models is named there.

    Attributes:
        architectures: ``model_type`` of a config.json -> the class that computes it; the first is how we write one.
        names: our tensors -> theirs, ``*`` for the number of a block.
        windowed: the ``model_type`` whose attention has a sliding window, empty where none has.
        head_dim: features per head where a config.json says nothing; None: hidden_size / num_attention_heads.
        vocabulary: our tensors with a row per token.
    """

    architectures: Mapping[str, str]
    names: Mapping[str, str]
    windowed: str = ""
    head_dim: int | None = None
    vocabulary: tuple[str, ...] = ("embedding.weight", "head.weight")

    def hf_name(self, name: str) -> str:
        """Returns what they call our tensor.

        Raises:
            ConfigError: they have no such tensor.
        """
        number = re.search(r"(?<=^layers\.)\d+(?=\.)", name)
        pattern = re.sub(r"^layers\.\d+\.", "layers.*.", name)
        if pattern not in self.names:
            raise ConfigError(f"{name} has no name in Hugging Face's form of a {next(iter(self.architectures))}.")
        return self.names[pattern].replace("*", number[0] if number else "*")


LLAMA = HFAdapter(
    architectures={"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"},
    windowed="mistral",
    names={
        "embedding.weight": "model.embed_tokens.weight",
        "layers.*.attention_norm.weight": "model.layers.*.input_layernorm.weight",
        "layers.*.attention.q_proj.weight": "model.layers.*.self_attn.q_proj.weight",
        "layers.*.attention.k_proj.weight": "model.layers.*.self_attn.k_proj.weight",
        "layers.*.attention.v_proj.weight": "model.layers.*.self_attn.v_proj.weight",
        "layers.*.attention.o_proj.weight": "model.layers.*.self_attn.o_proj.weight",
        "layers.*.feed_forward_norm.weight": "model.layers.*.post_attention_layernorm.weight",
        "layers.*.feed_forward.gate_proj.weight": "model.layers.*.mlp.gate_proj.weight",
        "layers.*.feed_forward.up_proj.weight": "model.layers.*.mlp.up_proj.weight",
        "layers.*.feed_forward.down_proj.weight": "model.layers.*.mlp.down_proj.weight",
        "norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
    },
)
"""Both rotate the first half of a head against the second, so no row of a projection changes its place."""


def extend_adapter(
    family: HFAdapter, architectures: Mapping[str, str], names: Mapping[str, str], head_dim: int
) -> HFAdapter:
    """Returns a family of its own types with some tensors more than another's."""
    return replace(family, architectures=architectures, names={**family.names, **names}, windowed="", head_dim=head_dim)
