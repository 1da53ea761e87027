"""AutoCircuit: edges scored by attribution patching, and by the gradients of its masks, on a patchable model."""

from __future__ import annotations

import torch
from torch import Tensor

from compat_tests.downstream.model import OTHER, TEXT, load


def run() -> dict[str, Tensor]:
    """The model made patchable, its output, and the scores of all edges."""
    from auto_circuit.data import PromptDataLoader, PromptDataset
    from auto_circuit.prune_algos.edge_attribution_patching import edge_attribution_patching_prune_scores
    from auto_circuit.prune_algos.mask_gradient import mask_gradient_prune_scores
    from auto_circuit.utils.graph_utils import patchable_model
    from transformer_lens import HookedTransformer

    model = load(HookedTransformer)
    for flag in ("use_attn_result", "use_attn_in", "use_split_qkv_input", "use_hook_mlp_in"):
        getattr(model, f"set_{flag}")(True)
    clean, corrupt = model.to_tokens([TEXT])[0], model.to_tokens([OTHER])[0]
    mary, john = (torch.tensor([model.to_single_token(name)]) for name in (" Mary", " John"))
    dataset = PromptDataset([clean, corrupt], [corrupt, clean], [mary, john], [john, mary])
    loader = PromptDataLoader(dataset, seq_len=None, diverge_idx=0, batch_size=2)
    patchable = patchable_model(
        model, factorized=True, slice_output="last_seq", separate_qkv=True, device=torch.device("cpu")
    )
    found = {"logits": patchable(torch.stack([clean, corrupt]))}
    scores = {
        "attribution": edge_attribution_patching_prune_scores(patchable, loader, None),
        "mask": mask_gradient_prune_scores(
            patchable, loader, None, grad_function="logit", answer_function="avg_diff", mask_val=0.0
        ),
    }
    for method, by_module in scores.items():
        found |= {f"{method} {name}": value for name, value in by_module.items()}
    return found
