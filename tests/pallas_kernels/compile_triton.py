"""Compiles Triton kernels to machine code for GPUs this machine need not have: python compile_triton.py MODULE ...

Each module offers compile_cases(): (kernel, signature by argument name, constants by name, launch options) per case; an
option `oldest` names the first architecture that has the instructions.
A process of its own, because the tests' process has Triton in interpreter mode.
"""

import importlib
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (80, 89, 90)


def compile_case(kernel: Any, signature: dict[str, str], constants: dict[str, Any], options: dict[str, int]) -> None:
    """signature: "*bf16" and the like for each array, which begins at a multiple of 16 bytes, as jax's do; a constant's entry
    is added."""
    full = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    place = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    constexprs = {place[name]: value for name, value in constants.items()}
    aligned = {place[name]: [["tt.divisibility", 16]] for name, kind in full.items() if kind.startswith("*")}
    source = ASTSource(fn=kernel, signature=full, constexprs=constexprs, attrs=aligned)
    options = dict(options)
    oldest = options.pop("oldest", ARCHITECTURES[0])
    for architecture in (each for each in ARCHITECTURES if each >= oldest):
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
        assert compiled.asm["cubin"]
        check_lanes(compiled.asm["ttgir"])
        if re.search(r"wgmma\.mma_async.*\}, \{", compiled.asm["ptx"]):  # by a left operand in registers
            check_left_operands(disassembled(compiled.asm["cubin"]))


def check_lanes(ttgir: str) -> None:
    """Tensor cores addressed by PTX take each lane's part from that lane: element i has to be in thread i."""
    layouts = dict(re.findall(r"^(#\w+) = #ttg\.blocked<\{(.*)\}>", ttgir, re.MULTILINE))
    for line in re.findall(r".*mma\.sync.*", ttgir):
        shapes = set(re.findall(r"tensor<(\w+)x\w\d+, (#\w+)>", line))
        assert len(shapes) == 1, line
        (count, layout), *_ = shapes
        expected = f"sizePerThread = [1], threadsPerWarp = [32], warpsPerCTA = [{int(count) // 32}], order = [0]"
        assert layouts[layout] == expected, (line, layouts[layout])


def disassembled(cubin: bytes) -> list[str]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run([tool, "-c", path], capture_output=True, text=True, check=True).stdout.splitlines()


def check_left_operands(lines: list[str]) -> None:
    """Hopper's tensor cores read registers while what comes next runs: nothing may write them before a wait for that.

    ptxas does not see to it where a loop's next step begins before a wait.
    """
    labels = {line.split(":")[0]: i for i, line in enumerate(lines) if line.startswith(".L")}
    for end, line in enumerate(lines):
        branch = re.search(r"BRA `\((\.L\w+)\)", line)
        if branch and labels[branch[1]] < end:
            groups: list[set[int]] = [set()]
            for each in lines[labels[branch[1]] : end] * 2:
                groups = being_read(each, groups)


def being_read(line: str, groups: list[set[int]]) -> list[set[int]]:
    """The left operands' registers that are read after an instruction, by group of products; the last is still open."""
    instruction = re.sub(r"/\*.*?\*/|@!?U?P\w+", "", line).strip()
    wait = re.match(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\w+)", instruction)
    if wait:
        return groups[-1 - int(wait[1], 16) :]
    result = re.match(r"(\S+) (?:U?P\w, )?R(\d+)", instruction)
    if result:
        written = {int(result[2]) + i for i in range(width(result[1]))}
        assert not written & set().union(*groups), f"overwritten while products read it: {instruction}"
    product = re.match(r"HGMMA\S* R\w+, R(\d+), gdesc", instruction)
    if product:
        groups[-1] |= {int(product[1]) + i for i in range(4)}
    return [*groups, set()] if "gsb0" in instruction else groups


def width(operation: str) -> int:
    """How many registers an operation writes."""
    product = re.match(r"HGMMA\.64x(\d+)x", operation)
    if product:
        return int(product[1]) // 2
    if operation.startswith("HMMA") or operation.endswith((".128", ".M88.4", ".MT88.4")):
        return 4
    return 2 if re.search(r"\.64|WIDE|CS2R|88\.2", operation) else 1


def main() -> None:
    for name in sys.argv[1:]:
        for case in importlib.import_module(name).compile_cases():
            compile_case(*case)
            print(name, case[0].__name__, "ok", flush=True)


if __name__ == "__main__":
    main()
