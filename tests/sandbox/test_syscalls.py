"""The seccomp filter: ours against libseccomp's, decision by decision, on both machines."""

import ctypes
import ctypes.util
import functools
import itertools
import struct

import pytest

from nanochat.sandbox import syscalls
from nanochat.sandbox.syscalls import ALLOW, ARCHITECTURES, ENOSYS, EPERM, KILL

NUMBERS = range(470)
# of arguments: what conditions compare with, neighbours, and words whose upper halves differ
WORDS = (0, 1, 2, 4, 15, 16, 17, 1030, 1031, 0x5401, 0x5412, 0x3D0F00, 0x7D0F00, 0x103D0F00,
         1 << 32, (1 << 32) + 15, (1 << 64) - 1)  # fmt: skip


@functools.cache
def instructions(code: bytes) -> list[tuple[int, ...]]:
    return list(struct.iter_unpack("=HBBI", code))


def decide(code: bytes, machine: int, number: int, arguments: tuple[int, ...]) -> int:
    """What the kernel's BPF machine returns for one call."""
    data = struct.pack("=IIQ6Q", number, machine, 0, *arguments)
    program = instructions(code)
    accumulator = position = 0
    while True:
        opcode, then, otherwise, value = program[position]
        position += 1
        if opcode == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, value)
        elif opcode == 0x54:
            accumulator &= value
        elif opcode == 0x05:
            position += value
        elif opcode == 0x06:
            return value
        else:
            holds = {
                0x15: accumulator == value,
                0x25: accumulator > value,
                0x35: accumulator >= value,
            }[opcode]
            position += then if holds else otherwise


@pytest.fixture(params=ARCHITECTURES)
def machine(request: pytest.FixtureRequest) -> str:
    return request.param


def test_our_filter_decides_as_libseccomp(machine: str) -> None:
    try:
        import pyseccomp as binding
    except (ImportError, RuntimeError) as error:  # RuntimeError: without the system's library
        pytest.skip(f"needs pyseccomp and libseccomp: {error}")
    ours = syscalls.from_table(machine)
    theirs = syscalls.from_libseccomp(binding, machine)
    architecture = ARCHITECTURES[machine]
    conditional = {
        syscalls.CALLS[name][list(ARCHITECTURES).index(machine)] for name in syscalls.CONDITIONS
    }
    different = []
    for number in [*NUMBERS, syscalls.X32, syscalls.X32 + 39]:
        cases = [(word,) * 6 for word in WORDS]
        if number in conditional:
            cases += [(*pair, 0, 0, word, 0) for pair in itertools.product(WORDS, WORDS)
                      for word in (0, 1 << 40)]  # fmt: skip
        for arguments in cases:
            both = [decide(code, architecture, number, arguments) for code in (ours, theirs)]
            if both[0] != both[1]:
                different.append((number, arguments, both))
    assert not different
    for code in (ours, theirs):
        other = next(x for x in ARCHITECTURES.values() if x != architecture)
        assert decide(code, other, 0, (0,) * 6) == KILL


def test_numbers_are_those_of_libseccomp() -> None:
    path = ctypes.util.find_library("seccomp")
    if path is None:
        pytest.skip("needs libseccomp")
    resolve = ctypes.CDLL(path).seccomp_syscall_resolve_name_arch
    resolve.argtypes = (ctypes.c_uint32, ctypes.c_char_p)
    for name, numbers in {**syscalls.CALLS, **syscalls.MISSING}.items():
        found = [resolve(value, name.encode()) for value in ARCHITECTURES.values()]
        assert [n if n >= 0 else None for n in found] == list(numbers), name


@pytest.mark.parametrize(
    ("name", "arguments", "decision"),
    [
        ("read", (0,) * 6, ALLOW),
        ("clone", (0x3D0F00, 0, 0, 0, 0, 0), ALLOW),
        ("clone", (0x11, 0, 0, 0, 0, 0), EPERM),
        ("clone", (0x3D0F00 | 0x10000000, 0, 0, 0, 0, 0), EPERM),
        ("clone3", (0,) * 6, ENOSYS),
        ("prlimit64", (0, 7, 0, 0, 0, 0), ALLOW),
        ("prlimit64", (1, 7, 0, 0, 0, 0), EPERM),
        ("fcntl", (3, 8, 1, 0, 0, 0), EPERM),
        ("prctl", (15, 0, 0, 0, 0, 0), ALLOW),
        ("prctl", (1, 9, 0, 0, 0, 0), EPERM),
        ("sendto", (3, 0, 1, 0, 0, 0), ALLOW),
        ("sendto", (3, 0, 1, 0, 1 << 40, 16), EPERM),
    ],
)
def test_two_faced_calls(
    machine: str, name: str, arguments: tuple[int, ...], decision: int
) -> None:
    number = {**syscalls.CALLS, **syscalls.MISSING}[name][list(ARCHITECTURES).index(machine)]
    assert number is not None
    code = syscalls.from_table(machine)
    assert decide(code, ARCHITECTURES[machine], number, arguments) == decision


def test_an_unknown_machine_is_named() -> None:
    with pytest.raises(ValueError, match="no seccomp filter for machine 's390x'; known are x86_64"):
        syscalls.bpf_filter("s390x")


def test_every_condition_belongs_to_a_call() -> None:
    assert set(syscalls.CONDITIONS) <= set(syscalls.CALLS)
