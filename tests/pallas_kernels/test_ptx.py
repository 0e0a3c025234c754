"""Kernels that speak PTX themselves, compiled for Hopper and run without a GPU; and that machine's own arithmetic."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.pallas_kernels.ptx import Fault, launch

pytest.importorskip("triton")


def test_kernels_of_our_own_instructions() -> None:
    """Codes in bulk and by loads, more tiles than the ring has stages; keys and values in 8 bits by single warps."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.pallas_kernels.ptx.kernels"],
        env=environment | {"TRITON_DEFAULT_FP_FUSION": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def run(body: str, result: np.ndarray, threads: int = 64) -> np.ndarray:
    """What `body` leaves in %r0, of each thread."""
    launch(
        f""".visible .entry k(.param .u64 k_param_0) .reqntid {threads} {{
        .reg .b32 %r<9>; .reg .b64 %rd<4>; .reg .pred %p<3>;
        mov.u32 %r8, %tid.x;
        {body}
        ld.param.b64 %rd0, [k_param_0]; mad.wide.u32 %rd1, %r8, 4, %rd0; st.global.b32 [%rd1], %r0; ret; }}""",
        [result],
        (1,),
    )
    return result


def test_lanes_that_part_meet_again() -> None:
    body = """and.b32 %r1, %r8, 1; setp.eq.b32 %p0, %r1, 0; mov.b32 %r0, 7; @%p0 bra even;
        add.s32 %r0, %r0, 10; bra.uni both; even: shl.b32 %r0, %r0, 4; both: bar.warp.sync 0xffffffff;
        { .reg .b32 %r0; mov.b32 %r0, 5; }"""
    np.testing.assert_array_equal(run(body, np.zeros(64, np.uint32)), np.tile([7 << 4, 17], 32))


def test_arithmetic_of_bits() -> None:
    body = "prmt.b32 %r1, 0x44332211, %r8, 0x7045; lop3.b32 %r2, %r1, 0x00FFFF00, %r8, 0xCA; bfe.u32 %r0, %r2, 8, 16;"
    tid = np.arange(64, dtype=np.uint32)
    picked = tid << 8 | 0x11 << 16  # bytes 5, 4, 0 and 7 of the two words, from the lowest
    chosen = (picked & 0x00FFFF00) | (~picked & tid)
    np.testing.assert_array_equal(run(body, np.zeros(64, np.uint32)), chosen >> 8 & 0xFFFF)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("add.s32 %r0, %r1, 1;", "%r1 is read before it is written"),
        ("mov.b32 %r1, 1020; ld.shared.b32 %r0, [%r1];", "shared addresses from 1020"),
        ("mov.b32 %r1, 1026; ld.shared.b32 %r0, [%r1];", "shared addresses from 1026"),
        ("setp.lt.u32 %p0, %r8, 5; @%p0 bar.sync 0; mov.b32 %r0, 0;", "not all lanes of a warp take part"),
        (
            "mov.u32 %r1, room; mbarrier.init.shared::cta.b64 [%r1], 2; wait: "
            "mbarrier.try_wait.parity.shared::cta.b64 %p0, [%r1], 0; @!%p0 bra wait;",
            "all warps wait",
        ),
    ],
)
def test_faults(body: str, told: str) -> None:
    with pytest.raises(Fault, match=told):
        run(".shared .align 16 .b8 room[64]; " + body, np.zeros(64, np.uint32))


def test_memory_past_an_array() -> None:
    with pytest.raises(Fault, match="global addresses from 128 to 252 of 248"):
        run("mov.b32 %r0, 0;", np.zeros(62, np.uint32))
