"""What each GPU can do: datasheet ceilings by device name, and measured ones for any device.

The table holds dense bf16 tensor-core rates with fp32 accumulation, the figure an MFU divides by.
A rate the vendor does not publish is None: MFU is then reported against the measured ceiling only.
Prices change by the week and differ several times over: a row has one only with source and date.
"""

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil
import torch

# opt-in limit of a thread block by compute capability, CUDA C++ Programming Guide: 163, 227, 99 KiB
SHARED_BYTES = {80: 166_912, 90: 232_448, 100: 232_448} | dict.fromkeys((86, 89, 120, 121), 101_376)

HOPPER = "NVIDIA H100 Tensor Core GPU Architecture whitepaper v1.04, table 2"
H200 = "NVIDIA H200 Tensor Core GPU datasheet (sparse rates halved)"
AMPERE = "NVIDIA A100 Tensor Core GPU datasheet"
RTX_BLACKWELL = "NVIDIA RTX Blackwell GPU Architecture whitepaper, appendix A"
RTX_PRO = "NVIDIA RTX PRO 6000 Blackwell datasheet and RTX PRO Blackwell whitepaper"
ADA = "NVIDIA Ada GPU Architecture whitepaper, appendix A"


@dataclass(frozen=True)
class Hardware:
    """What a vendor states of one GPU model, and what renting it costs where that can be cited.

    name        the name the driver reports, without "NVIDIA" and "GeForce"
    memory_gib  as sold; the driver keeps 1 to 2 % of it
    link        what joins the GPUs of one machine as it is usually built
    halved      GeForce: tensor cores that sum in float32 run at half their rate, so that products
                come closer to the stated rate than elsewhere
    rental      dollars an hour, the lowest and the highest of `rental_source`; None: none is cited
    """

    name: str
    bf16_tflops: float | None  # dense, fp32 accumulation
    memory_gb_per_s: float  # 1e9 bytes per second
    memory_gib: float
    compute_capability: int  # 90 is sm_90
    link: str
    link_gb_per_s: float  # each way, 1e9 bytes per second
    source: str
    fp32_tflops: float | None = None  # outside the tensor cores
    alias: str = ""  # how people call it, where that differs from the driver's name
    halved: bool = False
    rental: tuple[float, float] | None = None
    rental_source: str = ""

    @property
    def bf16_flops(self) -> float | None:
        """Dense bf16 FLOP/s, or None where the vendor publishes no figure."""
        return None if self.bf16_tflops is None else self.bf16_tflops * 1e12

    @property
    def memory_bytes_per_s(self) -> float:
        """Memory bandwidth in bytes/s."""
        return self.memory_gb_per_s * 1e9

    @property
    def architecture(self) -> str:
        """What its kernels are compiled for: "sm_90"."""
        return f"sm_{self.compute_capability}"

    @property
    def shared_memory_bytes(self) -> int:
        """Per thread block, opted in."""
        return SHARED_BYTES[self.compute_capability]


NVLINK4, NVLINK_BRIDGE = ("NVLink 4", 450.0), ("NVLink bridge", 300.0)
PCIE4, PCIE5 = ("PCIe 4.0 x16", 32.0), ("PCIe 5.0 x16", 64.0)
MARKET = "on demand at Vast.ai, usagepricing.com/blueprint/vast-ai, June 2026"
GUIDE = "on demand, mercatus-ai.com/blog/cloud-gpu-pricing, May 2026"

# name, dense bf16 TFLOP/s, memory GB/s, GiB, compute capability, link, its GB/s each way, source
GPUS = (
    Hardware("H100 80GB HBM3", 989.4, 3350, 80, 90, *NVLINK4, HOPPER, 66.9, alias="H100",
             rental=(1.99, 5.00), rental_source=GUIDE),
    Hardware("H100 PCIe", 756.0, 2039, 80, 90, *PCIE5, HOPPER, 51.2),
    Hardware("H100 NVL", 835.5, 3900, 94, 90, *NVLINK_BRIDGE, "NVIDIA H100 datasheet (halved)"),
    Hardware("H200", 989.5, 4800, 141, 90, *NVLINK4, H200, 67.0,
             rental=(2.50, 7.00), rental_source=GUIDE),
    Hardware("H200 NVL", 835.5, 4800, 141, 90, *NVLINK4, H200, 60.0),
    Hardware("H20", 148.0, 4000, 96, 90, *NVLINK4, "NVIDIA H20 product brief"),
    Hardware("B200", 2250.0, 8000, 180, 100, "NVLink 5", 900.0,
             "NVIDIA DGX B200 datasheet (per GPU, dense)"),
    Hardware("A100-SXM4-80GB", 312.0, 2039, 80, 80, "NVLink 3", 300.0, AMPERE, 19.5, alias="A100",
             rental=(0.80, 3.00), rental_source=GUIDE),
    Hardware("A100-SXM4-40GB", 312.0, 1555, 40, 80, "NVLink 3", 300.0, AMPERE, 19.5),
    Hardware("A100 80GB PCIe", 312.0, 1935, 80, 80, *PCIE4, AMPERE, 19.5),
    Hardware("A100-PCIE-40GB", 312.0, 1555, 40, 80, *PCIE4, AMPERE, 19.5),
    Hardware("RTX 5090", 209.5, 1792, 32, 120, *PCIE5, RTX_BLACKWELL, 104.8, halved=True,
             rental=(0.865, 1.141), rental_source=MARKET),
    # sold with less tensor throughput than the 5090; only its low-precision "AI TOPS" are published
    Hardware("RTX 5090 D", None, 1792, 32, 120, *PCIE5, "NVIDIA GeForce RTX 5090 D page",
             halved=True),
    Hardware("RTX 5080", 112.6, 960, 16, 120, *PCIE5, RTX_BLACKWELL, 56.3, halved=True),
    Hardware("RTX PRO 6000 Blackwell Workstation Edition", 503.8, 1792, 96, 120, *PCIE5, RTX_PRO,
             alias="RTX PRO 6000"),
    Hardware("RTX PRO 6000 Blackwell Max-Q Workstation Edition", 438.9, 1792, 96, 120, *PCIE5,
             RTX_PRO, alias="RTX PRO 6000 Max-Q"),
    # 128 GB that the processor uses as well
    Hardware("GB10", None, 273, 128, 121, "ConnectX-7", 25.0, "NVIDIA DGX Spark datasheet"),
    Hardware("RTX 4090", 165.2, 1008, 24, 89, *PCIE4, ADA, 82.6, halved=True,
             rental=(0.682, 0.875), rental_source=MARKET),
    Hardware("RTX 6000 Ada Generation", 364.2, 960, 48, 89, *PCIE4,
             "NVIDIA RTX 6000 Ada Generation datasheet (sparse fp8 rate / 4)", 91.1,
             alias="RTX 6000 Ada"),
    Hardware("L40S", 362.0, 864, 48, 89, *PCIE4, "NVIDIA L40S datasheet", 91.6),
    Hardware("L4", 121.0, 300, 24, 89, *PCIE4, "NVIDIA L4 datasheet (halved)", 30.3),
    Hardware("RTX 3090", 71.0, 936, 24, 86, *PCIE4, "NVIDIA Ampere GA102 whitepaper", 35.6,
             halved=True),
    Hardware("RTX A6000", 154.8, 768, 48, 86, *PCIE4, "NVIDIA Ampere GA102 whitepaper", 38.7,
             alias="A6000"),
)  # fmt: skip


def lookup(name: str) -> Hardware | None:
    """The row of a GPU by the driver's name ("NVIDIA H200") or its usual one ("H100").

    Only whole names match: a laptop part or a MIG slice is not the card it is named after.
    """
    wanted = name.lower().removeprefix("nvidia ").removeprefix("geforce ").strip()
    for gpu in GPUS:
        if wanted and wanted in (gpu.name.lower(), gpu.alias.lower()):
            return gpu
    return None


def identify(device: torch.device) -> Hardware | None:
    """The row of `device`; None for a CPU, or a GPU the table does not know."""
    if device.type != "cuda":
        return None
    return lookup(torch.cuda.get_device_name(device))


def name_of(device: torch.device) -> str:
    """What a person calls the device: the GPU, or the processor with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_cpu_name()}, {threads} thread{'s' * (threads > 1)}"


def describe() -> dict[str, object]:
    """Processor, memory and GPUs of this machine, as plain values for a record."""
    description: dict[str, object] = {
        "cpu": _cpu_name(),
        "cpu_cores": psutil.cpu_count(logical=True),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [],
    }
    if torch.cuda.is_available():
        properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        description["gpus"] = [
            {
                "name": gpu.name,
                "memory_gib": round(gpu.total_memory / 2**30, 1),
                "capability": f"{gpu.major}.{gpu.minor}",
                "multiprocessors": gpu.multi_processor_count,
            }
            for gpu in properties
        ]
    return description


def mfu(
    flops_per_token: float, tokens_per_second: float, peak_flops: float, world_size: int = 1
) -> float:
    """Model FLOPs utilisation as a fraction (PaLM, arXiv:2204.02311, appendix B).

    tokens_per_second  of all devices together.
    peak_flops         of one device, FLOP/s.
    Raises  ValueError if the peak or the world size is not positive.
    """
    if peak_flops <= 0 or world_size < 1:
        raise ValueError(
            f"peak_flops={peak_flops} and world_size={world_size} must be positive; "
            "report no MFU where the peak is unknown"
        )
    return flops_per_token * tokens_per_second / (peak_flops * world_size)


def measure_gemm(
    device: torch.device, dtype: torch.dtype, size: int | None = None, repeats: int = 20
) -> float:
    """FLOP/s of a square matrix product: median of `repeats`, random operands.

    size  rows; None takes 8192 on a GPU (all of it busy) and 1024 elsewhere (a fraction of a
    second). Random data matters: zeros draw less power, so clocks and rates come out too high.
    """
    size = size or (8192 if device.type == "cuda" else 1024)
    generator = torch.Generator(device=device).manual_seed(0)
    left, right = (
        torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2)
    )
    product = torch.empty(size, size, device=device, dtype=dtype)
    seconds = _median_seconds(lambda: torch.mm(left, right, out=product), device, repeats)
    return 2 * size**3 / seconds


def measure_copy(device: torch.device, num_bytes: int | None = None, repeats: int = 20) -> float:
    """Bytes/s of a device-to-device copy, reads and writes both counted: median of `repeats`.

    num_bytes  read per copy; None takes 1 GiB on a GPU and 256 MiB elsewhere, beyond any cache.
    """
    num_bytes = num_bytes or (2**30 if device.type == "cuda" else 2**28)
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    seconds = _median_seconds(lambda: target.copy_(source), device, repeats)
    return 2 * num_bytes / seconds


def _median_seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    for _ in range(3):
        run()
    seconds = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            stop.record()
            torch.cuda.synchronize(device)
            seconds.append(start.elapsed_time(stop) / 1e3)
        else:
            begin = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - begin)
    return median(seconds)


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
