"""Compiles Triton kernels to machine code for GPUs this machine need not have: python compile_triton.py MODULE ...

Each module offers compile_cases(): (kernel, signature by argument name, constants by name, launch options) per case; an
option `oldest` names the first architecture that has the instructions.
A process of its own, because the tests' process has Triton in interpreter mode.
"""

import importlib
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


def main() -> None:
    for name in sys.argv[1:]:
        for case in importlib.import_module(name).compile_cases():
            compile_case(*case)
            print(name, case[0].__name__, "ok", flush=True)


if __name__ == "__main__":
    main()
