"""What Triton's interpreter is taught, against ml_dtypes."""

import ml_dtypes
import numpy as np
import pytest
import torch
import triton.language as tl

from nanochat.kernels import interpreter


@pytest.mark.parametrize("dtype", [tl.float8e4nv, tl.float8e5], ids=str)
def test_the_interpreter_converts_to_float8_as_ml_dtypes(dtype: tl.dtype) -> None:
    other = {"fp8e4nv": ml_dtypes.float8_e4m3fn, "fp8e5": ml_dtypes.float8_e5m2}[str(dtype)]
    limit = float(ml_dtypes.finfo(other).max)
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)).exp2() * 3
    x = torch.cat([x, -x, torch.arange(-600.0, 600.0) / 8, torch.tensor([0.0, 1e6, -1e6, 465.0])])
    bits = interpreter.to_float8(x.numpy(), dtype)
    assert np.array_equal(bits, x.numpy().clip(-limit, limit).astype(other).view(np.uint8))
    every = np.arange(256, dtype=np.uint8)
    values = interpreter.from_float8(every, dtype.name)
    assert np.array_equal(values, every.view(other).astype(np.float32), equal_nan=True)
