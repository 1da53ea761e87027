"""Doge (Shi et al. 2025).

Llama's block; norms of each head's queries and keys; a mask that is computed from the values, added to the scores; a
factor for each coordinate of the stream that attention's and the MLP's output is added to. Where there are experts,
each is one neuron, found by two halves of a key, beside a gated MLP.
"""

from .record import Architecture, Block

DOGE = Architecture(
    model_type="doge",
    hf_class="DogeForCausalLM",
    block=Block(attn_residual="input_residual", mlp_residual="post_attention_residual"),
    kinds={"mlp.router_gate": dict.fromkeys(("gate", "mlp_in", "mlp_out"))},
)
