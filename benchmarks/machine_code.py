"""What the loops of a compiled kernel cost on one Hopper multiprocessor: a model read from nvdisasm's text, no GPU.

Instructions are counted by the pipe that takes them, and a pipe's cycles for one pass of one program follow. Assumed of
one multiprocessor: 4 issue slots a cycle, wgmma 4096 FLOP a cycle in 16 bit and half of it in tf32, 16 lanes for
exponentials and conversions, 64 for integers and comparisons, 128 bytes of shared memory a cycle (operands of wgmma
included), 1.75 GHz. Latency is not modelled: the low estimate lets all pipes overlap, the high one adds up the tensor
pipe and the busiest other one. A ranking of tiles, until a run on a GPU calibrates it.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

__all__ = ["CLOCK", "Code", "Region", "read_code"]

CLOCK = 1.75e9

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@(!?U?P\w+)\s+)?(.*?);")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_BRANCH = re.compile(r"BRA(?:\.\w+)*\s.*?`\((\.L_x_\d+)\)")
_SHAPE = re.compile(r"GMMA\.(\d+)x(\d+)x(\d+)")
_WAITING = re.compile(r"(BAR|WARPSYNC|DEPBAR|LDGDEPBAR|SYNCS|MEMBAR|FENCE|BSSY|BSYNC|NOP|BRA|ERRBAR|CCTL|EXIT|YIELD)$")

# Of an instruction the part of the name before the first dot.
_PIPES = {
    "alu": (
        "BMSK CS2R F2FP FCHK FLO FMNMX FMNMX3 FSEL FSET FSETP HMNMX2 HSET2 HSETP2 I2FP IABS IADD3 IMNMX ISET ISETP LEA "
        "LOP LOP3 P2R PLOP3 POPC PRMT R2P SEL SGXT SHF VIADD VIADDMNMX VIMNMX VIMNMX3"
    ),
    "fma": "FADD FADD2 FFMA FFMA2 FMUL FMUL2 HADD2 HFMA2 HMUL2 IMAD MOV",
    "convert": "F2F F2I FRND I2F",
    "shared": "LDS STS LDSM STSM LDGSTS ATOMS",
    "global": "LDG STG LD ST LDL STL RED ATOMG UTMALDG UTMASTG UBLKCP",
    "mufu": "MUFU",
    "shfl": "SHFL",
}
_PIPE_OF = {name: pipe for pipe, names in _PIPES.items() for name in names.split()}


@dataclass(frozen=True, kw_only=True)
class Region:
    """Instructions of a loop without those of the loops inside it; or those in no loop."""

    depth: int
    """0: in no loop; 1: a loop in none; ..."""
    issued: int
    """By a warp."""
    pipes: dict[str, int]
    """Instructions of a warp, by pipe."""
    cycles: dict[str, float]
    """Of a multiprocessor for one pass of one program, by pipe."""
    flop: float
    """On the tensor pipe, of one pass of one program."""

    @property
    def limit(self) -> str:
        return max(self.cycles, key=lambda pipe: self.cycles[pipe])

    @property
    def tensor_share(self) -> float:
        """Of the busiest pipe's cycles, those in which the tensor pipe works."""
        return self.cycles["tensor"] / max(1.0, *self.cycles.values())


@dataclass(frozen=True, kw_only=True)
class Code:
    straight: Region
    loops: tuple[Region, ...]
    """In the order of their last instruction: inner loops before the one that holds them."""
    products: int
    """wgmma instructions."""
    serialised: bool
    """ptxas makes each wgmma wait for the one before: other instructions define its accumulator in between."""

    @property
    def hot(self) -> Region:
        """The loop with most work on the tensor pipe, or most instructions; without loops, all."""
        return max(self.loops, key=lambda loop: (loop.flop, loop.issued), default=self.straight)


def read_code(sass: str, ptx: str, num_warps: int) -> Code:
    """From what `nvdisasm -c` and Triton print of one kernel."""
    instructions, labels = _parse(sass)
    spans = []
    for last, (_, text) in enumerate(instructions):
        found = _BRANCH.match(text)
        if found and labels.get(found[1], last) < last:  # a jump onto itself ends a kernel
            spans.append((labels[found[1]], last))
    owner = [-1] * len(instructions)  # the innermost loop: written last by the shortest
    for number, (first, last) in sorted(enumerate(spans), key=lambda item: item[1][0] - item[1][1]):
        owner[first : last + 1] = [number] * (last + 1 - first)
    bodies: dict[int, list[tuple[str, str]]] = {number: [] for number in range(-1, len(spans))}
    for number, instruction in zip(owner, instructions, strict=True):
        bodies[number].append(instruction)

    def depth(number: int) -> int:
        first, last = spans[number]
        return sum(a <= first and last <= b for a, b in spans)

    products = sum("GMMA" in text for _, text in instructions)
    arrivals = sum(text.startswith("WARPGROUP.ARRIVE") for _, text in instructions)
    return Code(
        straight=_count(bodies[-1], num_warps, 0),
        loops=tuple(_count(bodies[number], num_warps, depth(number)) for number in range(len(spans))),
        products=products,
        serialised=arrivals >= products > ptx.count("wgmma.commit_group"),
    )


def _parse(sass: str) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """(predicate, text) of each instruction, and where labels point."""
    instructions: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if found := _LABEL.match(line.strip()):
            labels[found[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            instructions.append((found[1] or "", found[2].strip()))
    return instructions, labels


def _pipe(base: str) -> str:
    if base in _PIPE_OF:
        return _PIPE_OF[base]
    if base.endswith("MMA"):
        return "tensor"
    return "wait" if _WAITING.match(base) or base == "WARPGROUP" else "other"


def _bytes(name: str) -> int:
    """That one lane moves."""
    for part, size in ((".128", 16), (".64", 8), (".U16", 2), (".S16", 2), (".U8", 1), (".S8", 1)):
        if part in name:
            return size
    return 4


def _product(name: str, text: str, num_warps: int) -> tuple[float, float, float]:
    """Of one matrix instruction of every warp: cycles of the tensor pipe, bytes of shared memory, FLOP."""
    groups, half = num_warps / 4, "TF32" in name
    if found := _SHAPE.search(name):
        m, n, k = map(int, found.groups())
        itemsize = 4 if half else 2
        from_registers = re.match(r"\S+\s+R\d+, R\d+", text) is not None  # its first operand
        flop = 2.0 * m * n * k * groups
        moved = (n * k + (0 if from_registers else m * k)) * itemsize * groups
        return flop / (2048 if half else 4096), moved, flop
    found = re.search(r"\.(16816|1688|1684)\b", name)
    k = {"16816": 16, "1688": 8, "1684": 4}[found[1]] if found else 16
    flop = 2.0 * 16 * 8 * k * num_warps
    # An mma of before Hopper reaches about 0.62 of its pipe.
    return flop / (0.62 * (2048 if half else 4096)), 0.0, flop


def _count(body: list[tuple[str, str]], num_warps: int, depth: int) -> Region:
    pipes: Counter[str] = Counter()
    tensor = shared = far = flop = 0.0
    for predicate, text in body:
        if predicate == "!PT":
            continue
        name = text.split()[0]
        base = name.split(".")[0]
        pipe = _pipe(base)
        pipes[pipe] += 1
        if pipe == "tensor":
            cycles, moved, work = _product(name, text, num_warps)
            tensor, shared, flop = tensor + cycles, shared + moved / 128, flop + work
        elif base in ("LDSM", "STSM"):
            shared += num_warps * (4 if name.endswith(".4") else 2 if name.endswith(".2") else 1)
        elif pipe == "shared":
            shared += num_warps * 32 * _bytes(name) / 128
        if pipe == "global" or base == "LDGSTS":
            far += num_warps * 32 * _bytes(name)
    quarter = num_warps / 4  # warps of one of the four parts of a multiprocessor
    issued = sum(pipes.values())
    return Region(
        depth=depth,
        issued=issued,
        pipes=dict(pipes.most_common()),
        cycles={
            "issue": quarter * issued,
            "tensor": tensor,
            "exp": quarter * 8 * (pipes["mufu"] + pipes["convert"]),
            "fma": quarter * pipes["fma"],
            "alu": quarter * 2 * pipes["alu"],
            "shared": shared + num_warps * pipes["shfl"],
            "l1": far / 64,
        },
        flop=flop,
    )
