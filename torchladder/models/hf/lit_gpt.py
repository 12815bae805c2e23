"""Reads the weights of a lit-gpt checkpoint, such as TinyLlama's and SkyLadder's, under Hugging Face's tensor names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from torchladder.models.hf.hf_folder import LIT_GPT_SUFFIX, StoredTensor, check_dtype, read_pickled
from torchladder.registry import require

TENSOR_NAMES = {
    "transformer.wte.weight": "model.embed_tokens.weight",
    "transformer.h.*.norm_1.weight": "model.layers.*.input_layernorm.weight",
    "transformer.h.*.attn.proj.weight": "model.layers.*.self_attn.o_proj.weight",
    "transformer.h.*.norm_2.weight": "model.layers.*.post_attention_layernorm.weight",
    "transformer.h.*.mlp.swiglu.w1.weight": "model.layers.*.mlp.gate_proj.weight",
    "transformer.h.*.mlp.swiglu.w2.weight": "model.layers.*.mlp.up_proj.weight",
    "transformer.h.*.mlp.swiglu.w3.weight": "model.layers.*.mlp.down_proj.weight",
    "transformer.ln_f.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
"""Tensor in lit-gpt, with ``*`` for the layer index -> tensor in Hugging Face."""

FUSED_NAME = re.compile(r"transformer\.h\.(\d+)\.attn\.attn\.weight")
"""Queries, keys and values of a layer. For each key-value head: its query heads, the key head, the value head."""


class LitGptFile:
    """A lit-gpt checkpoint of a Llama, opened for reading; it is mapped, not read as a whole.

    The file knows its shapes, not its heads or RoPE: they are those of the model's config.

    Attributes:
        path: the file.
        config: ``vocab_size``, as in a config.json.
        tensors: all tensors by their Hugging Face name.
    """

    def __init__(self, path: str | Path, config: Any) -> None:
        self.path = Path(path).expanduser()
        require(self.path.is_file(), f"{str(path)!r} is not a file.")
        is_llama = all(hasattr(config, name) for name in ("n_heads", "kv_heads", "head_size"))
        require(is_llama, f"{self.path}: a lit-gpt file holds a Llama, the settings describe another model.")
        self._n_heads: int = config.n_heads
        self._kv_heads: int = config.kv_heads
        self._head_size: int = config.head_size
        self._stored = read_pickled(self.path, "model")  # a checkpoint of a run has optimizer and counters beside it
        self.tensors: dict[str, StoredTensor] = {}
        self._sources: dict[str, tuple[str, slice | None]] = {}  # -> tensor in the file, and which heads of a group
        for name, tensor in self._stored.items():
            check_dtype(self.path, name, tensor.dtype)
            if fused := FUSED_NAME.fullmatch(name):
                self._add_fused(name, f"model.layers.{fused[1]}.self_attn", tensor)
                continue
            layer = re.match(r"transformer\.h\.(\d+)\.", name)
            hf_name = TENSOR_NAMES.get(re.sub(r"^transformer\.h\.\d+\.", "transformer.h.*.", name), name)
            hf_name = hf_name.replace("*", layer[1] if layer else "*")
            self._add(hf_name, (name, None), tuple(tensor.shape), tensor)
        self.config = {"vocab_size": len(self._stored.get("lm_head.weight", ()))}

    def read_tensor(self, name: str) -> Tensor:
        """Returns a tensor by its Hugging Face name."""
        source, heads = self._sources[name]
        tensor = self._stored[source]
        if heads is None:
            return tensor
        dim = tensor.shape[1]
        return tensor.view(self._kv_heads, -1, self._head_size, dim)[:, heads].reshape(-1, dim)

    def _add_fused(self, name: str, prefix: str, tensor: Tensor) -> None:
        """Adds the three projections that a fused tensor holds."""
        per_group, size = self._n_heads // self._kv_heads, self._head_size
        rows = self._kv_heads * (per_group + 2) * size
        require(
            tensor.ndim == 2 and len(tensor) == rows,
            f"{self.path}: {name} has shape {list(tensor.shape)}, the model's is [{rows}, ...]: {self._n_heads} query "
            f"and 2 * {self._kv_heads} key-value heads of {size}.",
        )
        parts = {"q": slice(per_group), "k": slice(per_group, -1), "v": slice(per_group + 1, None)}
        for part, heads in parts.items():
            shape = (self._n_heads if part == "q" else self._kv_heads) * size, tensor.shape[1]
            self._add(f"{prefix}.{part}_proj.weight", (name, heads), shape, tensor)

    def _add(self, hf_name: str, source: tuple[str, slice | None], shape: tuple[int, ...], tensor: Tensor) -> None:
        self.tensors[hf_name] = StoredTensor(self.path, shape, tensor.dtype)
        self._sources[hf_name] = source


def is_lit_gpt_file(path: str | Path) -> bool:
    """Whether a path has the suffix of a lit-gpt checkpoint."""
    return Path(path).suffix == LIT_GPT_SUFFIX
