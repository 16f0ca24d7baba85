"""Products of block-scaled matrices: c = a b^T with a (M, K) and b (N, K) of one format.

    matmul        c, in bfloat16 or float32
    matmul_add_   out += c, float32: the weight gradient. It has few tiles and a long K: K is split,
                  and the parts are summed in a fixed order, so repeated runs are bitwise equal.
    matmul_relu2  Q(relu(c)^2): the first half of the ReLU^2 network; c itself never reaches memory

Dtypes  mxfp4, mxfp8_e4m3, mxfp8_e5m2, nvfp4; products accumulate in float32.
Error   products of E2M1 elements and of their scales are exact: what remains is the rounding of
        float32 sums, and none where they fit 24 bits.
Native  a GPU without block-scaled tensor cores would multiply in bfloat16 instead, slower than
        bfloat16 itself: there every call raises NotNativeError.
"""

from pathlib import Path

import torch
from torch import Tensor

from experiments.mxfp4.kernels.blocks import constants_of, has_e2m1_conversion
from experiments.mxfp4.kernels.gemm_kernels import matmul_kernel, sum_kernel
from experiments.mxfp4.kernels.ptx import require_block_scale
from experiments.mxfp4.kernels.quantize import empty_outputs
from experiments.mxfp4.numbers.formats import FORMATS, Quantizer, ScaledTensor
from nanochat.kernels.launch import (
    GENERIC,
    Config,
    Launch,
    architecture_of,
    cdiv,
    current_recorder,
    launch,
)

TABLES = Path(__file__).parent / "configs"
FOUR_BITS = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 256, "num_warps": 8, "num_stages": 3,
             "origin": "not measured"}  # fmt: skip
EIGHT_BITS = FOUR_BITS | {"BLOCK_K": 128}  # as many bytes of codes
TILES = {
    (family, epilogue): Config(f"gemm.{family}.{epilogue}", tile, folder=TABLES)
    for family, tile in (("mxfp4", FOUR_BITS), ("mxfp8", EIGHT_BITS), ("nvfp4", FOUR_BITS))
    for epilogue in ("store", "add", "relu2")
}
SUM = Config("gemm.sum", {"BLOCK": 2048, "num_warps": 8, "origin": "not measured"}, folder=TABLES)
GROUP = 8  # rows of tiles that share the columns of b in L2
SPLITS_MAX = 8  # the parts are float32, as large as the gradient each
PART_STEPS = 4  # writing and reading a part moves the bytes of four blocks along K


def split_k(tiles: int, steps: int, programs: int) -> int:
    """How many shares of K finish first with `programs` programs at a time; the fewest of equals.

    tiles, steps  tiles of the output, and blocks along K of each

    36 tiles of 256 steps on 170 multiprocessors: unsplit, 36 programs of 256 steps leave the other
    134 idle. Split in 4, 144 programs take 64 steps, and 4 more to write and read their part.
    """

    def duration(splits: int) -> int:
        part = PART_STEPS if splits > 1 else 0
        return cdiv(tiles * splits, programs) * (cdiv(steps, splits) + part)

    return min(range(1, min(SPLITS_MAX, steps) + 1), key=duration)


def _programs(device: torch.device) -> int:
    """Programs that run at a time: one a multiprocessor. The interpreter runs one."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _multiply(
    a: Tensor, a_scales: Tensor, a_tensor_scale: Tensor | None,
    b: Tensor, b_scales: Tensor, b_tensor_scale: Tensor | None,
    fmt: str, epilogue: str, out: Tensor | None, splits: int = 1,
    quantized: tuple[Tensor, Tensor] | None = None, quantizer: str = "",
) -> None:  # fmt: skip
    """Launch `matmul_kernel`; splits of 0: `split_k` chooses."""
    (M, stride), N = a.shape, b.shape[0]
    number = FORMATS[fmt]
    K = stride * number.elements_per_byte
    target = architecture_of(a.device)
    options = TILES[fmt.split("_")[0], epilogue].choose(a)
    block_m, block_n, block_k = (options[f"BLOCK_{axis}"] for axis in "MNK")
    tiles, steps = cdiv(M, block_m) * cdiv(N, block_n), cdiv(K, block_k)
    splits = splits or split_k(tiles, steps, _programs(a.device))
    # Split-K: programs store their parts next to each other, and a second kernel adds them. Atomic
    # additions would save the memory and make every run round differently.
    parts = out
    if splits > 1:
        assert epilogue == "add"
        assert out is not None
        epilogue, parts = "store", torch.empty((splits, M, N), dtype=out.dtype, device=out.device)
    arguments = (
        a, a_scales, a_tensor_scale, b, b_scales, b_tensor_scale, parts,
        *(quantized or (None, None)),
        M, N, K, stride, a_scales.shape[1], cdiv(steps, splits) * block_k,
    )  # fmt: skip
    constants = {
        "ELEMENT": number.element, "SCALE": number.scale, "SCALE_BLOCK": number.block,
        "PER_BYTE": number.elements_per_byte, "EPILOGUE": epilogue, "Q": constants_of(quantizer),
        "PTX": has_e2m1_conversion(target), "EVEN_K": K % block_k == 0, "GROUP": GROUP, **options,
    }  # fmt: skip
    # never multiplied in another arithmetic without a word; compiled, and looked at, once a kernel
    if target != GENERIC and current_recorder() is None:
        require_block_scale(Launch(matmul_kernel, arguments, constants), fmt, target)
    launch(matmul_kernel, (tiles, splits), *arguments, **constants)
    if splits > 1:
        assert out is not None
        options = SUM.choose(out)
        grid = (cdiv(M * N, options["BLOCK"]),)
        launch(sum_kernel, grid, parts, out, M * N, SPLITS=splits, **options)


@torch.library.custom_op("mxfp4::matmul", mutates_args=())
def matmul_op(
    a: Tensor, a_scales: Tensor, a_tensor_scale: Tensor | None,
    b: Tensor, b_scales: Tensor, b_tensor_scale: Tensor | None, fmt: str, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`matmul` on the tensors of its operands."""
    out = torch.empty((a.shape[0], b.shape[0]), dtype=dtype, device=a.device)
    _multiply(a, a_scales, a_tensor_scale, b, b_scales, b_tensor_scale, fmt, "store", out)
    return out


@matmul_op.register_fake
def _(a, a_scales, a_tensor_scale, b, b_scales, b_tensor_scale, fmt, dtype):
    return a.new_empty((a.shape[0], b.shape[0]), dtype=dtype)


@torch.library.custom_op("mxfp4::matmul_add_", mutates_args=("out",))
def matmul_add_op(
    out: Tensor, a: Tensor, a_scales: Tensor, a_tensor_scale: Tensor | None,
    b: Tensor, b_scales: Tensor, b_tensor_scale: Tensor | None, fmt: str, splits: int,
) -> None:  # fmt: skip
    """`matmul_add_` on the tensors of its operands."""
    _multiply(a, a_scales, a_tensor_scale, b, b_scales, b_tensor_scale, fmt, "add", out, splits)


matmul_add_op.register_fake(lambda *arguments: None)


@torch.library.custom_op("mxfp4::matmul_relu2", mutates_args=())
def matmul_relu2_op(
    a: Tensor, a_scales: Tensor, a_tensor_scale: Tensor | None,
    b: Tensor, b_scales: Tensor, b_tensor_scale: Tensor | None,
    fmt: str, quantizer: str, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Codes, scales, and the activation itself (empty unless `keep`)."""
    M, N = a.shape[0], b.shape[0]
    codes, scales = empty_outputs(a, quantizer, M, N)
    post = torch.empty((M, N) if keep else 0, dtype=torch.bfloat16, device=a.device)
    _multiply(
        a, a_scales, a_tensor_scale, b, b_scales, b_tensor_scale, fmt, "relu2",
        post if keep else None, quantized=(codes, scales), quantizer=quantizer,
    )  # fmt: skip
    return codes, scales, post


@matmul_relu2_op.register_fake
def _(a, a_scales, a_tensor_scale, b, b_scales, b_tensor_scale, fmt, quantizer, keep):
    M, N = a.shape[0], b.shape[0]
    post = a.new_empty((M, N) if keep else 0, dtype=torch.bfloat16)
    return (*empty_outputs(a, quantizer, M, N), post)


def _operands(a: ScaledTensor, b: ScaledTensor) -> tuple:
    """Arguments of the operations. Raises ValueError for operands that do not multiply."""
    if a.format != b.format or a.columns != b.columns:
        raise ValueError(
            f"a b^T needs two operands of one format and one K, got {a.format} {a.shape} and "
            f"{b.format} {b.shape}"
        )
    tensors = a.codes, a.scales, a.tensor_scale, b.codes, b.scales, b.tensor_scale
    return (*tensors, a.format)


def matmul(a: ScaledTensor, b: ScaledTensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """a b^T, (M, N). Raises ValueError for operands of two formats, NotNativeError as above."""
    return matmul_op(*_operands(a, b), dtype)


def matmul_add_(out: Tensor, a: ScaledTensor, b: ScaledTensor, splits: int = 0) -> None:
    """out += a b^T in place; out contiguous float32 (M, N).

    splits  shares along K; 0 chooses them for the GPU (`split_k`)
    """
    if out.dtype != torch.float32 or not out.is_contiguous():
        raise ValueError(f"matmul_add_ needs a contiguous float32 out, got {out.dtype}")
    if out.shape != (a.shape[0], b.shape[0]):
        raise ValueError(f"out is {tuple(out.shape)}, a b^T is {(a.shape[0], b.shape[0])}")
    matmul_add_op(out, *_operands(a, b), splits)


def matmul_relu2(
    a: ScaledTensor, b: ScaledTensor, quantizer: Quantizer, keep: bool = False
) -> tuple[ScaledTensor, Tensor | None]:
    """(Q(post) along N, post or None), post = relu(a b^T)^2 in bfloat16.

    quantizer  an MX format, rounded to nearest: what the next product of a forward pass takes
    keep       also return post (M, N)
    """
    if quantizer.format == "nvfp4" or quantizer.rounding != "nearest":
        raise ValueError(
            f"matmul_relu2 rounds to nearest in an MX format, not to {quantizer}: nvfp4 needs the "
            "largest of all elements first; use matmul, then quantize"
        )
    N = b.shape[0]
    if N % 32:
        raise ValueError(f"N = {N} does not divide into blocks of 32: pad the weight's rows")
    codes, scales, post = matmul_relu2_op(*_operands(a, b), str(quantizer), keep)
    return ScaledTensor(codes, scales, quantizer.format, N), post if keep else None
