"""Newton-Schulz beyond tests/kernels/test_kernels.py: the Gram form, low rank, triangles."""

import pytest
import torch

from nanochat.kernels.newton_schulz import (
    MUON_COEFFICIENTS,
    POLAR_EXPRESS_COEFFICIENTS,
    newton_schulz,
    reference,
    symmetric_product,
    triton_gram,
    triton_symmetric,
)

pytestmark = pytest.mark.long


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("shape", [(2, 40, 80), (1, 30, 170), (2, 96, 33), (1, 130, 270)])
def test_gram_form_equals_the_definition(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    G = torch.randn(shape)
    for coefficients in (MUON_COEFFICIENTS, POLAR_EXPRESS_COEFFICIENTS):
        want = reference(G.double(), coefficients, torch.float64)
        assert relative(triton_gram(G, coefficients, torch.float32), want) < 1e-4
        assert relative(triton_gram(G, coefficients), want) < 2e-2  # float16


def test_gram_form_survives_low_rank() -> None:
    """Where it runs without its restart it does not."""
    torch.manual_seed(0)
    G = torch.randn(1, 64, 4) @ torch.randn(1, 4, 256)
    singular = torch.linalg.svdvals(triton_gram(G, POLAR_EXPRESS_COEFFICIENTS)[0])
    assert singular.max() < 1.25
    assert singular[:4].min() > 0.7


@pytest.mark.parametrize("name", list(newton_schulz.implementations))
def test_every_scale_is_as_exact_as_the_next(name: str) -> None:
    """Element sizes that float16 cannot hold: gradients are divided by their norm before a cast."""
    torch.manual_seed(0)
    unit = torch.randn(2, 40, 100)
    for exponent in range(-12, 7, 2):
        G = unit * 10.0**exponent
        want = reference(G.double(), MUON_COEFFICIENTS, torch.float64)
        got = newton_schulz.implementations[name].call(G, MUON_COEFFICIENTS)
        assert relative(got, want) < 2e-2, f"elements of 1e{exponent}"


def test_squarish_matrices_keep_the_definition() -> None:
    G = torch.randn(1, 20, 30)
    want = triton_symmetric(G, MUON_COEFFICIENTS)
    assert torch.equal(triton_gram(G, MUON_COEFFICIENTS), want)


@pytest.mark.parametrize("size", [1, 127, 128, 129, 257, 500])
def test_symmetric_product_fills_both_triangles(size: int) -> None:
    torch.manual_seed(0)
    A = torch.randn(2, size, 40)
    D = torch.randn(2, size, size)
    D = D + D.mT
    got = symmetric_product(A, A, D, 0.5, 2.0, 3.0)
    want = 0.5 * (A @ A.mT) + 2 * D + 3 * torch.eye(size)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)
    assert torch.equal(got, got.mT)


def test_lower_triangle_is_numbered_exactly() -> None:
    """The kernel's float32 root and its correction, for every tile of a 32,768-row matrix."""
    tiles = 256
    pid = torch.arange(tiles * (tiles + 1) // 2)
    i = ((torch.sqrt(8.0 * pid.float() + 1.0) - 1.0) / 2.0).int()
    i = torch.where(i * (i + 1) // 2 > pid, i - 1, i)
    i = torch.where((i + 1) * (i + 2) // 2 <= pid, i + 1, i)
    j = pid - i * (i + 1) // 2
    want = torch.tril_indices(tiles, tiles)
    assert torch.equal(i.long(), want[0])
    assert torch.equal(j.long(), want[1])


def test_zeros_stay_zero() -> None:
    for call in (reference, triton_symmetric, triton_gram):
        assert torch.equal(call(torch.zeros(1, 8, 20), MUON_COEFFICIENTS), torch.zeros(1, 8, 20))
