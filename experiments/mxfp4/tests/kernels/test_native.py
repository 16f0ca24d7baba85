"""No format is called native where its products are not."""

import pytest
from triton import knobs

from experiments.mxfp4.kernels import native
from experiments.mxfp4.kernels.ptx import NotNativeError
from experiments.mxfp4.numbers.formats import FORMATS
from experiments.mxfp4.tests.support import DEVICE


@pytest.mark.skipif(DEVICE.type != "cpu", reason="there is a GPU")
def test_without_a_gpu_nothing_is_native() -> None:
    for name in FORMATS:
        assert not native.is_native(name)
        with pytest.raises(NotNativeError, match="need a GPU, and there is none"):
            native.require_native(name)
    with pytest.raises(ValueError, match="choose one of mxfp4"):
        native.require_native("fp4")


@pytest.mark.skipif(not knobs.runtime.interpret, reason="Triton compiles here")
def test_the_interpreter_is_not_native() -> None:
    with pytest.raises(NotNativeError, match=r"on sm_120 with .* found: the interpreter"):
        native.require_native("mxfp4", "sm_120")
