"""Models that exist only as a HookedTransformerConfig, as models of transformers."""

from .config import NativeConfig as NativeConfig
from .initialisation import init_weights as init_weights
from .model import NativeForCausalLM as NativeForCausalLM
