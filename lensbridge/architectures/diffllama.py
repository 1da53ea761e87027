"""Llama with differential attention (Ye et al. 2024).

Heads come in pairs; what a pair writes is the difference of what its two patterns make of both its values, normed.
HuggingFace runs attention twice on the same queries and keys, for the first half of the values and for the second.
"""

from .forms import Refusal, Softmax
from .record import Architecture, Block

IN_PAIRS = Refusal(
    ("attn.hook_z",),
    "heads come in pairs in this layer, which write the difference of what their two patterns make of both values",
)

DIFFLLAMA = Architecture(
    model_type="diffllama",
    hf_class="DiffLlamaForCausalLM",
    block=Block(o=None, softmax=Softmax(times=2), refusals=(IN_PAIRS,)),
)
