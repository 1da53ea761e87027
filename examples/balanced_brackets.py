"""How does a model that sees a whole string of brackets at once know whether they balance?

    python examples/balanced_brackets.py

A bidirectional classifier: its answer is read at the first position, from two logits. A string fails in two ways: it
has more brackets of one kind than of the other, or one closes where none is open, which only counting along the string
can show. Which parts of the model find which failure? The logit difference is a sum over everything that writes to the
residual stream, so every part has a share in it; and a part that is made to say what it says of balanced strings shows
whether the model can do without it.

Strings differ in length. Hooks that stay on the model hide the padding: one keeps the tokens as they come in, others
set the attention scores of padded keys to minus infinity.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float, Int
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from lensbridge import HookedTransformer, HookedTransformerConfig

Tensor = torch.Tensor
START, PAD, END, OPEN, CLOSE = range(5)
#: Of the strings, without the tokens before and after.
LONGEST = 20
STEPS = 1000
#: One with which a single head does most of the work; with others, several share it.
SEED = 1
BATCH = 256
#: Strings to measure on.
SAMPLES = 2000
KINDS = ("balanced", "dips", "surplus", "both")


def config(seed: int) -> dict[str, Any]:
    """The fields of the model's HookedTransformerConfig."""
    return {
        "n_layers": 3,
        "n_heads": 2,
        "d_model": 32,
        "d_head": 16,
        "d_mlp": 32,
        "act_fn": "relu",
        "normalization_type": "LN",
        "attention_dir": "bidirectional",
        "n_ctx": LONGEST + 2,
        "d_vocab": 5,
        "d_vocab_out": 2,
        "use_hook_tokens": True,
        "seed": seed,
        "device": "cpu",
    }


def hide_padding(model: Any) -> None:
    """Make no position look at padding, in this and every later run."""

    def keep(tokens: Tensor, hook: Any) -> None:
        hook.ctx["padding"] = (tokens == PAD)[:, None, None, :]

    def hide(scores: Tensor, hook: Any) -> Tensor:
        return scores.masked_fill(model.hook_dict["hook_tokens"].ctx["padding"], -torch.inf)

    model.add_perma_hook("hook_tokens", keep)
    model.add_perma_hook(lambda name: name.endswith("hook_attn_scores"), hide)


# --- strings ----------------------------------------------------------------------------------------------------------


def balanced(pairs: int, rng: random.Random) -> list[int]:
    """A balanced string of 1 (open) and -1 (close), all equally likely.

    Of the turns of a string with one closing bracket too many, exactly one is balanced but for its end (cycle lemma).
    """
    steps = [1] * pairs + [-1] * (pairs + 1)
    rng.shuffle(steps)
    heights = list(accumulate(steps))
    lowest = heights.index(min(heights)) + 1
    return (steps[lowest:] + steps[:lowest])[:-1]


def kind_of(steps: list[int]) -> str:
    """Whether a string is balanced, "dips" (closes what is not open), has a "surplus" of one bracket, or both."""
    heights = list(accumulate(steps))
    return KINDS[(min(heights) < 0) + 2 * (heights[-1] != 0)]


def string(rng: random.Random) -> list[int]:
    """Half of the strings are balanced; the others are mostly close to it."""
    pairs = rng.randint(1, LONGEST // 2)
    steps = balanced(pairs, rng)
    what = rng.random()
    if what < 0.2:
        rng.shuffle(steps)
    elif what < 0.4:
        place = rng.randrange(len(steps))
        steps[place] = -steps[place]
    elif what < 0.5:
        steps = [rng.choice((1, -1)) for _ in steps]
    return steps


def strings(n: int, rng: random.Random) -> tuple[Int[Tensor, "batch pos"], list[str]]:
    """``n`` strings as rows of tokens, padded on the right, and what kind each is."""
    drawn = [string(rng) for _ in range(n)]
    tokens = torch.full((n, LONGEST + 2), PAD)
    for row, steps in enumerate(drawn):
        tokens[row, : len(steps) + 2] = torch.tensor([START, *(OPEN if up > 0 else CLOSE for up in steps), END])
    return tokens, [kind_of(steps) for steps in drawn]


# --- training ---------------------------------------------------------------------------------------------------------


def training(model: Any, steps: int, seed: int) -> Iterator[float]:
    """Train a model whose padding is hidden; gives the loss of each step, after the step."""
    rng = random.Random(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / 100, 1.0, 2.0 * (1 - step / steps))
    )
    model.train()
    for _ in range(steps):
        tokens, kinds = strings(BATCH, rng)
        labels = torch.tensor([kind == "balanced" for kind in kinds], dtype=torch.long)
        loss = cross_entropy(model(tokens)[:, 0], labels)
        loss.backward()
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        yield loss.item()
    model.eval()


# --- analysis ---------------------------------------------------------------------------------------------------------


def answers(logits: Float[Tensor, "batch pos 2"]) -> Float[Tensor, "batch"]:
    """The logit for "balanced" minus the other one, at the first position."""
    return logits[:, 0, 1] - logits[:, 0, 0]


def contributions(model: Any, cache: Any) -> dict[str, Float[Tensor, "batch"]]:
    """What each part of the model adds to the logit difference, the final norm's scale held fixed."""
    direction = model.ln_final.w * (model.W_U[:, 1] - model.W_U[:, 0])
    parts, labels = cache.get_full_resid_decomposition(
        expand_neurons=False, apply_ln=True, pos_slice=0, project_output_onto=direction, return_labels=True
    )
    constant = (model.ln_final.b @ model.W_U + model.b_U) @ torch.tensor([-1.0, 1.0], dtype=parts.dtype)
    return {**dict(zip(labels, parts, strict=True)), "final norm and b_U": constant.expand(parts.shape[1])}


def overwrite(value: Tensor, hook: Any, at: Any, by: Tensor) -> None:
    """A hook that puts one value in the place of what is there."""
    value[at] = by


def pretending(model: Any, cache: Any, fine: Tensor, tokens: Tensor) -> dict[str, Float[Tensor, "batch"]]:
    """The logit difference if a head or MLP says at the first position what it says, on average, of a balanced string.

    ``fine`` says which strings are balanced.
    """
    first, hooks = (slice(None), 0), {}
    for layer in range(model.cfg.n_layers):
        z, mlp_out = (cache[name, layer][fine, 0].mean(0) for name in ("z", "mlp_out"))
        for head in range(model.cfg.n_heads):
            edit = partial(overwrite, at=(*first, head), by=z[head])
            hooks[f"L{layer}H{head}"] = (f"blocks.{layer}.attn.hook_z", edit)
        hooks[f"{layer}_mlp_out"] = (f"blocks.{layer}.hook_mlp_out", partial(overwrite, at=first, by=mlp_out))
    return {name: answers(model.run_with_hooks(tokens, fwd_hooks=[hook])) for name, hook in hooks.items()}


@torch.no_grad()
def findings(model: Any, seed: int) -> dict[str, Any]:
    """How often it is right, which parts say so, and which it cannot do without."""
    tokens, kinds = strings(SAMPLES, random.Random(seed + 1))
    logits, cache = model.run_with_cache(tokens)
    of_kind = {kind: torch.tensor([other == kind for other in kinds]) for kind in KINDS}
    right = (answers(logits) > 0) == of_kind["balanced"]
    parts = contributions(model, cache)
    pretended = pretending(model, cache, of_kind["balanced"], tokens)
    return {
        "strings": {kind: int(rows.sum()) for kind, rows in of_kind.items()},
        "accuracy": {kind: right[rows].float().mean().item() for kind, rows in of_kind.items()},
        "rest of the sum": (torch.stack([*parts.values()]).sum(0) - answers(logits)).abs().max().item(),
        "contributions": {
            name: {kind: part[rows].mean().item() for kind, rows in of_kind.items()} for name, part in parts.items()
        },
        "pass when pretending": {
            name: {kind: (said[rows] > 0).float().mean().item() for kind, rows in of_kind.items()}
            for name, said in pretended.items()
        },
    }


def show(found: dict[str, Any]) -> None:
    """Print the findings."""
    print(
        "\n1. Fresh strings judged rightly, by kind (dips: closes what is not open; surplus: of one of the brackets):"
    )
    for kind in KINDS:
        print(f"   {kind:9} {found['accuracy'][kind]:6.1%} of {found['strings'][kind]}")
    print("2. Contributions to the logit for balanced minus the other one, at the first position; means:")
    print("   " + " " * 18 + "".join(f"{kind:>10}" for kind in KINDS))
    for name, means in found["contributions"].items():
        print(f"   {name:18}" + "".join(f"{means[kind]:10.2f}" for kind in KINDS))
    print(f"   (they add up to the logit difference; largest rest {found['rest of the sum']:.0e})")
    print("3. Strings that pass for balanced when a part says there what it says, on average, of balanced ones:")
    print("   " + " " * 18 + "".join(f"{kind:>10}" for kind in KINDS))
    for name, passing in found["pass when pretending"].items():
        print(f"   {name:18}" + "".join(f"{passing[kind]:10.1%}" for kind in KINDS))


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Build, train, analyse; returns the findings."""
    parser = argparse.ArgumentParser(description="Train a bidirectional classifier of brackets and take it apart.")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimiser steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=SEED, help="seed of weights and data (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    model = HookedTransformer(HookedTransformerConfig(**config(args.seed)))
    hide_padding(model)
    with tqdm(training(model, args.steps, args.seed), total=args.steps, desc="training", disable=args.quiet) as bar:
        for loss in bar:
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
    found = findings(model, args.seed)
    show(found)
    return found


if __name__ == "__main__":
    main()
