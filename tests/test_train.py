"""Does training change the HuggingFace model's parameters as its config says?"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lensbridge import train as training
from lensbridge.train import HookedTransformerTrainConfig, train


@pytest.fixture
def data() -> list[dict[str, torch.Tensor]]:
    """Ten rows: one sequence again and again."""
    row = torch.randint(1, 290, (8,), generator=torch.Generator().manual_seed(1))
    return [{"tokens": row}] * 10


@pytest.fixture
def calm(new_hf: Any, new_lens: Any) -> Any:
    """A lens on a model without dropout, so that losses can be computed twice."""
    return new_lens(new_hf(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def settings(**changes: Any) -> HookedTransformerTrainConfig:
    return HookedTransformerTrainConfig(
        **{"num_epochs": 2, "batch_size": 4, "lr": 1e-2, "print_every": None, "device": "cpu"} | changes
    )


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The losses of every step of the lenses trained in a test."""
    found: list[float] = []
    backward = torch.Tensor.backward

    def record(self: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        found.append(self.item())
        backward(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", record)
    return found


@pytest.mark.parametrize("optimizer", ["Adam", "AdamW", "SGD"])
def test_the_loss_falls_and_the_hf_model_is_what_learns(calm: Any, data: Any, losses: Any, optimizer: str) -> None:
    before = {name: value.clone() for name, value in calm.hf_model.state_dict().items()}
    assert train(calm, settings(optimizer_name=optimizer, lr=2e-2), data) is calm
    assert len(losses) == 2 * 3
    assert losses[-1] < losses[0]
    changed = {name for name, value in calm.hf_model.state_dict().items() if not torch.equal(value, before[name])}
    assert {"transformer.h.1.attn.c_attn.weight", "transformer.ln_f.bias", "lm_head.weight"} <= changed
    assert calm.training and calm.hf_model.training


def test_one_step_by_hand(calm: Any, data: Any) -> None:
    weight = calm.hf_model.lm_head.weight
    loss = calm(data[0]["tokens"], return_type="loss")
    loss.backward()
    expected = (weight - 0.5 * weight.grad).detach()
    calm.zero_grad()
    train(calm, settings(num_epochs=1, lr=0.5, optimizer_name="SGD", max_steps=0), data[:4])
    torch.testing.assert_close(weight.detach(), expected)


def test_gradients_are_clipped(calm: Any, data: Any) -> None:
    before = [parameter.detach().clone() for parameter in calm.parameters()]
    options = settings(num_epochs=1, optimizer_name="SGD", lr=1.0, max_grad_norm=1e-3, max_steps=0)
    train(calm, options, data)
    moved = sum(float((a - b.detach()).square().sum()) for a, b in zip(before, calm.parameters(), strict=True)) ** 0.5
    assert moved == pytest.approx(1e-3, rel=1e-2)


def test_the_learning_rate_warms_up_from_zero(calm: Any, data: Any, losses: Any) -> None:
    train(calm, settings(optimizer_name="SGD", lr=0.1, warmup_steps=3), data)
    # The first step has rate 0, the later ones 1/3, 2/3, 1, ...
    assert losses[0] == losses[1]
    assert losses[1] > losses[2] > losses[3] > losses[4]


def test_weight_decay_and_momentum_reach_the_optimiser(calm: Any) -> None:
    def optimizer(**changes: Any) -> Any:
        return training._optimizer(calm, settings(**changes))

    assert isinstance(optimizer(weight_decay=0.3), torch.optim.AdamW)
    assert optimizer(weight_decay=0.3).defaults["weight_decay"] == 0.3
    assert type(optimizer()) is torch.optim.Adam
    assert type(optimizer(optimizer_name="AdamW")) is torch.optim.Adam
    sgd = optimizer(optimizer_name="SGD", momentum=0.7, weight_decay=0.2).defaults
    assert (sgd["momentum"], sgd["weight_decay"], sgd["lr"]) == (0.7, 0.2, 1e-2)


def test_max_steps_ends_every_epoch(calm: Any, data: Any, losses: Any) -> None:
    train(calm, settings(num_epochs=3, batch_size=2, max_steps=1), data)
    assert len(losses) == 3 * 2


def test_the_seed_decides_the_order(new_hf: Any, new_lens: Any, losses: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    data = [{"tokens": torch.randint(1, 290, (6,), generator=generator)} for _ in range(6)]
    runs = []
    for seed in (0, 0, 1):
        losses.clear()
        lens = new_lens(new_hf(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
        train(lens, settings(seed=seed, batch_size=2), data)
        runs.append(list(losses))
    assert runs[0] == runs[1] != runs[2]


def test_checkpoints_hold_the_weights_under_transformerlens_names(new_lens: Any, data: Any, tmp_path: Path) -> None:
    lens = new_lens(raw=True)
    where = tmp_path / "new" / "run"
    train(lens, settings(num_epochs=1, batch_size=3, save_every=2, save_dir=str(where)), data)
    assert sorted(file.name for file in where.iterdir()) == ["model_0.pt", "model_2.pt"]
    other = new_lens(raw=True)
    other.load_state_dict(torch.load(where / "model_2.pt"))
    assert torch.equal(other.blocks[0].attn.W_Q, torch.load(where / "model_2.pt")["blocks.0.attn.W_Q"])
    # Step 3 came after it.
    assert not torch.equal(other.W_U, lens.W_U)


def test_without_a_directory_nothing_is_saved(calm: Any, data: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    train(calm, settings(num_epochs=1, save_every=1), data)
    assert list(tmp_path.iterdir()) == []


def test_the_loss_is_printed(calm: Any, data: Any, capsys: pytest.CaptureFixture[str]) -> None:
    train(calm, settings(num_epochs=1, batch_size=2, print_every=2), data)
    lines = [line for line in capsys.readouterr().out.splitlines() if "Loss" in line]
    assert [line.split(" Loss")[0] for line in lines] == [
        "Epoch 1 Samples 2 Step 0",
        "Epoch 1 Samples 6 Step 2",
        "Epoch 1 Samples 10 Step 4",
    ]


def test_wandb_gets_every_loss(calm: Any, data: Any, losses: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    logged: list[Any] = []
    fake = SimpleNamespace(init=lambda **kwargs: started.append(kwargs), log=logged.append)
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    config = settings(num_epochs=1, wandb=True)
    train(calm, config, data)
    assert started[0]["project"] == "easy-transformer"
    assert started[0]["config"]["batch_size"] == 4
    assert [entry["train_loss"] for entry in logged] == losses
    assert [entry["samples"] for entry in logged] == [4, 8, 10]
    # The caller's config is as it was.
    assert config.wandb_project_name is None


def test_wandb_has_to_be_installed(calm: Any, data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "is_library_available", lambda name: False)
    with pytest.raises(ImportError, match="pip install wandb"):
        train(calm, settings(wandb=True), data)


def test_another_optimiser_is_refused(calm: Any, data: Any) -> None:
    with pytest.raises(ValueError, match="Optimizer Lion not supported: use Adam, AdamW or SGD"):
        train(calm, settings(optimizer_name="Lion"), data)
