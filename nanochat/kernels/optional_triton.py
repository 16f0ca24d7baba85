"""The package triton where it is installed, and a stand-in where it is not (macOS, Windows).

    from nanochat.kernels.optional_triton import tl, triton

Every module of this room imports Triton from here, and only from here, so that operations can be
imported, listed and run by their references on any machine. The stand-in answers every attribute
with itself: `tl.constexpr` still stands in an annotation, `@triton.jit` leaves a function as it
was. Nothing ever calls such a function: `launch.needs_triton` refuses it first, with MISSING.
"""

from typing import TYPE_CHECKING, Any

__all__ = [
    "MISSING",
    "TritonError",
    "compile_refusal",
    "installed",
    "is_interpreting",
    "tl",
    "triton",
]

MISSING = "triton is not installed: no wheel for this platform"


class Absent:
    """Stands for the package, its modules and whatever they hold."""

    def __getattr__(self, name: str) -> "Absent":
        if name.startswith("__"):  # what Python asks of any object: inspect, copy, pickle
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A decorator returns the function; any other call, such as tl.constexpr(2), itself."""
        return args[0] if len(args) == 1 and callable(args[0]) else self


if TYPE_CHECKING:
    import triton
    import triton.backends.compiler
    import triton.compiler
    import triton.errors
    import triton.knobs
    import triton.language as tl
    import triton.runtime.interpreter
    import triton.runtime.jit
    import triton.tools.tensor_descriptor
else:
    try:
        import triton
    except ImportError as error:
        if error.name != "triton":  # installed, and broken: that is not the same thing
            raise
        triton = tl = Absent()
    else:
        import triton.language as tl
        import triton.runtime.interpreter
        import triton.tools.tensor_descriptor

installed = not isinstance(triton, Absent)
TritonError: type[Exception] = triton.errors.TritonError if installed else RuntimeError


def is_interpreting() -> bool:
    """Whether kernels defined now run in Triton's interpreter (TRITON_INTERPRET=1)."""
    return installed and bool(triton.knobs.runtime.interpret)


def compile_refusal(device_type: str) -> str:
    """Reason why torch.compile cannot work on "cuda", "cpu" or "mps", or "".

    It generates Triton for GPUs and C++ for everything else.
    """
    if installed or device_type != "cuda":
        return ""
    return f"torch.compile generates Triton code for GPUs, and {MISSING}"
