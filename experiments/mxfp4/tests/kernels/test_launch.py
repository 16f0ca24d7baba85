"""Which conversions a GPU's PTX has, and which tiles it runs."""

import torch

from experiments.mxfp4.kernels import gemm
from experiments.mxfp4.kernels.blocks import has_e2m1_conversion
from nanochat.kernels.launch import GENERIC, recording


def test_conversions_to_e2m1() -> None:
    answers = [has_e2m1_conversion(target) for target in ("sm_90", "sm_100", "sm_120", GENERIC)]
    assert answers == [False, True, True, False]


def test_tiles_of_a_gpu_without_its_own() -> None:
    x, chosen = torch.empty(1, dtype=torch.uint8), {}
    for target in ("sm_100", "sm_120"):
        with recording(target):
            chosen[target] = gemm.TILES["mxfp4", "store"].choose(x)
    assert chosen["sm_120"] != chosen["sm_100"]
    assert chosen["sm_100"] == gemm.TILES["mxfp4", "store"].choose(x)
