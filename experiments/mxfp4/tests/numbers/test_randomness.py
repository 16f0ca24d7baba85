"""Philox against the known answers of its authors; the Hadamard transform."""

import numpy as np
import pytest
import torch

from experiments.mxfp4.numbers import randomness


def numpy_philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10 (Salmon et al., 2011) on Python integers: counter (n, 4) -> words (n, 4)."""
    out = []
    for c in counter.tolist():
        k = list(key)
        for _ in range(10):
            p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
            c = [p1 >> 32 ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, p0 >> 32 ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
            k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
        out.append(c)
    return np.array(out)


def test_philox_by_the_known_answers_of_its_authors() -> None:
    zero, ones = [0] * 4, [0xFFFFFFFF] * 4
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    for counter, key, want in (
        (zero, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (ones, (0xFFFFFFFF, 0xFFFFFFFF), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (pi, (0xA4093822, 0x299F31D0), [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ):
        assert numpy_philox(np.array([counter]), key)[0].tolist() == want
        words = randomness.philox(tuple(torch.tensor([c]) for c in counter), key)
        assert [int(w) for w in words] == want


def test_random_bits_equal_numpy() -> None:
    seed, stream = 0x123456789ABCDEF0, 7
    got = randomness.random_bits(3, 24, seed, stream, True, torch.device("cpu"))
    counter = np.array([[call, 0, stream, 1] for call in range(9)])
    words = numpy_philox(counter, (seed & 0xFFFFFFFF, seed >> 32))
    want = np.stack([words & 0xFFFF, words >> 16], -1).reshape(3, 24)
    assert np.array_equal(got.numpy(), want)


def test_the_element_of_the_documentation() -> None:
    """Element (2, 19) of 64 columns: call 18, the high half of its second word."""
    got = randomness.random_bits(3, 64, 5, 7, False, torch.device("cpu"))
    (words,) = numpy_philox(np.array([[18, 0, 7, 0]]), (5, 0))
    assert got[2, 19] == words[1] >> 16


def test_hadamard_is_orthogonal_and_known() -> None:
    matrix = randomness.hadamard_matrix(torch.device("cpu"))
    block = torch.ones(1, 1)
    for _ in range(5):  # Sylvester's construction
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
    assert torch.equal(matrix, block)
    assert torch.equal(matrix @ matrix.T, 32 * torch.eye(32))


@pytest.mark.parametrize("signs", [None, torch.tensor(0x9ABCDEF1)])
def test_products_survive_the_hadamard_transform(signs: torch.Tensor | None) -> None:
    a, b = torch.randn(5, 96).bfloat16(), torch.randn(7, 96).bfloat16()
    transformed = randomness.hadamard(a, signs) @ randomness.hadamard(b, signs).T
    assert torch.allclose(transformed, a.float() @ b.float().T, atol=1e-4)
    assert not torch.allclose(randomness.hadamard(a, signs), a.float(), atol=0.1)


def test_signs_flip_channels() -> None:
    x = torch.randn(2, 64).bfloat16()
    flipped = x.clone()
    flipped[:, [0, 5, 32, 37]] *= -1
    signs = torch.tensor(1 << 0 | 1 << 5)
    assert torch.equal(randomness.hadamard(x, signs), randomness.hadamard(flipped))
