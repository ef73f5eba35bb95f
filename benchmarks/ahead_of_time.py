"""Compile kernels for GPUs that are not here, exactly as their launchers would, and read what came out.

`record` runs a family's own launch code on meta tensors with Triton's driver replaced by one that names a chip: every
launch is specialised and compiled as on that chip, and none is executed. What is reported is read from the machine
code (cuobjdump and nvdisasm ship inside the triton wheel; AMD's assembly carries its own summary).
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from machine_code import Code, read_code
from medformer_kernels._dispatch import Chip, assume_chip

__all__ = ["TARGETS", "Compiled", "Target", "record"]

_TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"


@dataclass(frozen=True, kw_only=True)
class Target:
    """A chip to compile for and the limits that decide occupancy."""

    chip: Chip
    gpu: GPUTarget
    name: str
    shared_limit: int
    """Bytes of shared memory one program may use."""
    shared_unit: int
    """Bytes of shared memory of a multiprocessor."""
    registers_unit: int
    """32-bit registers of a multiprocessor."""
    warps_unit: int


TARGETS = {
    target.chip.arch: target
    for target in (
        Target(
            chip=Chip(arch="sm_80", units=108), gpu=GPUTarget("cuda", 80, 32), name="A100",
            shared_limit=163 << 10, shared_unit=164 << 10, registers_unit=65536, warps_unit=64,
        ),
        Target(
            chip=Chip(arch="sm_90", units=132), gpu=GPUTarget("cuda", 90, 32), name="H100, H200",
            shared_limit=227 << 10, shared_unit=228 << 10, registers_unit=65536, warps_unit=64,
        ),
        Target(
            chip=Chip(arch="sm_100", units=148), gpu=GPUTarget("cuda", 100, 32), name="B200",
            shared_limit=227 << 10, shared_unit=228 << 10, registers_unit=65536, warps_unit=64,
        ),
        Target(
            chip=Chip(arch="gfx942", units=304), gpu=GPUTarget("hip", "gfx942", 64), name="MI300X",
            shared_limit=64 << 10, shared_unit=64 << 10, registers_unit=4 * 512 * 64, warps_unit=32,
        ),
    )
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """One kernel of one launch, compiled."""

    kernel: str
    arch: str
    programs: int
    num_warps: int
    num_stages: int
    tiles: dict[str, Any]
    """The constexpr arguments."""
    registers: int
    """Per thread."""
    spills: int
    """Spilled registers (AMD) or load/store instructions to local memory plus stack bytes (NVIDIA)."""
    shared: int
    """Bytes a program."""
    matrix: str
    """'wgmma', 'tcgen05', 'mma', 'mfma' or 'none': the newest matrix instruction that came out."""
    multiplies: bool
    """The kernel holds a matrix product (tl.dot) as written."""
    assembly: str = field(repr=False)
    """PTX, or AMD's assembly."""
    code: Code = field(repr=False)
    """Its loops, as the model of one Hopper multiprocessor counts them; empty on AMD."""

    @property
    def fits(self) -> bool:
        """No spills, no products that wait for each other, within shared memory."""
        held = self.shared <= TARGETS[self.arch].shared_limit
        return self.spills == 0 and held and not self.code.serialised

    @property
    def occupancy(self) -> int:
        """Programs that a multiprocessor holds at once."""
        target = TARGETS[self.arch]
        per_warp = -(-self.registers * target.gpu.warp_size // 256) * 256
        by_registers = target.registers_unit // max(1, per_warp * self.num_warps)
        by_shared = target.shared_unit // max(1, self.shared + 1024)
        return min(by_registers, by_shared, target.warps_unit // self.num_warps)


class _Driver:
    """Just enough of a Triton driver to compile: it names the chip and never launches."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def get_current_device(self) -> str:
        return self.target.chip.arch

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target.gpu


def record(arch: str, launch: Callable[[], Any], only: str | None = None) -> list[Compiled]:
    """Run `launch` on meta tensors and return every kernel (or `only` that one) it would have started on `arch`.

    Raises:
        RuntimeError: kernels were imported under TRITON_INTERPRET=1 (the interpreter has nothing to compile).
    """
    target = TARGETS[arch]
    compiled: list[Compiled] = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        if only not in (None, self.__name__):
            return
        kernel: Any = run(self, *args, grid=grid, warmup=True, **kwargs)
        names = {param.name for param in self.params}
        constants = {key: value for key, value in kwargs.items() if key in names}
        if (meta := constants.pop("META", None)) is not None:
            constants |= {key: value.value for key, value in meta._asdict().items()}
        compiled.append(
            Compiled(
                kernel=self.__name__,
                arch=arch,
                programs=math.prod(grid),
                num_warps=kernel.metadata.num_warps,
                num_stages=kernel.metadata.num_stages,
                multiplies="tt.dot" in kernel.asm["ttir"],
                assembly=kernel.asm["amdgcn" if target.gpu.backend == "hip" else "ptx"],
                tiles=constants,
                **(_read_amd(kernel) if target.gpu.backend == "hip" else _read_nvidia(kernel)),
            )
        )

    JITFunction.run = compile_only
    driver.set_active(cast(Any, _Driver(target)))
    try:
        with assume_chip(target.chip):
            launch()
    finally:
        JITFunction.run = run
        if torch.cuda.is_available():
            driver.reset_active()
    if not compiled:
        raise RuntimeError("no kernel was compiled: unset TRITON_INTERPRET before the kernels are imported")
    return compiled


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def _read_nvidia(kernel) -> dict[str, Any]:
    ptx = kernel.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = _tool("nvdisasm", "-c", file.name)

    def used(what: str) -> int:
        return max(int(number) for number in re.findall(rf"\b{what}:(\d+)", usage))

    matrix = "none"
    for instruction, name in (("HMMA", "mma"), ("HGMMA", "wgmma"), ("UTC[A-Z]*MMA", "tcgen05")):
        if re.search(rf"\b{instruction}\b", sass):
            matrix = name
    return {
        "registers": used("REG"),
        "spills": used("STACK") + used("LOCAL") + len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "shared": kernel.metadata.shared,
        "matrix": matrix,
        "code": read_code(sass, ptx, kernel.metadata.num_warps),
    }


def _read_amd(kernel) -> dict[str, Any]:
    assembly = kernel.asm["amdgcn"]

    def field(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s*(\d+)", assembly)[-1])

    return {
        "registers": field("vgpr_count"),
        "spills": field("vgpr_spill_count") + field("sgpr_spill_count"),
        "shared": kernel.metadata.shared,
        "matrix": "mfma" if "v_mfma" in assembly else "none",
        "code": read_code("", "", kernel.metadata.num_warps),
    }
