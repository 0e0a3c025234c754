"""The programs of a launch: their warps, what these share, and whose turn it is."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np

from tests.pallas_kernels.ptx.code import RESERVED, Code, Statement

LANES = 32
TYPES = {
    **dict.fromkeys(("b8", "u8"), np.uint8),
    **dict.fromkeys(("b16", "u16"), np.uint16),
    **dict.fromkeys(("b32", "u32", "f16x2", "e4m3x2"), np.uint32),
    **dict.fromkeys(("b64", "u64"), np.uint64),
    "s16": np.int16,
    "s32": np.int32,
    "s64": np.int64,
    "f16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "f32": np.float32,
    "pred": np.bool_,
}
SHARED = 232448  # bytes that a program can have on Hopper
ARRAY = 40  # bits of an address within an array
Operation = Callable[["Warp", Statement, np.ndarray], None]  # for the lanes that are active


class Fault(Exception):
    """What a GPU would not survive, or would answer with garbage."""


@dataclass
class Barrier:
    count: int
    phase: int = 0
    arrived: int = 0
    bytes: int = 0

    def settle(self) -> None:
        if self.arrived == self.count and not self.bytes:
            self.phase, self.arrived = self.phase + 1, 0


@dataclass
class Program:
    """What the warps of a program share."""

    code: Code
    operations: Mapping[str, Operation]
    arrays: Sequence[np.ndarray]  # of bytes
    index: tuple[int, int, int]
    chance: np.random.Generator
    barriers: dict[int, Barrier] = field(default_factory=dict)
    copies: list[Callable[[], None]] = field(default_factory=list)  # on their way

    def __post_init__(self) -> None:
        self.limit = self.code.end + self.code.dynamic
        if self.limit - RESERVED > SHARED:
            raise Fault(f"{self.limit - RESERVED} bytes of shared memory")
        self.shared = np.full(self.limit, 255, np.uint8)
        self.warps = [Warp(self, i) for i in range(self.code.threads // LANES)]

    def run(self) -> None:
        before = None
        while running := [warp for warp in self.warps if not warp.ended]:
            stuck, before = before == (now := self._state(running)), now
            stuck = stuck and all(warp.waiting for warp in running)
            if stuck and not self.copies:
                raise Fault(f"all warps wait: {running[0].statement().text}")
            for i in self.chance.permutation(len(running)):
                running[i].go_on(self.chance.integers(1, 2000))
                self.chance.shuffle(self.copies)
                for _ in range(max(stuck, self.chance.integers(len(self.copies) + 1) - 1)):
                    self.copies.pop()()
                stuck = False
            if all(warp.waiting == "program" for warp in running):
                for warp in running:
                    warp.waiting = None

    def _state(self, running: list["Warp"]) -> tuple:
        known = [(each.phase, each.arrived, each.bytes) for each in self.barriers.values()]
        return [(int(warp.at.min()), warp.waiting) for warp in running], known, len(self.copies)

    def places(
        self, space: str, addresses: np.ndarray, size: int, text: str, align: int | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Of each array that addresses are in: its bytes, which of the addresses those are, and where in it they point."""
        owners = (
            np.zeros(len(addresses), np.int64) if space == "shared" else (addresses >> np.uint64(ARRAY)).astype(int)
        )
        for owner in np.unique(owners):
            if space != "shared" and not 1 <= owner <= len(self.arrays):
                raise Fault(f"no array is there: {text}")
            memory = self.shared if space == "shared" else self.arrays[owner - 1]
            which = np.flatnonzero(owners == owner)
            at = (addresses[which] & np.uint64((1 << ARRAY) - 1)).astype(np.int64)
            low = RESERVED if space == "shared" else 0
            if (at % (align or size)).any() or at.min() < low or at.max() > len(memory) - size:
                raise Fault(
                    f"{space} addresses from {at.min()} to {at.max()} of {len(memory)}, {size} bytes each: {text}"
                )
            yield memory, which, at


class Warp:
    def __init__(self, program: Program, index: int) -> None:
        self.program, self.index = program, index
        self.lanes = np.arange(LANES, dtype=np.uint32)
        self.registers: dict[str, np.ndarray] = {}
        self.at = np.zeros(LANES, np.int64)  # each lane's next statement
        self.waiting: str | None = None  # for a barrier of the "program", or for one in "memory"

    @property
    def ended(self) -> bool:
        return bool((self.at >= len(self.program.code.statements)).all())

    def statement(self) -> Statement:
        return self.program.code.statements[self.at.min()]

    def go_on(self, most: int) -> None:
        """So many statements, or until there is something to wait for."""
        self.waiting = None if self.waiting == "memory" else self.waiting
        for _ in range(most):
            if self.waiting is not None or self.ended:
                break
            here = int(self.at.min())
            statement = self.program.code.statements[here]
            active = self.at == here
            self.at[active] = here + 1
            if statement.guard:
                active = active & (self.bits(statement.guard[0]).astype(np.bool_) != statement.guard[1])
            if active.any():
                self.program.operations[statement.operation](self, statement, active)

    def bits(self, operand: str) -> np.ndarray:
        """As 64 bits a lane."""
        if (found := self.registers.get(operand)) is not None:
            return found
        code = self.program.code
        if operand == "%tid.x":
            value = self.lanes + self.index * LANES
        elif operand.startswith("%ctaid."):
            value = self.program.index["xyz".index(operand[-1])]
        elif operand.startswith("0f"):
            value = int(operand[2:], 16)
        elif operand in code.symbols:
            value = code.symbols[operand]
        elif re.fullmatch(r"-?(0x)?[0-9A-Fa-f]+", operand):
            value = int(operand, 0) & (2**64 - 1)
        else:
            raise Fault(f"{operand} is read before it is written")
        return np.broadcast_to(np.asarray(value, np.uint64), (LANES,))

    def get(self, operand: str, kind: str) -> np.ndarray:
        if kind == "pred":
            return self.bits(operand).astype(np.bool_)
        dtype = np.dtype(TYPES[kind])
        return self.bits(operand).astype(f"u{dtype.itemsize}").view(dtype)

    def set(self, operand: str, value: np.ndarray, active: np.ndarray) -> None:
        if operand == "_":
            return
        value = np.asarray(value)
        wide = (
            value.astype(np.uint64) if value.dtype == np.bool_ else value.view(f"u{value.itemsize}").astype(np.uint64)
        )
        if not active.all():
            wide = np.where(active, wide, self.registers.get(operand, np.zeros(LANES, np.uint64)))
        self.registers[operand] = wide

    def addresses(self, operand: str) -> np.ndarray:
        base, _, offset = operand.strip("[] ").partition("+")
        return self.bits(base.strip()) + np.uint64(int(offset or "0", 0) & (2**64 - 1))

    def needs_all(self, statement: Statement, active: np.ndarray) -> None:
        if not active.all():
            raise Fault(f"not all lanes of a warp take part: {statement.text}")
