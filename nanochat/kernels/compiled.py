"""What a launch does, read from its compiled form: its work from Triton's IR, its cost from SASS.

    work = read_work(launch, binary.ttir)       loops unrolled by their real trip counts
    count = count_instructions(binary.sass, work)

Triton's IR says exactly how often everything runs: the bounds of its loops are constants and
arguments. It does not say what the compiler made of it: SASS does, but there a loop is a jump
backwards without a count. Both have their loops in the same order, so the counts of the first weigh
the instructions of the second. A loop that the compiler unrolled is missing in SASS: the assignment
is the one whose loads and stores move the bytes that the IR moves. Where none does (a flattened
loop, whose epilogue lies inside the loop over K), instructions are not counted.

Example: norm_rope over ten heads. IR: a loop of 10 trips with two loads of a 16 x 64 tile, over 128
threads: 10 * 2 * 8 bfloat16 a thread, 320 bytes. SASS: one jump backwards, and before it two
LDG.E.128: 32 bytes a trip. Ten trips are 320 bytes: its 280 instructions run 10 times.
"""

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from nanochat.kernels.launch import Launch

BITS = {
    "f64": 64,
    "i64": 64,
    "f32": 32,
    "i32": 32,
    "f16": 16,
    "bf16": 16,
    "i16": 16,
    "i8": 8,
    "i1": 8,
}
# operations of Triton's IR that take one special-function instruction an element
SPECIAL = re.compile(r"math\.(exp2?|log2?|rsqrt|sqrt|sin|cos|tanh|erf)\b|arith\.divf|tt\.precise_")
SPECIAL_ASM = re.compile(r'elementwise_inline_asm "[^"]*\b(rcp|ex2|lg2|rsqrt|sqrt|tanh)\.approx')
INTEGERS: dict[str, Callable[[int, int], int]] = {
    "addi": lambda a, b: a + b,
    "subi": lambda a, b: a - b,
    "muli": lambda a, b: a * b,
    "divsi": lambda a, b: a // b,
    "remsi": lambda a, b: a % b,
    "ceildivsi": lambda a, b: -(-a // b),
    "minsi": min,
    "maxsi": max,
}
UNROLLED = 0.02  # how far the bytes or products of SASS may be from those of the IR


@dataclass(frozen=True)
class Loop:
    """A loop of Triton's IR: how often its body runs for each time that it is entered."""

    trips: int
    depth: int


@dataclass
class Work:
    """What one program does.

    special      elements that a special function is taken of
    tensor_flops floating-point operations of products, by bits of their operands' elements
    moved        bytes asked of memory by loads and stores of tensors, masked elements included
    scalars      bytes of single numbers, which every thread asks for
    loaded       names of the arguments that are read, `stored` of those that are written
    loops        in the order of the text
    """

    special: float = 0
    tensor_flops: dict[int, float] = field(default_factory=dict)
    moved: float = 0
    scalars: float = 0
    loaded: set[str] = field(default_factory=set)
    stored: set[str] = field(default_factory=set)
    loops: list[Loop] = field(default_factory=list)


@dataclass(frozen=True)
class Count:
    """Instructions of one thread: all that are issued, and the special functions among them."""

    issued: float
    special: float


def shape_of(text: str) -> tuple[int, int]:
    """(elements, bits of one) of a type: "tensor<16x64x!tt.ptr<bf16>>", "tensor<8xf32>", "f32"."""
    inner = text.removeprefix("tensor<")
    sizes = re.match(r"((?:\d+x)*)", inner)
    assert sizes is not None
    kind = re.search(r"(bf16|f\d+\w*|i\d+)", inner[sizes.end() :])
    assert kind is not None, text
    elements = math.prod(int(size) for size in sizes[1].split("x") if size)
    return elements, BITS.get(kind[1], 8)  # what is not listed is a float of 8 bits


class _Reader:
    """Walks the lines of a function; `stack` holds how often each region around a line runs."""

    def __init__(self, launch: Launch) -> None:
        named = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))
        self.integers = {k: v for k, v in named.items() if isinstance(v, int)}
        self.definitions: dict[str, tuple[str, list[str]]] = {}
        # which arguments a pointer or a descriptor comes from
        self.roots = {k: {k} for k, v in named.items() if not isinstance(v, int | float | None)}
        self.grid = (*launch.grid, 1, 1)
        self.work = Work()
        self.stack: list[tuple[int, bool]] = []  # (trips, whether it is a loop)

    def value(self, name: str) -> int:
        """An integer, in program 0; KeyError if it depends on data or on a loop."""
        if name in self.integers:
            return self.integers[name]
        operation, operands = self.definitions[name]
        return INTEGERS[operation](*(self.value(each) for each in operands))

    def read(self, line: str) -> None:
        """One line: a region begins or ends, an integer or a pointer is made, work is done."""
        if line.startswith("}"):
            self.stack.pop()
        result, _, text = line.partition(" = ") if line.startswith("%") else ("", "", line)
        result = re.sub(r":\d+$", "", result.removeprefix("%"))
        if line.endswith("{"):
            self.enter(text)
        elif result:
            self.define(result, text)
        self.count(text)

    def enter(self, text: str) -> None:
        """Into a region: a loop runs as often as its bounds say, anything else once."""
        bounds = re.search(r"scf\.for %\w+ = %(\w+) to %(\w+) step %(\w+)", text)
        if bounds is None:
            self.stack.append((1, False))
            return
        start, stop, step = (self.value(each) for each in bounds.groups())
        trips = max(0, -(-(stop - start) // step))
        self.work.loops.append(Loop(trips, sum(is_loop for _, is_loop in self.stack)))
        self.stack.append((trips, True))
        for inner, outer in re.findall(r"%(\w+) = %(\w+)[,)]", text):
            if outer in self.roots:
                self.roots[inner] = self.roots[outer]

    def define(self, result: str, text: str) -> None:
        """Note how an integer came about, and which arguments a pointer comes from."""
        operands = re.findall(r"%(\w+)", text)
        constant = re.match(r"arith\.constant (-?\d+) : i", text)
        operation = re.match(r"arith\.(\w+) ", text)
        if constant or text.startswith("tt.get_program_id"):
            self.integers[result] = int(constant[1]) if constant else 0
        elif text.startswith("tt.get_num_programs"):
            self.integers[result] = self.grid["xyz".index(text.split()[1])]
        elif operation and operation[1] in INTEGERS and "tensor" not in text:
            self.definitions[result] = operation[1], operands
        # of the operands of an addition of offsets only the first is a pointer
        pointers = operands[:1] if text.startswith("tt.addptr") else operands
        found = set().union(*(self.roots.get(each, set()) for each in pointers))
        if found and "ptr" in text and not text.startswith("tt.load"):
            self.roots[result] = found

    def count(self, text: str) -> None:
        """Add what the line does, as often as it runs."""
        work, weight = self.work, math.prod(trips for trips, _ in self.stack)
        types = re.findall(r"tensor<[^>]*>+|\b(?:bf|f|i)\d+\b", text.rpartition(" : ")[2])
        access = re.match(r"tt\.(descriptor_)?(load|store) %(\w+)", text)
        if access:
            elements, bits = shape_of(types[-1])
            if types[-1].startswith("tensor"):
                work.moved += weight * elements * bits / 8
            else:
                work.scalars += weight * bits / 8
            names = work.loaded if access[2] == "load" else work.stored
            names |= self.roots.get(access[3], set())
        elif text.startswith("tt.dot"):
            (m_k, bits), (m_n, _) = shape_of(types[0]), shape_of(types[-1])
            M, K = (int(size) for size in re.findall(r"(\d+)x", types[0])[:2])
            assert m_k == M * K
            flops = work.tensor_flops
            flops[bits] = flops.get(bits, 0) + weight * 2 * m_n * K
        elif SPECIAL.match(text) or SPECIAL_ASM.search(text):
            work.special += weight * shape_of(types[-1])[0]


def read_work(launch: Launch, ttir: str) -> Work:
    """The work of one program of a launch, whose grid and scalar arguments count.

    Raises  KeyError for a loop whose bounds depend on data.
    """
    reader = _Reader(launch)
    inside = False
    for line in ttir.splitlines():
        line = re.sub(r"\s*loc\(.*\)$", "", line).strip()
        if inside and line:
            reader.read(line)
            if not reader.stack:
                break
        elif line.startswith("tt.func public"):
            inside = True
            reader.stack.append((1, False))
    return reader.work


INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?\s*([A-Z][A-Za-z0-9_.]*)\s*([^;]*);")


@dataclass(frozen=True)
class Instruction:
    """One line of SASS."""

    address: int
    name: str
    operands: str

    def global_bytes(self) -> int:
        """Bytes of device memory that a thread reads or writes with it."""
        parts = self.name.split(".")
        if parts[0] not in ("LDG", "STG", "LDGSTS"):
            return 0
        for part in parts:
            if part in ("64", "128"):
                return int(part) // 8
            if re.fullmatch(r"[US]?(8|16)", part):
                return int(part.lstrip("US")) // 8
        return 4

    def product_flops(self) -> int:
        """Floating-point operations of a product, for each warp that takes part in it.

        HGMMA.64x256x16 is one of four warps; HMMA.16816 is 16 x 8 x 16 of one.
        """
        wide = re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", self.name)
        if wide:
            return 2 * math.prod(int(size) for size in wide.groups()) // 4
        narrow = re.match(r"[HQO]MMA\.(16)(8)(\d+)", self.name)
        return 2 * math.prod(int(size) for size in narrow.groups()) if narrow else 0


def instructions(sass: str) -> list[Instruction]:
    """Those of a kernel, without the padding at its end."""
    found = [Instruction(int(m[1], 16), m[3], m[4]) for m in INSTRUCTION.finditer(sass)]
    return [each for each in found if each.name != "NOP"]


def loops_of(code: list[Instruction]) -> list[tuple[int, int]]:
    """(first, last address) of every loop: a jump backwards, but not a wait for a barrier.

    A wait asks again and again: a jump over a few instructions, or, out of line, one back into the
    code right after such a jump.
    """
    found = []
    for before, each in itertools.pairwise(code):
        start = target_of(each)
        if start is None or start >= each.address or target_of(before) == before.address - 16:
            continue
        if each.address - start > 64:
            found.append((start, each.address))
    return sorted(found)


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def target_of(instruction: Instruction) -> int | None:
    """Where a branch goes."""
    target = re.search(r"0x([0-9a-f]+)", instruction.operands)
    return int(target[1], 16) if instruction.name.startswith("BRA") and target else None


def count_instructions(sass: str, work: Work, threads: int) -> Count | None:
    """Instructions that a thread issues in one program, or None where loops cannot be told apart.

    threads  of a program; `work` is that of the whole program.
    """
    code = instructions(sass)
    loops = loops_of(code)
    # What both count alike says which loop is which: the products where there are some, since a
    # pipelined loop loads ahead of itself, and otherwise the bytes.
    flops = sum(work.tensor_flops.values())
    if flops:
        wanted, marks = flops, [each.product_flops() * threads / 32 for each in code]
    else:
        wanted = work.moved / threads + work.scalars
        marks = [each.global_bytes() for each in code]
    for chosen in itertools.combinations(work.loops, len(loops)):
        weights = [
            math.prod(
                loop.trips
                for loop, (first, last) in zip(chosen, loops, strict=True)
                if first <= each.address <= last
            )
            for each in code
        ]
        if math.isclose(_dot(weights, marks), wanted, rel_tol=UNROLLED):
            special = [each.name.startswith("MUFU") for each in code]
            return Count(sum(weights), _dot(weights, special))
    return None
