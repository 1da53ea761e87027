"""Do the examples run, say the same for the same seed, and find what they are about?

The short runs are of a few steps, after which there is nothing to find yet; the whole ones are slow tests.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
#: Scripts that train a small model and take it apart.
NAMES = ("induction_circuit", "modular_addition", "balanced_brackets")


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """The scripts set how many threads torch uses."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=NAMES)
def short(request: pytest.FixtureRequest) -> ModuleType:
    """A script with less to do."""
    script = example(request.param)
    for constant, value in {"BATCH": 16, "SAMPLES": 100}.items():
        setattr(script, constant, value)
    return script


def numbers(found: Any) -> Iterator[float]:
    if isinstance(found, dict):
        found = found.values()
    if isinstance(found, (int, float)):
        yield found
    else:
        for part in found:
            yield from numbers(part)


def test_a_script_opens_with_its_question(short: ModuleType) -> None:
    assert short.__doc__ is not None
    assert short.__doc__.splitlines()[0].endswith("?")


def test_a_seed_decides_what_is_printed(short: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for seed in ("0", "0", "1"):
        found = short.main(["--steps", "2", "--seed", seed, "--quiet"])
        assert all(math.isfinite(number) for number in numbers(found))
        printed.append(capsys.readouterr())
    one, again, other = (text.out for text in printed)
    assert one == again != other
    assert one.count("\n") > 8
    assert {text.err for text in printed} == {""}


def test_progress_is_shown_unless_silenced(short: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    short.main(["--steps", "2"])
    assert "training: 100%" in capsys.readouterr().err


@pytest.mark.slow
def test_the_induction_circuit_is_found() -> None:
    script = example("induction_circuit")
    found = script.main(["--quiet"])
    previous, induction = found["previous head"], found["induction head"]
    assert found["previous score"] > 0.4
    # Of what it attends to by position, nothing is lost in the whole model: the head looks at positions alone.
    assert found["previous score by position"] == pytest.approx(found["previous score"], abs=0.05)
    assert found["induction score"] > 0.5
    losses = found["loss without"]
    chance = math.log(script.VOCAB)
    assert losses["none"] < 0.1 * chance
    assert max(losses, key=losses.get) == f"L0H{previous}"
    assert losses[f"L0H{previous}"] > 0.4 * chance
    assert found["copying top-1 of all heads"] > 0.95
    assert found["matching top-1"][induction] > 0.95
    # K-composition with the previous-token head stands out from all others, and from chance.
    scores, (mean, deviation) = torch.tensor(found["K-composition"]), found["random composition"]
    assert scores[previous].max() > mean + 10 * deviation
    assert int(scores[:, induction].argmax()) == previous


@pytest.mark.slow
def test_the_terms_of_modular_addition_are_found() -> None:
    found = example("modular_addition").main(["--quiet"])
    assert found["train accuracy"] == 1
    assert found["test accuracy"] > 0.99
    keys = found["key frequencies"]
    assert 1 <= len(keys) <= 8
    chance = len(keys) / len(found["embedding by frequency"])
    assert found["embedding"] > max(0.7, 2 * chance)
    assert min(found["heads to neurons"]) > max(0.7, 2 * chance)
    assert found["logits"] > 0.7
    tuned = [share for share in found["neurons by one frequency"] if share > 0.85]
    assert len(tuned) > 0.8 * len(found["neurons by one frequency"])
    assert found["accuracy with them alone"] > 0.99
    assert found["accuracy without them"] < 0.1


@pytest.mark.slow
def test_what_tells_balanced_brackets_is_found() -> None:
    found = example("balanced_brackets").main(["--quiet"])
    assert min(found["strings"].values()) > 100
    assert min(found["accuracy"].values()) > 0.95
    assert found["rest of the sum"] < 1e-4
    means = {
        kind: sum(part[kind] for part in found["contributions"].values()) for kind in ("balanced", "dips", "surplus")
    }
    assert means["balanced"] > 2 > -2 > max(means["dips"], means["surplus"])
    # The model cannot do without one of the heads of the middle layer, and can do without most other parts.
    passing = {name: share["dips"] + share["surplus"] for name, share in found["pass when pretending"].items()}
    assert max(passing.values()) > 0.5
    assert sum(share < 0.1 for share in passing.values()) > len(passing) / 2
