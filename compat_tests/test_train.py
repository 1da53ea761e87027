"""Does `train` go through 3.9.0's losses, step by step, and end at its weights?

The models have an untied head and no dropout, which 3.9.0's models lack, and 3.9.0's unembedding bias, for which GPT-2
has no parameter, is frozen. Parameters are cut up differently, but the optimisers treat every number by itself.
"""

from __future__ import annotations

from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from transformer_lens import train as theirs

from compat_tests.comparison import TOLERANCE, close
from compat_tests.conftest import Pair, Pairs
from compat_tests.rough_models import NO_PROCESSING, SUBJECT, random_tokens

ours = import_module(f"{SUBJECT}.train")

RUNS: dict[str, dict[str, Any]] = {
    "Adam": {"lr": 1e-3},
    "AdamW": {"lr": 1e-3, "weight_decay": 0.1},
    "AdamW without decay": {"lr": 1e-3, "optimizer_name": "AdamW"},
    "SGD": {"lr": 1e-2, "optimizer_name": "SGD", "momentum": 0.8, "weight_decay": 0.01},
    "clipped": {"lr": 1e-1, "optimizer_name": "SGD", "max_grad_norm": 0.5},
    "warmed up": {"lr": 1e-3, "warmup_steps": 4},
    "cut short": {"lr": 1e-3, "max_steps": 1, "num_epochs": 3},
    "seeded": {"lr": 1e-3, "seed": 7},
}


class Rows(torch.utils.data.Dataset):
    """Rows of tokens, as `tokenize_and_concatenate` makes them."""

    def __init__(self) -> None:
        self.tokens = random_tokens(batch=14, length=8)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"tokens": self.tokens[index]}


def fresh_pair(pairs: Pairs) -> Pair:
    """Training changes the models, so they are not shared."""
    pair = pairs.build("two", NO_PROCESSING, (), "eager", "gpt2", {})
    for module in pair.hf.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for model in pair.both:
        if SUBJECT == "transformer_lens" or model is pair.theirs:
            model.unembed.b_U.requires_grad_(False)
    return pair


def run(module: Any, model: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[float]:
    """The loss of every step."""
    losses: list[float] = []
    backward = torch.Tensor.backward

    def record(self: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        losses.append(self.item())
        backward(self, *args, **kwargs)

    settings = {"num_epochs": 2, "batch_size": 4, "device": "cpu", "print_every": None} | options
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", record)
        module.train(model, module.HookedTransformerTrainConfig(**settings), Rows())
    return losses


def test_the_config_has_the_fields_of_3_9_0() -> None:
    mine, other = (fields(module.HookedTransformerTrainConfig) for module in (ours, theirs))
    assert [(field.name, field.default) for field in mine] == [(field.name, field.default) for field in other]


@pytest.mark.parametrize("name", RUNS)
def test_losses_and_weights(pairs: Pairs, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = fresh_pair(pairs)
    mine, other = (
        run(module, model, monkeypatch, **RUNS[name]) for module, model in zip((ours, theirs), pair.both, strict=True)
    )
    assert len(mine) == len(other) == (6 if name == "cut short" else 8)
    assert mine == pytest.approx(other, rel=TOLERANCE)
    assert mine[0] != pytest.approx(mine[-1], rel=1e-2)
    # Adam divides small gradients by their own size, so their last bits show in the weights.
    for weight in ("blocks.1.attn.W_V", "blocks.0.mlp.W_in", "embed.W_E", "unembed.W_U", "blocks.1.ln2.w"):
        left, right = (model.state_dict()[weight] for model in pair.both)
        assert (left - right).abs().max() <= 10 * TOLERANCE * right.abs().max(), weight


def test_checkpoints(pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = fresh_pair(pairs)
    for module, model, name in zip((ours, theirs), pair.both, ("ours", "theirs"), strict=True):
        (tmp_path / name).mkdir()
        options = {"num_epochs": 1, "lr": 1e-2, "optimizer_name": "SGD"}
        run(module, model, monkeypatch, save_every=2, save_dir=str(tmp_path / name), **options)
    files = [sorted(file.name for file in (tmp_path / name).iterdir()) for name in ("ours", "theirs")]
    assert files[0] == files[1] == ["model_0.pt", "model_2.pt"]
    mine, other = (torch.load(tmp_path / name / "model_2.pt") for name in ("ours", "theirs"))
    assert mine.keys() == other.keys()
    for name, value in other.items():
        if value.is_floating_point() and value.numel() > 1:
            close("checkpoint", mine[name], value)


@pytest.mark.parametrize("options", [{"optimizer_name": "Lion"}, {"wandb": True}])
def test_errors(pairs: Pairs, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pair = fresh_pair(pairs)
    for module, model in zip((ours, theirs), pair.both, strict=True):
        monkeypatch.setattr(module, "is_library_available", lambda name: False)
        with pytest.raises(ImportError if "wandb" in options else ValueError):
            run(module, model, monkeypatch, **options)
