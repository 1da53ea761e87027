"""How are the pairs (ours, TransformerLens 3.9.0) shared between tests, and what is reported at the end?

A pair is built once per test run and asked for by shape, processing and flags. After every test each pair that was used
must be free of hooks, so that a leak fails the test that made it.

Run with ``COMPAT_SUBJECT=transformer_lens`` to put TransformerLens in our place: that checks the tests themselves, and
deselects those marked ``ours_only``, which state a documented difference to 3.9.0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase

from compat_tests import comparison
from compat_tests.ndif.stand_in import StandIn, models, serving
from compat_tests.rough_models import (
    PROCESSINGS,
    SHAPES,
    SUBJECT,
    TOKENIZER_KINDS,
    TOY_DIR,
    Shape,
    load_tokenizer,
    ours,
    random_tokens,
    rough_gpt2,
    save_tokenizer,
    tl_reference,
)

HERE = Path(__file__).parent


@dataclass
class Pair:
    """The same weights twice: in the model under test, which runs ``hf`` itself, and in the real TransformerLens."""

    ours: Any
    theirs: Any
    hf: Any
    shape: Shape

    @property
    def both(self) -> tuple[Any, Any]:
        return self.ours, self.theirs

    def tokens(self, batch: int = 2, length: int = 9, seed: int = 0) -> torch.Tensor:
        return random_tokens(batch, length, self.hf.config.vocab_size, seed)


@dataclass
class Pairs:
    """Builds pairs on demand and keeps them."""

    tokenizer_dirs: dict[str, Path]
    built: dict[Any, Pair] = field(default_factory=dict)
    used: list[Pair] = field(default_factory=list)

    def tokenizer(self, kind: str = "gpt2") -> PreTrainedTokenizerBase:
        return load_tokenizer(self.tokenizer_dirs[kind])

    def get(
        self,
        shape: str = "two",
        processing: str | tuple[tuple[str, bool], ...] = "default",
        flags: tuple[str, ...] = (),
        attention: str = "eager",
        tokenizer: str = "gpt2",
        **options: Any,
    ) -> Pair:
        key = (shape, processing, flags, attention, tokenizer, tuple(sorted(options.items())))
        if key not in self.built:
            chosen = PROCESSINGS[processing] if isinstance(processing, str) else dict(processing)
            self.built[key] = self.build(shape, chosen, flags, attention, tokenizer, options)
        pair = self.built[key]
        self.used.append(pair)
        return pair

    def build(
        self,
        shape: str,
        processing: dict[str, bool],
        flags: tuple[str, ...],
        attention: str,
        tokenizer: str,
        options: dict[str, Any],
    ) -> Pair:
        if shape == "toy":
            hf = GPT2LMHeadModel.from_pretrained(TOY_DIR, attn_implementation=attention).eval()
            hf.config.n_ctx = hf.config.n_positions
            hf.config.architectures = ["GPT2LMHeadModel"]
            size = Shape(hf.config.n_layer, hf.config.n_head, hf.config.n_embd, hf.config.n_positions)
            directory = TOY_DIR
        else:
            size = SHAPES[shape]
            hf = rough_gpt2(size, attention)
            directory = self.tokenizer_dirs[tokenizer]
        pair = Pair(
            ours(hf, load_tokenizer(directory), **processing, **options),
            tl_reference(hf, load_tokenizer(directory), **processing, **options),
            hf,
            size,
        )
        for model in pair.both:
            for flag in flags:
                getattr(model, f"set_{flag}")(True)
        return pair


@pytest.fixture(scope="session")
def all_pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    directories = {kind: save_tokenizer(tmp_path_factory.mktemp("tokenizer"), kind) for kind in TOKENIZER_KINDS}
    return Pairs(directories)


@pytest.fixture
def pairs(all_pairs: Pairs) -> Iterator[Pairs]:
    """All pairs; afterwards, nothing may be left behind on those that this test used."""
    all_pairs.used.clear()
    yield all_pairs
    for pair in all_pairs.used:
        left = {name: model.list_hooks() for name, model in (("ours", pair.ours), ("theirs", pair.theirs))}
        levels = [model.context_level for model in pair.both]
        for model in pair.both:
            model.reset_hooks(including_permanent=True)
            model.zero_grad()
        pair.hf.zero_grad()
        assert not left["ours"], f"hooks left behind: {list(left['ours'])}"
        assert not left["theirs"], f"the test forgot hooks: {list(left['theirs'])}"
        assert levels == [0, 0]


@pytest.fixture(params=["ours", "theirs"])
def model(request: pytest.FixtureRequest, pairs: Pairs) -> Any:
    """Each of the two default models in turn, for facts that are asserted on both."""
    return getattr(pairs.get(), request.param)


@pytest.fixture(scope="session")
def ndif_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandIn]:
    """One server for all tests of this process."""
    with serving(models(tmp_path_factory.mktemp("served"))) as server:
        yield server


@pytest.fixture
def ndif(ndif_server: StandIn) -> Iterator[StandIn]:
    """A server of NDIF's kind that this process's client talks to; no job may leave anything behind on its models."""
    ndif_server.reset()
    with ndif_server.pointed():
        yield ndif_server
    assert ndif_server.left_behind == []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Show what the server said when a test that used it fails."""
    report = yield
    servers = [value for value in getattr(item, "funcargs", {}).values() if isinstance(value, StandIn)]
    if report.failed and servers:
        report.sections.append(("stand-in server", servers[0].text()[-8000:]))
    return report


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny models run faster on one thread, and two test processes then do not slow each other down."""
    torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: a larger grid of the comparison, run with -m slow")
    config.addinivalue_line("markers", "ours_only: a documented difference to TransformerLens 3.9.0")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out slow grids unless a ``-m`` expression decides, and our own differences when 3.9.0 is the subject."""
    left_out = [
        item
        for item in items
        if HERE in item.path.parents
        and (
            (item.get_closest_marker("slow") is not None and not config.option.markexpr)
            or (item.get_closest_marker("ours_only") is not None and SUBJECT == "transformer_lens")
        )
    ]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The largest relative difference per kind of point, then of outputs and weights; largest first."""
    if not comparison.differences:
        return
    terminalreporter.section(f"largest relative difference to TransformerLens 3.9.0 ({SUBJECT})")
    rows = sorted(comparison.differences.items(), key=lambda row: -row[1].difference)
    points = [row for row in rows if "hook_" in row[0]]
    others = [row for row in rows if "hook_" not in row[0]]
    width = max(len(name) for name, _ in rows)
    for name, largest in [*points, *others]:
        terminalreporter.write_line(f"{name:<{width}}  {largest.difference:9.2e}  in {largest.count} comparisons")
