"""Language models by name and flavor, their layers and attention kernels."""

from torchladder.models.attention import AttentionFunction
from torchladder.models.llama import Llama
from torchladder.models.llama_config import LlamaConfig
from torchladder.models.model import Model, ModelRegistry, register, registry
from torchladder.models.qwen3 import Qwen3, Qwen3Config

build = registry.build
resolve = registry.resolve

__all__ = [
    "AttentionFunction",
    "Llama",
    "LlamaConfig",
    "Model",
    "ModelRegistry",
    "Qwen3",
    "Qwen3Config",
    "build",
    "register",
    "registry",
    "resolve",
]
