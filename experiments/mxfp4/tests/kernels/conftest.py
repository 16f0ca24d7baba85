"""Fixtures of the tests of kernels."""

import math
from typing import Any

import pytest
import torch

from experiments.mxfp4.tests.support import BLOCK_SCALED, DEVICE


@pytest.fixture
def products_run() -> None:
    """Skip on a GPU where products of blocks would refuse to run."""
    if DEVICE.type == "cuda" and torch.cuda.get_device_capability() not in BLOCK_SCALED:
        pytest.skip("this GPU has no block-scaled tensor cores")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty hands out NaN or the largest integer: what a kernel leaves unwritten shows."""
    make = torch.empty

    def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        x = make(*args, **kwargs)
        if x.device.type == "meta" or isinstance(x, torch._subclasses.FakeTensor):
            return x
        return x.fill_(math.nan if x.is_floating_point() else torch.iinfo(x.dtype).max)

    monkeypatch.setattr(torch, "empty", empty)
