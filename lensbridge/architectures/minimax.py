"""MiniMax-01 (MiniMax 2025).

Attention and MLP are added, times a factor, to what the norms before them return, times another, and the sum is the
stream. Layers with lightning attention have no softmax. A mixture of experts in each.
"""

from .record import Architecture, Block, instead_of_attention

MINIMAX = Architecture(
    model_type="minimax",
    hf_class="MiniMaxForCausalLM",
    block=Block(
        attn_factor="attn_beta_factor",
        mlp_factor="mlp_beta_factor",
        attn_skip="attn_alpha_factor",
        mlp_skip="mlp_alpha_factor",
    ),
    kinds={"self_attn.output_gate": instead_of_attention("self_attn")},
    key_value_cache="none",
)
