"""Are devices chosen, warned about and counted as they should? The devices here are pretended."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lensbridge.utilities import (
    ModelWithCfg,
    devices,
    get_best_available_cuda_device,
    get_device,
    get_device_for_block_index,
    move_to_and_update_config,
    multi_gpu,
    resolve_device_map,
    warn_if_mps,
)


@pytest.fixture
def mps(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with MPS, without CUDA, on which nothing was warned of."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: True)
    monkeypatch.setattr(devices, "_already_warned", set())
    monkeypatch.delenv("TRANSFORMERLENS_ALLOW_MPS", raising=False)
    return monkeypatch


def test_mps_is_chosen_where_it_is_allowed(mps: pytest.MonkeyPatch) -> None:
    assert get_device() == "cpu"
    mps.setenv("TRANSFORMERLENS_ALLOW_MPS", "1")
    assert get_device() == "mps"
    mps.setattr(torch.cuda, "is_available", lambda: True)
    assert get_device() == "cuda"


@pytest.mark.parametrize("device", ["mps", "mps:0", torch.device("mps")], ids=str)
def test_mps_is_warned_of_once(mps: pytest.MonkeyPatch, device: Any, recwarn: pytest.WarningsRecorder) -> None:
    warn_if_mps("cpu")
    assert not recwarn
    warn_if_mps(device)
    warn_if_mps(device)
    assert [str(warning.message).split()[0] for warning in recwarn] == ["torch"]
    assert "TRANSFORMERLENS_ALLOW_MPS" in str(recwarn[0].message)


def test_a_broken_release_is_warned_of_even_where_mps_is_allowed(
    mps: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    mps.setenv("TRANSFORMERLENS_ALLOW_MPS", "1")
    warn_if_mps("mps")
    assert not recwarn
    mps.setattr(torch, "__version__", "2.8.0+cu126")
    warn_if_mps("mps")
    warn_if_mps("mps")
    assert len(recwarn) == 1 and "2.9" in str(recwarn[0].message)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.cfg = SimpleNamespace(device="cpu", dtype=torch.float32)

    def to(self, device_or_dtype: Any) -> Any:  # type: ignore[override]
        return move_to_and_update_config(self, device_or_dtype, print_details=False)


def test_a_model_is_moved_with_its_config() -> None:
    model = Model()
    assert isinstance(model, ModelWithCfg)
    assert model.to(torch.float16) is model
    assert model.cfg.dtype is model.layer.weight.dtype is torch.float16
    model.to("meta")
    assert (model.cfg.device, model.layer.weight.device.type) == ("meta", "meta")


def test_a_model_that_is_no_module_is_moved_by_itself(capsys: pytest.CaptureFixture[str]) -> None:
    moved: list[Any] = []
    model: Any = SimpleNamespace(cfg=SimpleNamespace(device="cpu"), to=moved.append, state_dict=dict)
    move_to_and_update_config(model, torch.device("cuda", 1))
    assert moved == [torch.device("cuda", 1)]
    # The index matters: without it, tokens would go to the first GPU.
    assert model.cfg.device == "cuda:1"
    assert capsys.readouterr().out == "Moving model to device:  cuda:1\n"


def test_blocks_are_spread_evenly() -> None:
    cfg: Any = SimpleNamespace(device="cuda:1", n_layers=7, n_devices=3)
    assert [get_device_for_block_index(i, cfg).index for i in range(7)] == [1, 1, 1, 2, 2, 3, 3]
    assert get_device_for_block_index(6, cfg, "cpu") == torch.device("cpu")
    cfg.device = None
    with pytest.raises(AssertionError, match="cfg.device"):
        get_device_for_block_index(0, cfg)


def test_refused_placements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for arguments, message in (
        ((None, "auto", "cpu"), "exclude each other"),
        ((None, {"a": "disk"}, None), r"device_map\['a'\]"),
        ((None, {"a": 0, "b": "cpu"}, None), "both CPU and GPU"),
        ((2, None, None), "n_devices=2 requires CUDA"),
    ):
        with pytest.raises(ValueError, match=message):
            resolve_device_map(*arguments)
    with pytest.raises(OSError, match="none is available"):
        get_best_available_cuda_device()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="only 0 CUDA devices"):
        resolve_device_map(2, None, None)


def test_memory_that_the_driver_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(index: int) -> tuple[int, int]:
        raise RuntimeError

    monkeypatch.setattr(torch.cuda, "mem_get_info", unknown)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(multi_gpu, "calculate_available_device_cuda_memory", lambda i: 10 + i)
    assert resolve_device_map(2, None, None) == ("balanced", {0: 10, 1: 11})
