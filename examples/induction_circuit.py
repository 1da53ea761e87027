"""Which weights make a two-layer model without MLPs continue a text as it went on the last time?

    python examples/induction_circuit.py

The model is trained on random tokens that repeat with a period of each row's own, so that the only way to know the next
one is to look where the present one stood before. What comes about is the induction circuit of Elhage et al. 2021: a
head of layer 0 that moves each token to the position after it, and heads of layer 1 that look for their own token among
what was moved (K-composition) and copy what stands there. Each of the three is a product of weight matrices, here a
`FactoredMatrix`, because the model has no norms and adds positions only to what queries and keys read (shortformer).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from tqdm.auto import tqdm

from lensbridge import FactoredMatrix, HookedTransformer, HookedTransformerConfig
from lensbridge.utilities import composition_scores

Tensor = torch.Tensor
STEPS = 1000
WIDTH, N_CTX, VOCAB, BATCH = 64, 48, 64, 32


def config(seed: int) -> dict[str, Any]:
    """The fields of the model's HookedTransformerConfig."""
    return {
        "n_layers": 2,
        "n_heads": 4,
        "d_model": WIDTH,
        "d_head": WIDTH // 4,
        "n_ctx": N_CTX,
        "d_vocab": VOCAB,
        "attn_only": True,
        "normalization_type": None,
        "positional_embedding_type": "shortformer",
        "initializer_range": 0.2,
        "seed": seed,
        "device": "cpu",
    }


# --- training ---------------------------------------------------------------------------------------------------------


def periodic_rows(n: int, generator: torch.Generator) -> tuple[Int[Tensor, "batch pos"], Float[Tensor, "batch pos-1"]]:
    """Rows of random tokens that repeat, and the weight of each prediction: 1 from the second period on."""
    periods = torch.randint(4, N_CTX // 2 + 1, (n, 1), generator=generator)
    draws = torch.randint(VOCAB, (n, N_CTX), generator=generator)
    places = torch.arange(N_CTX)[None]
    return draws.gather(1, places % periods), (places[:, :-1] >= periods).float()


def training(model: Any, steps: int, seed: int) -> Iterator[float]:
    """Train the model; gives the loss of each step, after the step."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / 50, 1.0, 2.0 * (1 - step / steps))
    )
    model.train()
    for _ in range(steps):
        tokens, weights = periodic_rows(BATCH, generator)
        each = model(tokens, return_type="loss", loss_per_token=True)
        loss = (each * weights).sum() / weights.sum()
        loss.backward()
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        yield loss.item()
    model.eval()


# --- analysis ---------------------------------------------------------------------------------------------------------


def top_1(circuit: Float[Tensor, "token token"]) -> float:
    """The share of tokens whose largest entry is the one for themselves."""
    return (circuit.argmax(-1) == torch.arange(len(circuit))).float().mean().item()


def attention_scores(model: Any, tokens: Tensor) -> dict[str, Float[Tensor, "layer head"]]:
    """On a block that comes twice: mean attention to the token before, and to the one after the last occurrence."""
    _, cache = model.run_with_cache(tokens, names_filter=lambda name: name.endswith("hook_pattern"))
    patterns = torch.stack([cache["pattern", layer] for layer in range(2)])
    block = tokens.shape[1] // 2
    return {
        "previous": patterns.diagonal(-1, -2, -1).mean((1, -1)),
        "induction": patterns.diagonal(1 - block, -2, -1).mean((1, -1)),
    }


def silence(z: Tensor, hook: Any, head: int) -> None:
    """A hook that lets a head write nothing."""
    z[:, :, head] = 0


def losses_without(model: Any, tokens: Tensor) -> dict[str, float]:
    """The loss on the second copy of a block: of the whole model, and without each head of layer 0."""
    hooks: dict[str, list] = {"none": []}
    for head in range(model.cfg.n_heads):
        hooks[f"L0H{head}"] = [("blocks.0.attn.hook_z", partial(silence, head=head))]
    losses = {
        name: model.run_with_hooks(tokens, return_type="loss", loss_per_token=True, fwd_hooks=hook)
        for name, hook in hooks.items()
    }
    return {name: each[:, tokens.shape[1] // 2 :].mean().item() for name, each in losses.items()}


def previous_by_position(model: Any) -> Float[Tensor, "head"]:
    """Attention to the position before, if layer 0 looked at positions alone: ``W_pos @ QK @ W_pos.T``."""
    scores = (model.W_pos @ model.QK[0] @ model.W_pos.T).AB / model.cfg.attn_scale
    visible = torch.ones(N_CTX, N_CTX, dtype=torch.bool).tril()
    return scores.masked_fill(~visible, -torch.inf).softmax(-1).diagonal(-1, -2, -1).mean(-1)


def random_composition(d_head: int, pairs: int = 300) -> tuple[float, float]:
    """Mean and deviation of the composition score of two random heads of this width."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((pairs, WIDTH, d_head), (pairs, d_head, WIDTH))
    first, second = (
        FactoredMatrix(*(torch.randn(shape, generator=generator) for shape in shapes)) for _ in ("writes", "reads")
    )
    scores = composition_scores(first, second, broadcast_dims=False)
    return scores.mean().item(), scores.std().item()


@torch.no_grad()
def findings(model: Any, seed: int) -> dict[str, Any]:
    """What the circuit consists of, and how well each part does by itself."""
    block = torch.randint(VOCAB, (64, N_CTX // 2), generator=torch.Generator().manual_seed(seed + 1))
    tokens = torch.cat((block, block), dim=1)
    attention = attention_scores(model, tokens)
    previous = int(attention["previous"][0].argmax())
    induction = int(attention["induction"][1].argmax())
    copying = model.W_E @ model.OV[1] @ model.W_U
    matching = model.W_E @ model.QK[1] @ model.OV[0, previous].T @ model.W_E.T
    mean, deviation = random_composition(model.cfg.d_head)
    eigenvalues = copying.eigenvalues
    return {
        "loss without": losses_without(model, tokens),
        "previous head": previous,
        "induction head": induction,
        "previous score": attention["previous"][0, previous].item(),
        "previous score by position": previous_by_position(model)[previous].item(),
        "induction score": attention["induction"][1, induction].item(),
        "copying top-1": [top_1(circuit) for circuit in copying.AB],
        "copying top-1 of all heads": top_1(copying.AB.sum(0)),
        "copying by eigenvalues": (eigenvalues.sum(-1).real / eigenvalues.abs().sum(-1)).tolist(),
        "matching top-1": [top_1(circuit) for circuit in matching.AB],
        "K-composition": model.all_composition_scores("K")[0, :, 1].tolist(),
        "random composition": (mean, deviation),
    }


def show(found: dict[str, Any]) -> None:
    """Print the findings."""
    previous, mean = found["previous head"], found["random composition"][0]
    print("\n1. Two kinds of heads, by their attention on a block of random tokens that comes twice:")
    print(f"   L0H{previous} looks at the token before ({found['previous score']:.2f} of its attention;")
    print(f"   by its positional circuit W_pos QK W_pos.T alone {found['previous score by position']:.2f})")
    print(f"   L1H{found['induction head']} looks behind the last occurrence ({found['induction score']:.2f})")
    print("2. Loss on the second copy, in nats, when a head of layer 0 is silenced:")
    print("  ", ", ".join(f"{head}: {loss:.2f}" for head, loss in found["loss without"].items()))
    print("3. The full copying circuit W_E OV W_U of layer 1; the largest logit is the token's own for")
    each = zip(found["copying top-1"], found["copying by eigenvalues"], strict=True)
    for head, (accuracy, positive) in enumerate(each):
        print(f"   L1H{head}: {accuracy:.1%} of tokens (eigenvalues: sum over sum of sizes {positive:+.2f})")
    print(f"   all heads together: {found['copying top-1 of all heads']:.1%}")
    print(f"4. The full matching circuit W_E QK (L0H{previous} OV).T W_E.T; a token looks most for itself for")
    for head, accuracy in enumerate(found["matching top-1"]):
        print(f"   L1H{head}: {accuracy:.1%} of tokens")
    print(f"5. K-composition scores; two random heads have {mean:.3f} +- {found['random composition'][1]:.3f}:")
    for head, row in enumerate(found["K-composition"]):
        print(f"   L0H{head} with L1H0 ... L1H3:", " ".join(f"{score:.3f}" for score in row))


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Build, train, analyse; returns the findings."""
    parser = argparse.ArgumentParser(description="Train a two-layer attention-only model; find its induction circuit.")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimiser steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and data (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    model = HookedTransformer(HookedTransformerConfig(**config(args.seed)))
    with tqdm(training(model, args.steps, args.seed), total=args.steps, desc="training", disable=args.quiet) as bar:
        for loss in bar:
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
    found = findings(model, args.seed)
    show(found)
    return found


if __name__ == "__main__":
    main()
