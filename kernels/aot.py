"""Ahead-of-time compilation of the Triton kernels: registers, spills and shared memory, without a GPU.

Each ``triton_*`` module lists what the dispatcher would launch on a chip (``aot_cases``); here it is compiled for that
chip and the machine code is asked what it takes.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lowvram_kernels.chips import SHARED_BYTES
from lowvram_kernels.machine_code import Loop, Pipeline, inner_loop, matrix_opcodes, pipeline


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One launch: ``types`` names each run-time argument's type ("*i8", "i32", "fp32").

    Pointers, and integers ending in ":16", are known to be multiples of 16, as the launcher finds them at real sizes.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int = 3
    fp_fusion: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Usage:
    """What one compiled kernel takes; ``stack_bytes`` holds spilled registers (0: none). Bytes but for registers."""

    name: str
    generation: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    shared_limit: int
    num_warps: int
    matrix_instructions: tuple[str, ...]
    loop: Loop | None
    pipeline: Pipeline

    def fits(self) -> bool:
        return self.stack_bytes == 0 and self.shared_bytes <= self.shared_limit


def cases(generation: int, *, more: bool = False) -> list[Case]:
    """Every launch of every Triton kernel on a chip of this generation; ``more``: also at sizes, numbers of heads and
    types for which the compiler makes another program, and which are seldom met."""
    from lowvram_kernels import (
        triton_attention,
        triton_channel_norm,
        triton_linear,
        triton_linears,
        triton_means,
        triton_norm,
        triton_prepare,
        triton_projected,
        triton_rope,
        triton_rows,
        triton_values,
    )

    modules = (
        *(triton_rows, triton_linear, triton_linears, triton_norm, triton_rope, triton_means, triton_projected),
        *(triton_values, triton_prepare, triton_attention, triton_channel_norm),
    )
    found = [case for module in modules for case in module.aot_cases(generation)]
    if more:
        found += [case for module in modules for case in getattr(module, "more_aot_cases", lambda _: [])(generation)]
    return found


def compile_all(generations: Iterable[int], *, more: bool = False) -> list[Usage]:
    """Every case of every generation, in this order. The compiler lets several threads work at a time."""
    jobs = [(case, generation) for generation in generations for case in cases(generation, more=more)]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda job: compile_case(*job), jobs))


def compile_case(case: Case, generation: int) -> Usage:
    """Compile for one generation and read the resources off the machine code.

    Raises:
        RuntimeError: the machine code does not say what it uses.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in case.constants else case.types[name].split(":")[0] for name in names}
    attrs = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if name in case.types and (case.types[name].startswith("*") or case.types[name].endswith(":16"))
    }
    source = ASTSource(case.kernel, signature, dict(case.constants), attrs)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    options["enable_fp_fusion"] = case.fp_fusion
    compiled = triton.compile(source, target=GPUTarget("cuda", generation, 32), options=options)
    registers, stack, sass = _disassembled(compiled.asm["cubin"], case.name)
    return Usage(
        name=case.name,
        generation=generation,
        registers=registers,
        stack_bytes=stack,
        shared_bytes=compiled.metadata.shared,
        shared_limit=SHARED_BYTES[generation],
        num_warps=case.num_warps,
        matrix_instructions=matrix_opcodes(sass),
        loop=inner_loop(sass),
        pipeline=pipeline(compiled.asm["ttgir"]),
    )


def _disassembled(cubin: bytes, name: str) -> tuple[int, int, str]:
    """Registers, bytes of stack and local memory, and SASS, by the tools that Triton brings."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin", delete=False) as file:
        file.write(cubin)
    try:
        text = _output(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
        sass = _output(knobs.nvidia.nvdisasm.path, "--print-code", file.name)
    finally:
        os.unlink(file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"{name}: cuobjdump named no registers: {text.strip()!r}")
    return int(found[1]), int(found[2]) + int(found[3]), sass


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
