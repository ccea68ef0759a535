"""Compile kernels for a GPU that is not here, by launching them: `with Target(90) as target: launcher(...)`.

Every kernel launched inside is compiled exactly as it would be there (types, alignments, configuration) and not run;
`target.kernels` lists them with their registers, spills and shared memory. Tensors may be on the CPU or on "meta".
Not under TRITON_INTERPRET=1, which decides at import what a kernel is: the tests run this in a process of its own.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tp_attention.kernels import configs

SHARED_MEMORY = {80: 166_912, 90: 232_448}  # bytes a block may have (CUDA's limits for these architectures)
MULTIPROCESSORS = {80: 108, 90: 132}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one launch. spills: bytes of local memory a thread uses."""

    name: str
    options: str
    registers: int
    spills: int
    shared: int
    ptx: str
    kernel: Any

    @property
    def wgmma(self) -> bool:
        return "wgmma.mma_async" in self.ptx

    @property
    def tma(self) -> bool:
        return "cp.async.bulk.tensor" in self.ptx

    @property
    def setmaxnreg(self) -> bool:
        return "setmaxnreg" in self.ptx

    @property
    def polls(self) -> bool:
        return "ld.volatile.global.v4" in self.ptx

    @property
    def cluster(self) -> bool:
        return "mapa.shared::cluster" in self.ptx and "vote.sync" in self.ptx

    def fixed_bounds(self) -> list[str]:
        """Loops within a loop whose upper bound is made outside of both, or a constant."""
        found, outer = [], []
        lines = self.kernel.asm["ttgir"].splitlines()
        made = {m[1]: n for n, line in enumerate(lines) if (m := re.match(r"\s*(%[\w]+)(?::\d+)? =", line))}
        for n, line in enumerate(lines):
            indent = len(line) - len(line.lstrip())
            outer = [(i, m) for i, m in outer if i < indent or line.lstrip().startswith("}")]
            if match := re.search(r"scf\.for %\w+ = \S+ to (%\w+)(?:#\d+)? step", line):
                if outer and made.get(match[1], 0) < outer[-1][1]:
                    found.append(line.strip()[:100])
                outer.append((indent, n))
            if re.match(r"\s*(default|partition\d+)", line):
                outer = []
        return found

    def sass(self) -> str:
        with _cubin(self.kernel) as path:
            return subprocess.run([CUOBJDUMP, "-sass", path], capture_output=True, text=True, check=True).stdout


class Target:
    """A GPU of this architecture as far as Triton and the kernels' launchers can tell."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture
        self.kernels: list[Compiled] = []
        self._seen: set[int] = set()

    # What triton asks of a driver before it compiles.
    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def __enter__(self) -> Target:
        self._saved = JITFunction.run, configs.architecture, configs.multiprocessors
        compile_only = self._saved[0]

        def run(function: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            kernel = compile_only(function, *args, grid=grid, warmup=True, **options)
            if id(kernel) not in self._seen:
                self._seen.add(id(kernel))
                self.kernels.append(_inspect(kernel))
            return kernel

        JITFunction.run = run
        configs.architecture = lambda device: self.architecture
        configs.multiprocessors = lambda device: MULTIPROCESSORS[self.architecture]
        driver.set_active(self)
        return self

    def __exit__(self, *failure: object) -> None:
        JITFunction.run, configs.architecture, configs.multiprocessors = self._saved
        driver._active = None  # reset_active() would ask for a GPU


@contextlib.contextmanager
def _cubin(kernel: Any) -> Iterator[str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        yield file.name


def _inspect(kernel: Any) -> Compiled:
    with _cubin(kernel) as path:
        usage = subprocess.run([CUOBJDUMP, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    meta = kernel.metadata
    return Compiled(
        name=meta.name,
        options=f"warps {meta.num_warps}, stages {meta.num_stages}",
        registers=found["REG"],
        spills=found["STACK"] + found["LOCAL"],
        shared=meta.shared,
        ptx=kernel.asm["ptx"],
        kernel=kernel,
    )


def report(target: Target) -> str:
    """One line per kernel, for people tuning them."""
    return "\n".join(
        f"sm_{target.architecture} {k.name} ({k.options}): {k.registers} registers, "
        f"{k.spills} B spilled, {k.shared} B shared, "
        f"{'wgmma' if k.wgmma else 'no wgmma'}, {'TMA' if k.tma else 'no TMA'}"
        for k in target.kernels
    )
