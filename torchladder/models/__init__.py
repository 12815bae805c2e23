"""Language models and what they are made of."""

from torchladder.models.base import Attend, Model, ModelRegistry, register, registry
from torchladder.models.llama import Llama, LlamaConfig

__all__ = ["Attend", "Llama", "LlamaConfig", "Model", "ModelRegistry", "register", "registry"]
