"""Language models by name and flavor, and what they are made of."""

from torchladder.models.llama import Llama
from torchladder.models.llama_config import LlamaConfig
from torchladder.models.model import Attend, Model, ModelRegistry, register, registry
from torchladder.models.qwen3 import Qwen3, Qwen3Config

build = registry.build
resolve = registry.resolve

__all__ = [
    "Attend",
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
