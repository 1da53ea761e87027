"""How does a one-layer model add two numbers modulo a prime?

    python examples/modular_addition.py

Trained on half of all sums, with weight decay, it first learns them by heart and then generalises. What it finds is the
algorithm of Nanda et al. 2023 (*Progress Measures for Grokking via Mechanistic Interpretability*): numbers become
cosines and sines of a few frequencies, neurons multiply them into those of the sum, and the logit of ``c`` is a sum of
``cos(2 pi k (a + b - c) / p)``. In the Fourier basis over the numbers mod p all of that is sparse: of the embedding, of
what heads pass to the neurons, of the neurons and of the logits.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from lensbridge import HookedTransformer, HookedTransformerConfig

Tensor = torch.Tensor
#: The modulus; an odd prime, so that all frequencies are alike.
P = 53
STEPS = 1000


def config(seed: int) -> dict[str, Any]:
    """The fields of the model's HookedTransformerConfig; the last token of the vocabulary is "="."""
    return {
        "n_layers": 1,
        "n_heads": 4,
        "d_model": 64,
        "d_head": 16,
        "d_mlp": 128,
        "act_fn": "relu",
        "normalization_type": None,
        "n_ctx": 3,
        "d_vocab": P + 1,
        "d_vocab_out": P,
        "seed": seed,
        "device": "cpu",
    }


# --- training ---------------------------------------------------------------------------------------------------------


def all_sums() -> tuple[Int[Tensor, "sum 3"], Int[Tensor, "sum"]]:
    """Every ``a b =``, row ``a * P + b``, and what stands behind it."""
    numbers = torch.cartesian_prod(torch.arange(P), torch.arange(P))
    return torch.cat((numbers, torch.full((P * P, 1), P)), dim=1), numbers.sum(1) % P


def parts(seed: int) -> tuple[Int[Tensor, "part"], Int[Tensor, "rest"]]:
    """The rows to train on, one half, and those to test on."""
    order = torch.randperm(P * P, generator=torch.Generator().manual_seed(seed))
    return order[: P * P // 2], order[P * P // 2 :]


def training(model: Any, steps: int, seed: int) -> Iterator[float]:
    """Train the model on the whole training set in each step; gives the loss of each step, after the step."""
    tokens, sums = all_sums()
    rows, _ = parts(seed)
    for name, parameter in model.named_parameters():
        # The algorithm has no need of biases, and is easier to read without.
        parameter.requires_grad_(".b_" not in name)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=3e-3, betas=(0.9, 0.98), weight_decay=3.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1.0, (step + 1) / 10))
    model.train()
    for _ in range(steps):
        loss = cross_entropy(model(tokens[rows])[:, -1], sums[rows])
        loss.backward()
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        yield loss.item()
    model.eval()


# --- analysis ---------------------------------------------------------------------------------------------------------


def fourier_basis(dtype: torch.dtype) -> Float[Tensor, "component number"]:
    """An orthonormal basis of the functions on the numbers: the constant, then a cosine and a sine per frequency."""
    angles = torch.arange(P, dtype=dtype) * (2 * math.pi / P)
    waves = [torch.ones(P, dtype=dtype)]
    for frequency in range(1, P // 2 + 1):
        waves += [(frequency * angles).cos(), (frequency * angles).sin()]
    basis = torch.stack(waves)
    return basis / basis.norm(dim=1, keepdim=True)


def by_frequency(x: Float[Tensor, "number ..."]) -> Float[Tensor, "frequency"]:
    """How much of the variation over the numbers, along the first axis, each frequency 1 ... (P - 1) / 2 accounts for.

    Sums to one.
    """
    powers = (fourier_basis(x.dtype) @ x.flatten(1))[1:].square().sum(1)
    return powers.reshape(-1, 2).sum(1) / powers.sum()


def by_single_frequency(table: Float[Tensor, "a b neuron"]) -> Float[Tensor, "neuron"]:
    """The share of each neuron's variation over all sums that is made of one frequency, its best.

    Of a frequency are the constant, cosine and sine of ``a`` times those of ``b``, but for the constant by itself.
    """
    basis = fourier_basis(table.dtype)
    powers = torch.einsum("ia,jb,abn->ijn", basis, basis, table).square()
    powers[0, 0] = 0
    shares = []
    for first in range(1, P, 2):
        own = torch.tensor([0, first, first + 1])
        shares.append(powers[own][:, own].sum((0, 1)))
    return torch.stack(shares).amax(0) / powers.sum((0, 1))


def of_the_sum(logits: Float[Tensor, "a b c"], frequencies: list[int]) -> Float[Tensor, "a b c"]:
    """What of the logits is made of cosines of these frequencies, of the sum minus ``c``."""
    number = torch.arange(P, dtype=logits.dtype)
    distance = number[:, None, None] + number[None, :, None] - number
    found = torch.zeros_like(logits)
    for frequency in frequencies:
        wave = (2 * math.pi / P * frequency * distance).cos()
        found += (logits * wave).sum() / wave.square().sum() * wave
    return found


@torch.no_grad()
def findings(model: Any, seed: int) -> dict[str, Any]:
    """How well it adds, and how much of each of its parts is made of the key frequencies."""
    tokens, sums = all_sums()
    train, test = parts(seed)
    output, cache = model.run_with_cache(tokens)
    logits = output[:, -1]
    right = (logits.argmax(-1) == sums).float()
    embedding = by_frequency(model.W_E[:P])
    # The frequencies that stand out: those with more than twice an equal share.
    keys = [int(index) + 1 for index in (embedding > 2 / len(embedding)).nonzero()[:, 0]]

    def share(powers: Float[Tensor, "frequency"]) -> float:
        return powers[[key - 1 for key in keys]].sum().item()

    centred = logits - logits.mean(-1, keepdim=True)
    table = centred.reshape(P, P, P)
    in_sums = of_the_sum(table, keys)
    # What a number adds to each neuron's input through each head, where the head attends to it.
    to_neurons = (model.W_E[:P] @ model.OV[0] @ model.blocks[0].mlp.W_in).AB
    neurons = cache["post", 0][:, -1].reshape(P, P, -1)
    alive = neurons.flatten(0, 1).std(0) > 0.01 * neurons.std()
    return {
        "train accuracy": right[train].mean().item(),
        "test accuracy": right[test].mean().item(),
        "key frequencies": keys,
        "embedding": share(embedding),
        "embedding by frequency": embedding.tolist(),
        "heads to neurons": [share(by_frequency(head)) for head in to_neurons],
        "neurons": int(alive.sum()),
        "neurons by one frequency": by_single_frequency(neurons[..., alive]).tolist(),
        "logits": (in_sums.square().sum() / table.square().sum()).item(),
        "accuracy with them alone": (in_sums.flatten(0, 1).argmax(-1) == sums).float().mean().item(),
        "accuracy without them": ((table - in_sums).flatten(0, 1).argmax(-1) == sums).float().mean().item(),
    }


def show(found: dict[str, Any]) -> None:
    """Print the findings."""
    keys, shares = found["key frequencies"], found["neurons by one frequency"]
    heads = ", ".join(f"{share:.1%}" for share in found["heads to neurons"])
    tuned = sum(share > 0.85 for share in shares) / len(shares)
    print(f"\n1. Accuracy: {found['train accuracy']:.1%} on sums it saw, {found['test accuracy']:.1%} on the others")
    print(f"2. Key frequencies: {', '.join(map(str, keys)) or 'none'}, which is {len(keys)} of {P // 2}. They make up")
    print(f"   {found['embedding']:.1%} of what varies in the embedding W_E,")
    print(f"   {heads} of what the heads pass to the neurons, W_E OV W_in,")
    print(f"   {found['logits']:.1%} of the logits, as cos(2 pi k (a + b - c) / {P})")
    print(
        f"3. {found['neurons']} neurons are active. One frequency makes up {sum(shares) / len(shares):.1%} of what each"
    )
    print(f"   varies on average, and more than 85% in {tuned:.1%} of them")
    print(f"4. Accuracy on all sums with these cosines of the logits alone: {found['accuracy with them alone']:.1%};")
    print(f"   without them: {found['accuracy without them']:.1%} (chance: {1 / P:.1%})")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Build, train, analyse; returns the findings."""
    parser = argparse.ArgumentParser(
        description="Train a one-layer model on sums modulo a prime; find its Fourier terms."
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="optimiser steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and data (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    model = HookedTransformer(HookedTransformerConfig(**config(args.seed)))
    with tqdm(training(model, args.steps, args.seed), total=args.steps, desc="training", disable=args.quiet) as bar:
        for loss in bar:
            bar.set_postfix(loss=f"{loss:.2e}", refresh=False)
    found = findings(model, args.seed)
    show(found)
    return found


if __name__ == "__main__":
    main()
