"""The product with a few rows: the public function, its gradient, what it refuses, and its decoder's tables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.nf4 import NF4Slice, dequantize_nf4, nf4_matvec, quantize_nf4
from pallas_kernels.nf4.matvec import Tiles


def draw(shape: tuple[int, ...], seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (20,)])
def test_both_passes(lead: tuple[int, ...]):
    q = quantize_nf4(draw((96, 192)))
    w = np.asarray(dequantize_nf4(q, jnp.float32), np.float64)
    x, g = draw((*lead, 192), 1), draw((*lead, 96), 2)
    y, pullback = jax.vjp(lambda x: nf4_matvec(x, q), x)
    np.testing.assert_allclose(y, np.asarray(x, np.float64) @ w.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(pullback(g)[0], np.asarray(g, np.float64) @ w, rtol=1e-5, atol=1e-5)


def test_one_of_a_stack():
    stack, x = quantize_nf4(draw((3, 8, 64))), draw((2, 64), 1)
    y = jax.jit(lambda x, i: nf4_matvec(x, NF4Slice(stack, i)))(x, jnp.int32(1))
    expected = nf4_matvec(x, jax.tree.map(lambda leaf: leaf[1], stack))
    np.testing.assert_allclose(y, expected, rtol=1e-6)


def test_refusals():
    q = quantize_nf4(draw((96, 192)))
    with pytest.raises(ValueError, match="17"):
        nf4_matvec(jnp.zeros((17, 192)), q, implementation="triton")
    with pytest.raises(ValueError, match="multiple of 64"):
        nf4_matvec(jnp.zeros(34), quantize_nf4(draw((4, 34))), implementation="triton")
    with pytest.raises(ValueError, match=r"x.shape=\(2, 64\)"):
        nf4_matvec(jnp.zeros((2, 64)), q)
    with pytest.raises(ValueError, match="stack"):
        nf4_matvec(jnp.zeros((2, 64)), quantize_nf4(draw((3, 8, 64))))
    with pytest.raises(TypeError, match="int32"):
        nf4_matvec(jnp.zeros((2, 192), jnp.int32), q)
    with pytest.raises(ValueError, match="outputs is 3"):
        Tiles(outputs=3, blocks=16)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_decoder_on_every_code(dtype: str):
    """Its PTX, executed here instruction by instruction."""
    kernels = pytest.importorskip("pallas_kernels.nf4.lane_kernels")
    text = {"bfloat16": kernels.DECODE_BF16, "float16": kernels.DECODE_F16}[dtype].value
    levels = kernels.NF4_LEVELS.astype(jnp.dtype(dtype)).view(np.uint16)
    for word in (0x76543210, 0xFEDCBA98, 0x08192A3B, 0xF0E1D2C3):
        codes = [word >> shift & 15 for shift in range(0, 32, 4)]
        low, high = codes[::2], codes[1::2]
        registers = execute(text, word)
        for names, expected in ((("$0", "$1"), low), (("$2", "$3"), high)):
            got = [registers[name] >> shift & 0xFFFF for name in names for shift in (0, 16)]
            assert got == [int(levels[code]) for code in expected]


def execute(ptx: str, word: int) -> dict[str, int]:
    """The few integer instructions that the decoder uses."""
    registers = {"$4": word}
    for line in ptx.strip("{} \n").splitlines():
        if not (line := line.strip().rstrip(";")) or line.startswith("."):
            continue
        name, _, operands = line.partition(" ")
        target, *sources = (operand.strip() for operand in operands.split(","))
        values = [registers[s] if s in registers else int(s, 0) for s in sources]
        registers[target] = INSTRUCTIONS[name](*values) & 0xFFFFFFFF
    return registers


def _prmt(a: int, b: int, selectors: int) -> int:
    pool = (a | b << 32).to_bytes(8, "little")
    picked = [selectors >> shift & 15 for shift in (0, 4, 8, 12)]
    return sum((pool[s & 7] if s < 8 else 255 * (pool[s & 7] >> 7)) << 8 * i for i, s in enumerate(picked))


INSTRUCTIONS = {
    "and.b32": lambda a, b: a & b,
    "shr.b32": lambda a, b: a >> b,
    "prmt.b32": _prmt,
    "lop3.b32": lambda a, b, c, table: (a & b) | (~a & c) if table == 0xCA else 1 // 0,
}
