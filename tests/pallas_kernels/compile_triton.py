"""Compiles Triton kernels to machine code for GPUs this machine need not have: python compile_triton.py MODULE ...

Each module offers compile_cases(): (kernel, signature by argument name, constants by name, launch options) per case; an
option `oldest` names the first architecture that has the instructions.
A process of its own, because the tests' process has Triton in interpreter mode.
"""

import importlib
import re
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (80, 89, 90)


def compile_case(kernel: Any, signature: dict[str, str], constants: dict[str, Any], options: dict[str, int]) -> None:
    """signature: "*bf16" and the like for each array; a constant's entry is added."""
    full = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    source = ASTSource(
        fn=kernel, signature=full, constexprs={(kernel.arg_names.index(k),): v for k, v in constants.items()}
    )
    options = dict(options)
    oldest = options.pop("oldest", ARCHITECTURES[0])
    for architecture in (each for each in ARCHITECTURES if each >= oldest):
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
        assert compiled.asm["cubin"]
        check_lanes(compiled.asm["ttgir"])


def check_lanes(ttgir: str) -> None:
    """Tensor cores addressed by PTX take each lane's part from that lane: element i has to be in thread i."""
    layouts = dict(re.findall(r"^(#\w+) = #ttg\.blocked<\{(.*)\}>", ttgir, re.MULTILINE))
    for line in re.findall(r".*mma\.sync.*", ttgir):
        shapes = set(re.findall(r"tensor<(\w+)x\w\d+, (#\w+)>", line))
        assert len(shapes) == 1, line
        (count, layout), *_ = shapes
        expected = f"sizePerThread = [1], threadsPerWarp = [32], warpsPerCTA = [{int(count) // 32}], order = [0]"
        assert layouts[layout] == expected, (line, layouts[layout])


def main() -> None:
    for name in sys.argv[1:]:
        for case in importlib.import_module(name).compile_cases():
            compile_case(*case)
            print(name, case[0].__name__, "ok", flush=True)


if __name__ == "__main__":
    main()
