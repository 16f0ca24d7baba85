"""The GPU table, MFU, and measured ceilings."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochat import hardware


@pytest.mark.parametrize(
    ("device_name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("H100", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.5),
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 503.8),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", 438.9),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA GeForce RTX 5090 D", None),
    ],
)
def test_driver_names_find_their_row(device_name, tflops):
    gpu = hardware.lookup(device_name)
    assert gpu is not None
    assert gpu.bf16_tflops == tflops


@pytest.mark.parametrize(
    "device_name",
    [
        "",
        "NVIDIA",
        "NVIDIA GeForce RTX 5090 Laptop GPU",
        "NVIDIA GeForce RTX 5090 D v2",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce GTX 1080",
        "AMD Instinct MI300X",
    ],
)
def test_what_is_not_in_the_table_is_not_guessed(device_name):
    assert hardware.lookup(device_name) is None


def test_every_row_is_complete_and_unambiguous():
    names = [name.lower() for gpu in hardware.GPUS for name in (gpu.name, gpu.alias) if name]
    assert len(names) == len(set(names))
    for gpu in hardware.GPUS:
        assert gpu.source
        assert gpu.shared_memory_bytes in {166_912, 232_448, 101_376}
        assert 100 <= gpu.memory_gb_per_s <= 10_000
        assert gpu.bf16_tflops is None or 50 <= gpu.bf16_tflops <= 3000
        # a tensor core does at least twice the rate of the ordinary units
        if gpu.bf16_tflops and gpu.fp32_tflops:
            assert gpu.bf16_tflops / gpu.fp32_tflops > 1.9
        assert gpu.architecture == f"sm_{gpu.compute_capability}"
        assert 8 <= gpu.memory_gib <= 192
        # a link is slower than the memory, and PCIe slower than NVLink
        assert 25 <= gpu.link_gb_per_s < gpu.memory_gb_per_s
        assert ("NVLink" in gpu.link) == (gpu.link_gb_per_s > 64)
        assert gpu.halved == gpu.name.startswith(("RTX 30", "RTX 40", "RTX 50"))
        assert gpu.rental is None or 0 < gpu.rental[0] <= gpu.rental[1]
        # no price without a source that says when
        assert bool(gpu.rental) == bool(re.search(r", \w+ 20\d\d$", gpu.rental_source))
    assert hardware.lookup("H200").memory_bytes_per_s == 4.8e12
    assert hardware.lookup("H200").shared_memory_bytes == 232_448
    assert hardware.lookup("H200").bf16_flops == 989.5e12
    assert hardware.lookup("GB10").bf16_flops is None


def test_a_cpu_has_no_datasheet_row():
    assert hardware.identify(torch.device("cpu")) is None


@given(
    flops=st.floats(1, 1e12),
    rate=st.floats(0, 1e9),
    peak=st.floats(1e9, 1e16),
    n=st.integers(1, 64),
)
def test_mfu_is_a_share_of_all_devices(flops, rate, peak, n):
    share = hardware.mfu(flops, rate, peak, n)
    assert share == pytest.approx(hardware.mfu(flops, rate, peak) / n)
    assert share * peak * n == pytest.approx(flops * rate)


@pytest.mark.parametrize(("peak", "world_size"), [(0, 1), (-1.0, 1), (1e12, 0)])
def test_mfu_without_a_peak_is_refused(peak, world_size):
    with pytest.raises(ValueError, match="must be positive"):
        hardware.mfu(1e9, 1e3, peak, world_size)


def test_measured_ceilings_count_flops_and_bytes(monkeypatch):
    """With a clock that says every run took 2 seconds, only the counts are left."""
    monkeypatch.setattr(
        hardware, "_median_seconds", lambda run, device, repeats: run() is None or 2
    )
    cpu = torch.device("cpu")
    assert hardware.measure_gemm(cpu, torch.float32, size=10) == 2 * 10**3 / 2
    assert hardware.measure_copy(cpu, num_bytes=1000) == 2 * 1000 / 2


def test_measuring_runs_on_this_machine():
    cpu = torch.device("cpu")
    assert hardware.measure_gemm(cpu, torch.float32, size=64, repeats=3) > 1e6
    assert hardware.measure_copy(cpu, num_bytes=2**20, repeats=3) > 1e6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_measures_less_than_its_datasheet():
    device = torch.device("cuda")
    gpu = hardware.identify(device)
    if gpu is None or gpu.bf16_flops is None:
        pytest.skip(f"{torch.cuda.get_device_name()} has no datasheet row")
    # boost clocks may exceed those the datasheet assumes (224 against 209.5 on the RTX 5090)
    assert 0.3 < hardware.measure_gemm(device, torch.bfloat16) / gpu.bf16_flops < 1.15
    assert 0.3 < hardware.measure_copy(device) / gpu.memory_bytes_per_s < 1.0


def test_describe_is_plain():
    description = hardware.describe()
    assert description["cpu"]
    assert description["cpu_cores"] >= 1
    assert len(description["gpus"]) == torch.cuda.device_count()
