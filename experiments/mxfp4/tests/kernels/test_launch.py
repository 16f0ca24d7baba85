"""Where a launch goes, and with which tiles."""

import pytest
import torch

from experiments.mxfp4.kernels import launch as launcher
from nanochat.kernels.launch import recording


def test_targets_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    assert launcher.target_of(torch.device("cuda")) == "sm_120"
    assert launcher.target_of(torch.device("cpu")) == "interpreter"
    with recording("sm_100"):
        assert launcher.target_of(torch.device("cpu")) == "sm_100"
    answers = [launcher.converts_to_e2m1(t) for t in ("sm_90", "sm_100", "sm_120", "interpreter")]
    assert answers == [False, True, True, False]


def test_tiles_of_a_gpu_without_its_own() -> None:
    kernel = "gemm.mxfp4.store"
    assert launcher.config(kernel, "sm_120") != launcher.config(kernel, "sm_100")
    assert launcher.config(kernel, "sm_100") == launcher.config(kernel, "interpreter")
