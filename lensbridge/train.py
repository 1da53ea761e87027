"""How is a model trained on rows of tokens?

A plain loop: batches in random order, next-token loss, one optimiser. What it trains are the HuggingFace model's own
parameters, so every lens on that model sees the trained weights. For anything larger, train ``model.hf_model`` with a
library made for it; the lens follows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import optim
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from .utilities.devices import get_device
from .utilities.library_utils import is_library_available

#: The name of the Weights and Biases project where none is given; TransformerLens'.
DEFAULT_PROJECT = "easy-transformer"


@dataclass
class HookedTransformerTrainConfig:
    """How `train` trains (TransformerLens' class of the same name)."""

    #: How often the data set is gone through.
    num_epochs: int
    batch_size: int
    #: Learning rate.
    lr: float = 1e-3
    #: Seed for the order of the data.
    seed: int = 0
    #: For SGD.
    momentum: float = 0.0
    #: Gradients are scaled down to this norm; None: never.
    max_grad_norm: float | None = None
    #: For SGD and for Adam, which then is AdamW.
    weight_decay: float | None = None
    #: "Adam", "AdamW" or "SGD".
    optimizer_name: str = "Adam"
    #: Where to train; None: the best device here.
    device: str | torch.device | None = None
    #: Steps over which the learning rate rises from 0.
    warmup_steps: int = 0
    #: Save a checkpoint every so many steps of an epoch, if ``save_dir`` is given too.
    save_every: int | None = None
    #: Directory for ``model_{step}.pt``: a state dict under TransformerLens' names.
    save_dir: str | None = None
    #: Whether to log to Weights and Biases.
    wandb: bool = False
    wandb_project_name: str | None = None
    #: Print the loss every so many steps; None: never.
    print_every: int | None = 50
    #: End each epoch after step number ``max_steps``, counted from 0.
    max_steps: int | None = None


def train(model: Any, config: HookedTransformerTrainConfig, dataset: Dataset) -> Any:
    """Train a model to predict the next token, in place; returns the model.

    ``dataset`` gives dicts with rows of tokens, ``[pos]``, under ``"tokens"``, as `utils.tokenize_and_concatenate`
    makes them. The model is left in training mode, in which HuggingFace's dropout acts.

    Raises:
        ImportError: ``config.wandb`` without wandb installed.
        ValueError: for another optimiser.
    """
    # A copy: the caller's config stays as it was given.
    config = dataclasses.replace(config)
    torch.manual_seed(config.seed)
    model.train()
    wandb = _start_wandb(config) if config.wandb else None
    config.device = config.device or get_device()
    optimizer = _optimizer(model, config)
    scheduler = _warmup(optimizer, config.warmup_steps) if config.warmup_steps > 0 else None
    loader = DataLoader(dataset, batch_size=config.batch_size, shuffle=True)
    model.to(config.device)
    for epoch in tqdm(range(1, config.num_epochs + 1), desc="epochs"):
        samples = 0
        for step, tokens in tqdm(_steps(loader, config), total=_n_steps(loader, config), leave=False, desc="steps"):
            loss = model(tokens, return_type="loss")
            loss.backward()
            if config.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            optimizer.zero_grad()
            samples += len(tokens)
            if wandb is not None:
                wandb.log({"train_loss": loss.item(), "samples": samples, "epoch": epoch})
            if config.print_every is not None and step % config.print_every == 0:
                print(f"Epoch {epoch} Samples {samples} Step {step} Loss {loss.item()}")
            _save(model, step, config)
    return model


def _steps(loader: DataLoader, config: HookedTransformerTrainConfig) -> Iterator[tuple[int, torch.Tensor]]:
    """The numbered batches of one epoch, on the device that is trained on."""
    for step, batch in enumerate(loader):
        yield step, batch["tokens"].to(config.device)
        if config.max_steps is not None and step >= config.max_steps:
            return


def _n_steps(loader: DataLoader, config: HookedTransformerTrainConfig) -> int:
    return len(loader) if config.max_steps is None else min(len(loader), config.max_steps + 1)


def _optimizer(model: Any, config: HookedTransformerTrainConfig) -> optim.Optimizer:
    name, parameters, decay = config.optimizer_name, model.parameters(), config.weight_decay
    if name == "SGD":
        return optim.SGD(parameters, lr=config.lr, weight_decay=decay or 0.0, momentum=config.momentum)
    if name not in ("Adam", "AdamW"):
        raise ValueError(f"Optimizer {name} not supported: use Adam, AdamW or SGD")
    if decay is None:
        return optim.Adam(parameters, lr=config.lr)
    # Adam's own weight decay is scaled by its step sizes, which AdamW was made to mend (Loshchilov and Hutter 2019).
    return optim.AdamW(parameters, lr=config.lr, weight_decay=decay)


def _warmup(optimizer: optim.Optimizer, steps: int) -> optim.lr_scheduler.LambdaLR:
    return optim.lr_scheduler.LambdaLR(optimizer, lr_lambda=lambda step: min(1.0, step / steps))


def _save(model: Any, step: int, config: HookedTransformerTrainConfig) -> None:
    if config.save_every is None or config.save_dir is None or step % config.save_every:
        return
    directory = Path(config.save_dir)
    directory.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), directory / f"model_{step}.pt")


def _start_wandb(config: HookedTransformerTrainConfig) -> ModuleType:
    if not is_library_available("wandb"):
        raise ImportError("wandb=True needs Weights and Biases: pip install wandb, or leave it False")
    import wandb

    config.wandb_project_name = config.wandb_project_name or DEFAULT_PROJECT
    wandb.init(project=config.wandb_project_name, config=vars(config))
    return wandb
