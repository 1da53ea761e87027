"""Does training take the steps that it takes in TransformerLens 3.9.0, and is the same then found in what was trained?

Both models start from the same weights and get the same data. After every step the loss and every parameter are
compared, in float32 and float64. Over a whole run there is no tolerance that is right: training amplifies any
difference, rounding too, so that two runs that differ in the last bit of one weight come apart in the end. Such a pair
of our own is therefore the measure there: 3.9.0's run has to be as close to ours as ours is to itself.

In models without rotary positions, the bias of the keys adds the same to all scores of a query, so its gradient is zero
but for rounding. Adam scales even that up to a step of full size in float32, in either model another one, which changes
nothing that the model computes. There the gradient is looked at and the parameter is not; in float64 rounding is far
below Adam's epsilon, and it is compared like the others.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from compat_tests.native_models import BASE, reference, roughen
from lensbridge import HookedTransformer, HookedTransformerConfig

EXAMPLES = Path(__file__).parent.parent / "examples"
#: Largest difference, against a parameter's largest entry, or a hundredth of the model's where that is more.
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-9}
DTYPES = list(TOLERANCES)
#: How many times the distance of our two runs the one to 3.9.0's may be; they differ in more than one bit.
AMPLIFIED = 100


def example(name: str, constants: dict[str, int]) -> ModuleType:
    """A script of ``examples/`` as a module, with other values of its constants."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for constant, value in constants.items():
        setattr(module, constant, value)
    return module


def gaps(mine: Any, theirs: Any, unless: tuple[str, ...] = ()) -> dict[str, float]:
    """How far apart each parameter is, as a part of its largest entry or of a hundredth of the model's."""
    ours, others = (dict(model.named_parameters()) for model in (mine, theirs))
    floor = 1e-2 * max(p.detach().abs().max() for p in others.values())
    return {
        name: ((ours[name] - p).detach().abs().max() / p.detach().abs().max().clamp(min=floor)).item()
        for name, p in others.items()
        if not name.endswith(unless)
    }


class Both:
    """Our model and TransformerLens', which are to stay the same."""

    def __init__(self, fields: dict[str, Any], dtype: torch.dtype) -> None:
        self.mine = HookedTransformer(HookedTransformerConfig(**fields)).to(dtype)
        self.theirs = reference(fields).to(dtype)
        self.dtype = dtype
        # What rounding alone moves (see above).
        rotary = fields.get("positional_embedding_type") == "rotary"
        self.driven_by_rounding = () if rotary or dtype == torch.float64 else ("b_K",)

    def __iter__(self) -> Iterator[Any]:
        return iter((self.mine, self.theirs))

    def start_equal(self) -> None:
        """The same parameters, bit by bit, in the same order, so that optimisers treat them alike."""
        mine, theirs = (dict(model.named_parameters()) for model in self)
        assert list(mine) == list(theirs)
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
        assert [p.requires_grad for p in mine.values()] == [p.requires_grad for p in theirs.values()]

    def losses_agree(self, mine: float, theirs: float) -> None:
        tolerance = TOLERANCES[self.dtype]
        assert mine == pytest.approx(theirs, rel=tolerance, abs=tolerance * 1e-3)

    def parameters_agree(self, when: Any = "") -> None:
        tolerance = TOLERANCES[self.dtype]
        found = gaps(self.mine, self.theirs, unless=self.driven_by_rounding)
        assert {name: gap for name, gap in found.items() if not gap <= tolerance} == {}, when

    def gradients_agree(self) -> None:
        """Those of float32 to its tolerance; what is zero but for rounding is, in both."""
        mine, theirs = ({name: p.grad for name, p in model.named_parameters() if p.grad is not None} for model in self)
        assert list(mine) == list(theirs)
        largest = max(gradient.abs().max() for gradient in theirs.values())
        for name in theirs:
            gap = (mine[name] - theirs[name]).abs().max()
            assert gap <= TOLERANCES[self.dtype] * theirs[name].abs().max().clamp(min=1e-2 * largest), name
            if name.endswith("b_K") and self.driven_by_rounding:
                assert max(mine[name].abs().max(), theirs[name].abs().max()) <= 1e-5 * largest, name


# --- one model of each kind, any optimiser, any hooks -----------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "attention only": {"attn_only": True, "normalization_type": None, "positional_embedding_type": "shortformer"},
    "one ReLU layer": {"n_layers": 1, "act_fn": "relu", "normalization_type": None},
    "bidirectional classifier": {
        "attention_dir": "bidirectional",
        "d_vocab_out": 2,
        "act_fn": "relu",
        "use_hook_tokens": True,
    },
    "rotary, gated, RMS, groups": {
        "positional_embedding_type": "rotary",
        "gated_mlp": True,
        "act_fn": "silu",
        "normalization_type": "RMS",
        "n_key_value_heads": 1,
    },
    "longer than in training": {"use_logn_attn": True, "train_seq_length": 4},
}


def groups(model: Any) -> list[dict[str, Any]]:
    """Weight decay for matrices alone, as GPT-2 was trained."""
    named = list(model.named_parameters())
    return [
        {"params": [p for name, p in named if "W_" in name], "weight_decay": 0.5},
        {"params": [p for name, p in named if "W_" not in name], "weight_decay": 0.0},
    ]


OPTIMISERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1),
    "Adam": lambda model: torch.optim.Adam(model.parameters(), lr=1e-3),
    "Adam with decay": lambda model: torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=0.1),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1.0),
    "AdamW with groups": lambda model: torch.optim.AdamW(groups(model), lr=1e-3, betas=(0.9, 0.98)),
}


def halve(value: torch.Tensor, hook: Any) -> torch.Tensor:
    return value * 0.5


def zero_a_head(value: torch.Tensor, hook: Any) -> None:
    value[:, :, 1] = 0


def stop_gradient(value: torch.Tensor, hook: Any) -> torch.Tensor:
    return value.detach()


def halve_gradient(gradient: torch.Tensor, hook: Any) -> tuple[torch.Tensor]:
    return (gradient * 0.5,)


def mask_some_tokens(model: Any) -> AbstractContextManager:
    """For good: nobody looks at token 3, wherever it stands, but from itself."""

    def keep(tokens: torch.Tensor, hook: Any) -> None:
        hook.ctx["hidden"] = (tokens == 3)[:, None, None, :]

    def hide(scores: torch.Tensor, hook: Any) -> torch.Tensor:
        hidden = model.hook_dict["hook_tokens"].ctx["hidden"] & ~torch.eye(scores.shape[-1], dtype=torch.bool)
        return scores.masked_fill(hidden, -torch.inf)

    model.add_perma_hook("hook_tokens", keep)
    model.add_perma_hook(lambda name: name.endswith("attn_scores"), hide)
    return nullcontext()


def with_flags(model: Any) -> AbstractContextManager:
    model.set_use_attn_result(True)
    model.set_use_split_qkv_input(True)
    return model.hooks(fwd_hooks=[(lambda name: name.endswith(("hook_result", "hook_q_input")), zero_a_head)])


HOOKS: dict[str, Callable[[Any], AbstractContextManager]] = {
    "a head at half": lambda model: model.hooks(fwd_hooks=[("blocks.0.attn.hook_v", halve)]),
    "a head edited in place": lambda model: model.hooks(fwd_hooks=[("blocks.0.attn.hook_z", zero_a_head)]),
    "a point without gradient": lambda model: model.hooks(fwd_hooks=[("blocks.0.attn.hook_pattern", stop_gradient)]),
    "a gradient at half": lambda model: model.hooks(bwd_hooks=[("blocks.0.hook_attn_out", halve_gradient)]),
    "one head's own inputs": with_flags,
}


def loss_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Next-token loss; of a classifier, that of the question whether the first token is even."""
    if model.cfg.d_vocab_out == 2:
        return cross_entropy(model(tokens)[:, 0], tokens[:, 0] % 2)
    return model(tokens, return_type="loss")


def in_step(both: Both, make: Callable[[Any], torch.optim.Optimizer], steps: int = 6) -> None:
    """Train both, with a schedule and clipped gradients, and compare after every step."""
    both.start_equal()
    optimisers = [make(model) for model in both]
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 / (1 + step)) for optimiser in optimisers]
    generator = torch.Generator().manual_seed(1)
    for model in both:
        model.train()
    before = {name: p.detach().clone() for name, p in both.mine.named_parameters() if p.requires_grad and "W_" in name}
    for step in range(steps):
        tokens = torch.randint(17, (5, 9), generator=generator)
        losses = []
        for model, optimiser, schedule in zip(both, optimisers, schedules, strict=True):
            optimiser.zero_grad()
            loss = loss_of(model, tokens)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            losses.append(loss.item())
        both.losses_agree(*losses)
        both.gradients_agree()
        both.parameters_agree(f"step {step}")
    for name, old in before.items():
        parameter = both.mine.get_parameter(name)
        # A hook may have stopped the gradient.
        assert torch.equal(parameter, old) == (parameter.grad is None), name
    for model in both:
        model.eval()
    with torch.no_grad():
        both.losses_agree(*(loss_of(model, tokens).item() for model in both))


def rough(kind: str, dtype: torch.dtype, **fields: Any) -> Both:
    both = Both(BASE | KINDS[kind] | fields, dtype)
    for model in both:
        roughen(model)
    return both


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_optimiser(kind: str, optimiser: str, dtype: torch.dtype) -> None:
    in_step(rough(kind, dtype), OPTIMISERS[optimiser])


@pytest.mark.parametrize("hooks", HOOKS)
@pytest.mark.parametrize("kind", KINDS)
def test_hooks_act_while_training(kind: str, hooks: str) -> None:
    both = rough(kind, torch.float64)
    plain = rough(kind, torch.float64)
    contexts = [HOOKS[hooks](model) for model in both]
    with contexts[0], contexts[1]:
        in_step(both, OPTIMISERS["AdamW"])
    # Without hooks, training goes another way.
    in_step(plain, OPTIMISERS["AdamW"])
    assert max(gaps(both.mine, plain.mine).values()) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_permanent_masks_act_while_training(kind: str) -> None:
    both = rough(kind, torch.float64, use_hook_tokens=True)
    plain = rough(kind, torch.float64, use_hook_tokens=True)
    for model in both:
        mask_some_tokens(model)
    in_step(both, OPTIMISERS["AdamW"])
    in_step(plain, OPTIMISERS["AdamW"])
    assert max(gaps(both.mine, plain.mine).values()) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_without_gradient_stay(kind: str) -> None:
    both = rough(kind, torch.float64)
    for model in both:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("b_" not in name and "embed" not in name)
    frozen = {name: p.clone() for name, p in both.mine.named_parameters() if not p.requires_grad}
    assert frozen
    in_step(both, lambda model: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=1.0))
    assert all(torch.equal(both.mine.get_parameter(name), value) for name, value in frozen.items())


@pytest.mark.parametrize("kind", KINDS)
def test_caches_while_training_have_the_values_and_gradients(kind: str) -> None:
    """A cache of every step, gradients included, does not stand in the way of the step."""
    both = rough(kind, torch.float64)
    optimisers = [OPTIMISERS["AdamW"](model) for model in both]
    tokens = torch.randint(17, (5, 9), generator=torch.Generator().manual_seed(1))
    for step in range(3):
        caches = []
        for model, optimiser in zip(both, optimisers, strict=True):
            cache, forward, backward = model.get_caching_hooks(incl_bwd=True)
            with model.hooks(fwd_hooks=forward, bwd_hooks=backward):
                optimiser.zero_grad()
                loss_of(model, tokens).backward()
            optimiser.step()
            caches.append(cache)
        mine, theirs = caches
        assert mine.keys() == theirs.keys()
        assert any(name.endswith("_grad") for name in mine)
        for name in theirs:
            torch.testing.assert_close(mine[name], theirs[name], rtol=1e-9, atol=1e-9, msg=f"{name}, step {step}")
        both.parameters_agree(f"step {step}")


def test_train_and_eval_are_the_modes_of_every_module() -> None:
    both = rough("bidirectional classifier", torch.float32)
    for training in (True, False, True):
        for model in both:
            assert model.train(training) is model
            assert {module.training for module in model.modules()} == {training}
        assert {module.training for module in both.mine.hf_model.modules()} == {training}


# --- the examples: three models from their first step to what is found in them ----------------------------------------

#: Steps of a whole run, after which the model has learnt its task; and what makes it shorter.
RUNS: dict[str, tuple[int, dict[str, int]]] = {
    "induction_circuit": (600, {}),
    "modular_addition": (600, {}),
    "balanced_brackets": (400, {"BATCH": 64, "SAMPLES": 500}),
}
#: What makes the first steps of one cheap enough for every push.
SMALLER = {"BATCH": 16, "SAMPLES": 100}


def prepared(script: ModuleType, dtype: torch.dtype) -> Both:
    """The models of an example as they are before training."""
    both = Both(script.config(seed_of(script)), dtype)
    if hasattr(script, "hide_padding"):
        for model in both:
            script.hide_padding(model)
    both.start_equal()
    return both


def seed_of(script: ModuleType) -> int:
    return getattr(script, "SEED", 0)


def runs(script: ModuleType, models: Iterable[Any], steps: int) -> Iterator[tuple[float, ...]]:
    """Train all models as the example does; after each step, its losses."""
    return zip(*(script.training(model, steps, seed_of(script)) for model in models), strict=True)


def findings_agree(mine: Any, theirs: Any, path: str = "findings") -> None:
    """The same numbers in the same places."""
    if isinstance(theirs, dict):
        assert list(mine) == list(theirs), path
        for name in theirs:
            findings_agree(mine[name], theirs[name], f"{path}, {name}")
    elif isinstance(theirs, (list, tuple)):
        assert len(mine) == len(theirs), path
        for index, (one, other) in enumerate(zip(mine, theirs, strict=True)):
            findings_agree(one, other, f"{path}, {index}")
    elif isinstance(theirs, float):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-4), path
    else:
        assert mine == theirs, path


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RUNS)
def test_the_examples_begin_as_in_3_9_0(name: str, dtype: torch.dtype) -> None:
    script = example(name, SMALLER)
    both = prepared(script, dtype)
    losses = set()
    for step, (mine, theirs) in enumerate(runs(script, both, 8)):
        both.losses_agree(mine, theirs)
        both.parameters_agree(f"step {step}")
        losses.add(mine)
    assert len(losses) == 8
    findings_agree(*(script.findings(model, seed_of(script)) for model in both))


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_the_examples_end_as_in_3_9_0(name: str) -> None:
    """A whole run in float64, from the example's own first weights, and all that is found in its result."""
    steps, constants = RUNS[name]
    script = example(name, constants)
    both, nudged = prepared(script, torch.float64), prepared(script, torch.float64).mine
    with torch.no_grad():
        nudged.blocks[0].attn.W_Q[0, 0, 0] *= 1 + torch.finfo(torch.float64).eps
    losses: list[float] = []
    apart = dict.fromkeys(("loss", "parameters"), TOLERANCES[torch.float64] / AMPLIFIED)
    for step, (mine, theirs, other) in enumerate(runs(script, (*both, nudged), steps)):
        losses.append(mine)
        apart["loss"] = max(apart["loss"], abs(mine - other) / mine)
        assert abs(mine - theirs) / mine <= AMPLIFIED * apart["loss"], f"step {step}"
        if step % 10 == 0 or step == steps - 1:
            apart["parameters"] = max(apart["parameters"], *gaps(nudged, both.mine).values())
            assert max(gaps(both.mine, both.theirs).values()) <= AMPLIFIED * apart["parameters"], f"step {step}"
    assert losses[-1] < 0.1 * losses[0]
    assert theirs < 0.1 * losses[0]
    # Equal weights, so that what is compared is the analysis.
    both.theirs.load_state_dict(both.mine.state_dict())
    findings_agree(*(script.findings(model, seed_of(script)) for model in both))
