"""Language models by name and flavor, their layers and attention kernels."""

from torchladder.models.attention import AttentionFunction
from torchladder.models.gemma3 import Gemma3, Gemma3Config
from torchladder.models.llama import Llama
from torchladder.models.llama_config import LlamaConfig
from torchladder.models.model import Model, ModelRegistry, register, registry
from torchladder.models.olmo import Olmo2, Olmo2Config, Olmo3, Olmo3Config
from torchladder.models.qwen3 import Qwen3, Qwen3Config
from torchladder.models.smollm3 import SmolLM3, SmolLM3Config

build = registry.build
resolve = registry.resolve

__all__ = [
    "AttentionFunction",
    "Gemma3",
    "Gemma3Config",
    "Llama",
    "LlamaConfig",
    "Model",
    "ModelRegistry",
    "Olmo2",
    "Olmo2Config",
    "Olmo3",
    "Olmo3Config",
    "Qwen3",
    "Qwen3Config",
    "SmolLM3",
    "SmolLM3Config",
    "build",
    "register",
    "registry",
    "resolve",
]
