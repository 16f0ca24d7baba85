"""The fused AdamW step against torch.optim.AdamW over many steps, and what it refuses."""

import pytest
import torch

from nanochat.kernels.adamw_step import fused, triton_step

HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_many_steps_equal_torch() -> None:
    torch.manual_seed(0)
    ours = torch.randn(37, 29, device=HERE)
    unseen = torch.arange(29, device=HERE) < 5  # rows of an embedding that no batch has had
    theirs = ours.clone().requires_grad_()
    exp_avg, exp_avg_sq = torch.zeros_like(ours), torch.zeros_like(ours)
    optimizer = torch.optim.AdamW([theirs], lr=0.03, betas=(0.8, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(1, 21):
        gradient = torch.randn_like(ours) * 10.0 ** torch.randint(-9, 1, ours.shape, device=HERE)
        gradient = gradient.masked_fill(unseen, 0.0)
        theirs.grad = gradient.clone()
        optimizer.step()
        triton_step(ours, gradient, exp_avg, exp_avg_sq, step, 0.03, (0.8, 0.95), 1e-8, 0.1)
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6)


def test_other_dtypes_and_shapes_are_refused() -> None:
    x = torch.zeros(4, device=HERE)
    rates = (0.9, 0.9, 1e-8, 1.0, 0.1, 1.0)
    for bad in (x.half(), torch.zeros(5, device=HERE), torch.zeros(8, device=HERE)[::2]):
        with pytest.raises(ValueError, match="four contiguous float32 tensors of one shape"):
            fused(x, bad, x.clone(), x.clone(), *rates)
