"""Forecasts: what is read from a compiled kernel, what a launch of any size records, the sums."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanochat.kernels.compiled import (
    Loop,
    Work,
    count_instructions,
    instructions,
    loops_of,
    read_work,
)
from nanochat.kernels.forecast import MACHINES, resident
from nanochat.kernels.launch import Launch
from nanochat.kernels.registry import operations
from nanochat.kernels.unexecuted import launches
from nanochat.kernels.workloads import WORKLOADS

IR = """
module {
  tt.func public @k(%x_ptr: !tt.ptr<bf16> loc("x"(#loc)), %y_ptr: !tt.ptr<f32>, %K: i32, %M: i32) {
    %c16_i32 = arith.constant 16 : i32 loc(#loc1)
    %c0_i32 = arith.constant 0 : i32
    %c15_i32 = arith.constant 15 : i32
    %pid = tt.get_program_id x : i32
    %programs = tt.get_num_programs x : i32
    %tiles = arith.addi %M, %c15_i32 : i32
    %tiles_1 = arith.divsi %tiles, %c16_i32 : i32
    %p = tt.splat %x_ptr : !tt.ptr<bf16> -> tensor<16x32x!tt.ptr<bf16>>
    %one = tt.load %y_ptr : !tt.ptr<f32>
    scf.for %i = %pid to %tiles_1 step %programs  : i32 {
      %sum:2 = scf.for %k = %c0_i32 to %K step %c16_i32 iter_args(%q = %p, %a = %z) -> (x) : i32 {
        %x = tt.load %q, %m : tensor<16x32x!tt.ptr<bf16>> loc(#loc1)
        %b = tt.dot %x, %w, %a : tensor<16x32xbf16> * tensor<32x8xbf16> -> tensor<16x8xf32>
        scf.yield %q, %b : y
      }
      %e = math.exp2 %sum#1 : tensor<16x8xf32>
      %r = "tt.reduce"(%e) <{axis = 0 : i32}> ({
      ^bb0(%l: f32, %h: f32):
        tt.reduce.return %l : f32
      }) : (tensor<16x8xf32>) -> tensor<8xf32>
      %o = tt.addptr %y_ptr, %one : !tt.ptr<f32>, i32
      %d = arith.divf %r, %r : tensor<8xf32>
      tt.store %o, %d : tensor<8x!tt.ptr<f32>>
    }
    tt.return
  }
}
"""


def launch_of(names: list[str], arguments: tuple[Any, ...], grid: tuple[int, ...]) -> Launch:
    return Launch(SimpleNamespace(arg_names=names), arguments, {"num_warps": 4}, grid)


def test_work_is_counted_by_the_trips_of_its_loops() -> None:
    """100 rows are 7 tiles of 16: the first of 3 programs takes 3 of them, each of 6 steps of K."""
    x = torch.empty(1)
    work = read_work(launch_of(["x_ptr", "y_ptr", "K", "M"], (x, x, 96, 100), (3,)), IR)
    assert [(loop.trips, loop.depth) for loop in work.loops] == [(3, 0), (6, 1)]
    assert work.tensor_flops == {16: 18 * 2 * 16 * 8 * 32}
    assert work.special == 3 * (16 * 8 + 8)
    assert work.moved == 18 * 16 * 32 * 2 + 3 * 8 * 4
    assert work.scalars == 4
    assert work.loaded == {"x_ptr", "y_ptr"}
    assert work.stored == {"y_ptr"}


def sass(*lines: str) -> str:
    return "\n".join(
        f"        /*{16 * i:04x}*/   {line} ;  /* 0x0 */" for i, line in enumerate(lines)
    )


LOOP = sass(
    "MOV R1, c[0x0][0x28]",
    *["LDG.E.128 R4, [R2]", "MUFU.EX2 R4, R4", "FADD R4, R4, R4", "FADD R5, R5, R4", "NOP",
      "IADD3 R2, R2, 0x10, RZ", "@P0 BRA 0x10"],
    *["STG.E.64 [R8.64], R4", "EXIT", "BRA 0xa0"],
)  # fmt: skip


def test_a_loop_of_the_binary_runs_as_often_as_that_of_the_ir() -> None:
    work = Work(moved=32 * (5 * 16 + 8), loops=[Loop(5, 0)])
    count = count_instructions(LOOP, work, threads=32)
    assert count is not None
    assert count.special == 5
    assert count.issued == 1 + 5 * 6 + 3  # NOPs are padding


def test_the_loop_that_the_compiler_unrolled_is_found_by_the_bytes() -> None:
    """Of two loops in the IR the binary has one: the one whose trips give the bytes."""
    work = Work(moved=32 * (7 * 16 + 8), loops=[Loop(4, 0), Loop(7, 0)])
    count = count_instructions(LOOP, work, threads=32)
    assert count is not None
    assert count.special == 7
    work.moved = 32 * (6 * 16 + 8)
    assert count_instructions(LOOP, work, threads=32) is None


def test_waits_are_no_loops() -> None:
    wait = sass(
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4]", "@!P0 BRA 0x0", *["FADD R1, R1, R1"] * 6,
        "EXIT", "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4]", "@!P0 BRA 0x90", "BRA 0x20",
    )  # fmt: skip
    assert loops_of(instructions(wait)) == []


def test_programs_that_fit_a_multiprocessor() -> None:
    h200 = MACHINES["sm_90"]
    assert resident(h200, threads=1024, registers=64, shared_bytes=128) == 1
    assert resident(h200, threads=128, registers=32, shared_bytes=0) == 16
    assert resident(h200, threads=256, registers=40, shared_bytes=100_000) == 2
    assert resident(MACHINES["sm_120"], threads=256, registers=40, shared_bytes=82_000) == 1


def test_a_large_step_is_recorded_without_running() -> None:
    """The loss of d20: three products of 65,536 x 1280 x 65,536, in chunks of all the rows."""
    recorded, rest = launches(
        operations()["linear_cross_entropy"], "triton", "sm_90", WORKLOADS["d20"]
    )
    assert rest.product_flops == 3 * 2 * 65_536 * 1280 * 65_536
    assert sum(launch.grid[0] for launch in recorded) == 65_536


@pytest.mark.long
def test_command_forecasts_the_loss(tmp_path: Path) -> None:
    """A logit is read and written once, for at most 3 special functions; no term is left out.

    Persistent programs are as many as fit: one wave.
    """
    path = tmp_path / "forecast.json"
    command = [sys.executable, "-m", "nanochat.kernels.forecast", "--json", str(path)]
    options = ["--target", "sm_90", "--only", "linear_cross_entropy", "rms_norm", "relu2_mlp"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        command + options, env=environment, capture_output=True, text=True, check=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert result.stdout.startswith("forecast, not measured: d20")
    totals = {(t["op"], t["implementation"]): t for t in json.loads(path.read_text())}
    loss = totals["linear_cross_entropy", "triton"]
    rows = loss["kernels"]
    assert sum(k["moved"] for k in rows) == pytest.approx(2 * 2 * 65_536 * 65_536, rel=1e-3)
    assert all(k["special"] <= 3.1 * 64 and k["spills"] == 0 for k in rows)
    assert loss["seconds"] > loss["products"] + sum(k["terms"]["memory"] for k in rows)
    norm = totals["rms_norm", "triton"]
    passes = operations()["rms_norm"].cost(torch.empty(65_536, 1280, dtype=torch.bfloat16)).passes()
    assert sum(k["moved"] for k in norm["kernels"]) == passes["both"].bytes
    assert 0.8 < norm["light"] < 0.914
    assert [k["waves"] for k in totals["relu2_mlp", "triton_tma"]["kernels"]] == [1.0, 1.0]
