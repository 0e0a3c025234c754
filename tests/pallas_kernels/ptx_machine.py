"""A multiprocessor in numpy: runs a kernel's PTX, so that what a kernel says in PTX of its own is tested without a GPU.

A warp is 32 lanes that run together; lanes of a warp that part at a branch go on from the lowest statement and meet again.
Warps are run in turns of any length, in an order drawn anew, and a bulk copy arrives some time after it was asked for: what a
program forgets to wait for comes out wrong, or as an error. So does an access that is outside an array or shared memory,
or not aligned. What memory holds before it is written is no number (all bits set).

Only what our kernels' PTX uses is there.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import ml_dtypes
import numpy as np

from pallas_kernels.triton_call import ROOM

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
RESERVED = 1024  # bytes of shared memory before a program's own
SHARED = 232448  # bytes that a program can have on Hopper
ARRAY = 40  # bits of an address within an array


class Fault(Exception):
    """What a GPU would not survive, or would answer with garbage."""


@dataclass
class Statement:
    guard: tuple[str, bool] | None  # a predicate, and whether it is negated
    name: str
    operands: list[str]
    text: str
    run: Callable[["Warp", "Statement", np.ndarray], None] | None = None


class Code:
    """Statements in order, and where labels are. Names of an inner scope get its number."""

    def __init__(self, ptx: str) -> None:
        self.statements: list[Statement] = []
        self.labels: dict[str, int] = {}
        self.symbols: dict[str, int] = {}
        self.parameters: list[str] = re.findall(r"\.param \.\w+ (?:\.ptr [^,)]*?)?(\w+_param_\d+)", ptx)
        self.threads = int(re.search(r"\.reqntid (\d+)", ptx)[1])
        self.dynamic = int(found[1]) if (found := ROOM.search(ptx)) else 0
        self.end = RESERVED
        body = re.sub(r"//.*|\.loc\s.*", "", ptx[ptx.index(".reqntid") :])
        self._read(body[body.index("{") :])

    def _read(self, text: str) -> None:
        scopes: list[tuple[str, set[str]]] = []
        position, opened = 0, 0
        while position < len(text):
            rest = text[position:].lstrip()
            position = len(text) - len(rest)
            if not rest:
                break
            if rest[0] == "{":
                inner = re.findall(r"(?<!:)\b([A-Za-z]\w*):(?!:)", rest[: closing(rest)])
                scopes.append((f"@{opened}" if scopes else "", set(inner)))
                opened, position = opened + 1, position + 1
            elif rest[0] == "}":
                scopes.pop()
                position += 1
                if not scopes:
                    break
            elif label := re.match(r"([$\w]+):", rest):
                self.labels[self._renamed(label[1], scopes)] = len(self.statements)
                position += label.end()
            else:
                statement = rest[: rest.index(";")]
                position += len(statement) + 1
                self._take(statement.strip(), scopes)

    def _take(self, text: str, scopes: list[tuple[str, set[str]]]) -> None:
        if text.startswith(".reg"):
            for name, count in re.findall(r"(?<!\.)(?<!\w)([\w%]+)(?:<(\d+)>)?(?=,|$)", text.split(None, 2)[2]):
                scopes[-1][1].update([f"{name}{i}" for i in range(int(count))] if count else [name])
            return
        if shared := re.match(r"\.shared \.align (\d+) \.b(\d+) (\w+)\[(\d+)\]", text):
            align, bits, name, count = int(shared[1]), int(shared[2]), shared[3], int(shared[4])
            self.symbols[name] = -(-self.end // align) * align
            self.end = self.symbols[name] + bits // 8 * count
            return
        if text.startswith("."):
            return
        parts = re.match(r"(?:@(!?)(%?\w+)\s+)?([\w.:]+)\s*(.*)", text, re.DOTALL)
        operands = [self._renamed(each, scopes) for each in split(parts[4])]
        guard = (self._renamed(parts[2], scopes), parts[1] == "!") if parts[2] else None
        self.statements.append(Statement(guard, parts[3], operands, text))

    @staticmethod
    def _renamed(operand: str, scopes: list[tuple[str, set[str]]]) -> str:
        def rename(match: re.Match) -> str:
            for suffix, names in reversed(scopes):
                if match[0] in names:
                    return match[0] + suffix
            return match[0]

        return re.sub(r"[%$]?[A-Za-z_]\w*(?:\.\w+)?", rename, operand)


def closing(text: str) -> int:
    """Where the brace that `text` begins with is closed."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "{") - (letter == "}")
        if not depth:
            return i
    raise ValueError("a brace is not closed")


def split(text: str) -> list[str]:
    """By commas that are in no bracket."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


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
                run = statement.run or OPERATIONS[statement.name.split(".")[0]]
                statement.run = run
                run(self, statement, active)

    # operands

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

    def all_of(self, statement: Statement, active: np.ndarray) -> None:
        if not active.all():
            raise Fault(f"not all lanes of a warp take part: {statement.text}")


def elements(operand: str) -> list[str]:
    return split(operand.strip("{} ")) if operand.startswith("{") else [operand]


# operations


def binary(function: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Callable:
    def run(warp: Warp, statement: Statement, active: np.ndarray) -> None:
        kind, (target, a, b) = statement.name.split(".")[-1], statement.operands
        if kind == "f16x2":
            x, y = (warp.get(each, "b32").view(np.float16) for each in (a, b))
            return warp.set(target, function(x, y).view(np.uint32), active)
        x, y = warp.get(a, kind), warp.get(b, kind)
        return warp.set(target, function(x, y).astype(x.dtype), active)

    return run


def unary(function: Callable[[np.ndarray], np.ndarray]) -> Callable:
    def run(warp: Warp, statement: Statement, active: np.ndarray) -> None:
        kind, (target, a) = statement.name.split(".")[-1], statement.operands
        x = warp.get(a, kind)
        warp.set(target, function(x).astype(x.dtype), active)

    return run


def product(warp: Warp, statement: Statement, active: np.ndarray) -> None:
    _, *modes, kind = statement.name.split(".")
    target, *operands = statement.operands
    if kind == "f32":
        wide = [warp.get(each, kind).astype(np.float64) for each in operands]
        return warp.set(target, (wide[0] * wide[1] + (wide[2] if len(wide) > 2 else 0)).astype(np.float32), active)
    (mode,) = modes  # of integers: which half of the product, or all of it
    if mode == "hi":
        whole = np.multiply(*(warp.get(each, kind).astype(object) for each in operands))
        return warp.set(target, (whole >> int(kind[1:])).astype(TYPES[kind]), active)
    wide_kind = kind if mode == "lo" else kind[0] + str(int(kind[1:]) * 2)
    x, y = (warp.get(each, kind).astype(TYPES[wide_kind]) for each in operands[:2])
    return warp.set(target, x * y + (warp.get(operands[2], wide_kind) if len(operands) > 2 else 0), active)


def shift(warp: Warp, statement: Statement, active: np.ndarray) -> None:
    name, kind = statement.name.split(".")
    target, a, b = statement.operands
    x, by = warp.get(a, kind), warp.get(b, "u32")
    width = x.itemsize * 8
    near = np.minimum(by, width - 1).astype(x.dtype)
    shifted = x << near if name == "shl" else x >> near
    over = x >> (width - 1) if name == "shr" and kind[0] == "s" else np.zeros_like(x)
    warp.set(target, np.where(by < width, shifted, over), active)


COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


def compare(warp: Warp, statement: Statement, active: np.ndarray) -> None:
    _, comparison, kind = statement.name.split(".")
    target, a, b = statement.operands
    warp.set(target, COMPARISONS[comparison](warp.get(a, kind), warp.get(b, kind)), active)


def select(warp: Warp, statement: Statement, active: np.ndarray) -> None:
    kind, (target, a, b, p) = statement.name.split(".")[-1], statement.operands
    warp.set(target, np.where(warp.get(p, "pred"), warp.get(a, kind), warp.get(b, kind)), active)


def move(warp: Warp, statement: Statement, active: np.ndarray) -> None:
    kind, (target, source) = statement.name.split(".")[-1], statement.operands
    targets, sources = elements(target), elements(source)
    if len(targets) == len(sources):
        return warp.set(target, warp.get(source, kind), active)
    size = np.dtype(TYPES[kind]).itemsize * 8
    if len(targets) > 1:
        part = size // len(targets)
        for i, each in enumerate(targets):
            piece = warp.bits(source) >> np.uint64(i * part) & np.uint64(2**part - 1)
            warp.set(each, piece, active)
        return None
    part = size // len(sources)
    whole = sum(warp.get(each, f"b{part}").astype(np.uint64) << np.uint64(i * part) for i, each in enumerate(sources))
    return warp.set(target, whole, active)


def permute(warp: Warp, statement: Statement, active: np.ndarray) -> None:
    target, a, b, selector = statement.operands
    both = warp.get(a, "b32").astype(np.uint64) | warp.get(b, "b32").astype(np.uint64) << np.uint64(32)
    selector, result = warp.get(selector, "b32"), np.zeros(LANES, np.uint32)
    for i in range(4):
        nibble = selector >> np.uint32(4 * i) & np.uint32(15)
        byte = (both >> (nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8) & np.uint64(255)).astype(np.uint32)
        byte = np.where(nibble & 8, np.where(byte & 128, 255, 0), byte).astype(np.uint32)
        result |= byte << np.uint32(8 * i)
    warp.set(target, result, active)


def logic3(warp: Warp, statement: Statement, active: np.ndarray) -> None:
    target, *operands, table = statement.operands
    a, b, c = (warp.get(each, "b32") for each in operands)
    result = np.zeros(LANES, np.uint32)
    for i in range(8):
        if int(table, 0) >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    warp.set(target, result, active)


def field_of(warp: Warp, statement: Statement, active: np.ndarray) -> None:
    kind, (target, a, first, length) = statement.name.split(".")[-1], statement.operands
    x, first, length = (warp.get(each, "u32").astype(np.int64) for each in (a, first, length))
    value = x >> first & (1 << length) - 1
    if kind == "s32":
        value = np.where(value >> length - 1 & 1, value - (1 << length), value)
    warp.set(target, value.astype(np.int32), active)


def convert(warp: Warp, statement: Statement, active: np.ndarray) -> None:
    to, of = statement.name.split(".")[-2:]
    target, *sources = statement.operands
    if of == "e4m3x2":
        codes = warp.get(sources[0], "b16")[:, None].view(np.uint8).view(ml_dtypes.float8_e4m3fn)
        return warp.set(target, codes.astype(np.float16).view(np.uint32)[:, 0], active)
    values = [warp.get(each, of) for each in sources]
    if to == "f16x2":  # the first operand is the upper half
        pair = np.stack(values[::-1], axis=1).astype(np.float16)
        return warp.set(target, pair.view(np.uint32)[:, 0], active)
    return warp.set(target, values[0].astype(TYPES[to]), active)


def memory_of(statement: Statement) -> tuple[str, int, str]:
    """The space, how many elements, their type."""
    parts = statement.name.split(".")
    count = next((int(part[1]) for part in parts if re.fullmatch(r"v[24]", part)), 1)
    return parts[1].split("::")[0], count, parts[-1]


def load(warp: Warp, statement: Statement, active: np.ndarray) -> None:
    space, count, kind = memory_of(statement)
    target, source = statement.operands
    if space == "param":
        index = warp.program.code.parameters.index(source.strip("[] "))
        return warp.set(target, np.full(LANES, index + 1 << ARRAY, np.uint64), active)
    size = np.dtype(TYPES[kind]).itemsize
    found, lanes = np.zeros((LANES, count * size), np.uint8), np.flatnonzero(active)
    for memory, which, at in warp.program.places(space, warp.addresses(source)[lanes], count * size, statement.text):
        found[lanes[which]] = memory[at[:, None] + np.arange(count * size)]
    for i, each in enumerate(elements(target)):
        part = np.ascontiguousarray(found[:, i * size : (i + 1) * size]).view(f"u{size}")[:, 0]
        warp.set(each, part, active)
    return None


def store(warp: Warp, statement: Statement, active: np.ndarray) -> None:
    space, count, kind = memory_of(statement)
    target, source = statement.operands
    size = np.dtype(TYPES[kind]).itemsize
    values = [warp.bits(each).astype(f"u{size}") for each in elements(source)]
    data, lanes = np.stack(values, axis=1).view(np.uint8), np.flatnonzero(active)
    for memory, which, at in warp.program.places(space, warp.addresses(target)[lanes], count * size, statement.text):
        memory[at[:, None] + np.arange(count * size)] = data[lanes[which]]


def shuffle(warp: Warp, statement: Statement, active: np.ndarray) -> None:
    warp.all_of(statement, active)
    mode, (target, source, by, *_) = statement.name.split(".")[2], statement.operands
    other = warp.get(by, "u32")
    lanes = {"bfly": warp.lanes ^ other, "idx": other % LANES}[mode]
    warp.set(target, warp.bits(source)[lanes], active)


def transpose(warp: Warp, statement: Statement, active: np.ndarray) -> None:
    """8x8 numbers of 16 bits."""
    warp.all_of(statement, active)
    target, source = statement.operands
    square = np.ascontiguousarray(warp.get(source, "b32")).view(np.uint16).reshape(8, 8)
    warp.set(target, np.ascontiguousarray(square.T).view(np.uint32).reshape(LANES), active)


def multiply(warp: Warp, statement: Statement, active: np.ndarray) -> None:
    """D [16, 8] = A [16, 16] B [16, 8] + C; lane (g, t) = (lane / 4, lane % 4)."""
    warp.all_of(statement, active)
    if ".m16n8k16.row.col." not in statement.name:
        raise Fault(f"no such product: {statement.text}")
    kind = TYPES[statement.name.split(".")[-2]]
    d, a, b, c = map(elements, statement.operands)

    def pairs(names: list[str]) -> np.ndarray:  # [registers, g, t, 2]
        words = np.stack([warp.get(each, "b32") for each in names])
        return words.view(np.uint16).view(kind).astype(np.float32).reshape(len(names), 8, 4, 2)

    of_a, of_b = pairs(a), pairs(b)
    left = np.concatenate(
        [np.concatenate([of_a[i].reshape(8, 8), of_a[i + 2].reshape(8, 8)], axis=1) for i in range(2)]
    )
    right = np.concatenate([of_b[i].reshape(8, 8).T for i in range(2)])
    sums = np.stack([warp.get(each, "f32") for each in c]).reshape(2, 2, 8, 4).transpose(0, 2, 3, 1).reshape(16, 8)
    result = (left.astype(np.float64) @ right + sums).astype(np.float32)
    result = result.reshape(2, 8, 4, 2).transpose(0, 3, 1, 2).reshape(4, LANES)
    for name, values in zip(d, result, strict=True):
        warp.set(name, values, active)


def branch(warp: Warp, statement: Statement, active: np.ndarray) -> None:
    warp.at[active] = warp.program.code.labels[statement.operands[0]]


def leave(warp: Warp, statement: Statement, active: np.ndarray) -> None:
    warp.at[active] = len(warp.program.code.statements)


def meet(warp: Warp, statement: Statement, active: np.ndarray) -> None:
    warp.all_of(statement, active)
    if ".warp." not in statement.name:
        warp.waiting = "program"


def barrier(warp: Warp, statement: Statement, active: np.ndarray) -> None:
    """Barriers in shared memory: some arrivals and bytes make a phase, which may be waited for by its parity."""
    operation, program, lanes = statement.name.split(".")[1], warp.program, np.flatnonzero(active)
    addresses = warp.addresses(statement.operands[operation != "init"])[lanes]
    list(program.places("shared", addresses, 8, statement.text))
    for lane, address in zip(lanes, addresses.tolist(), strict=True):
        if operation == "init":
            program.barriers[address] = Barrier(int(warp.get(statement.operands[1], "u32")[lane]))
            continue
        if address not in program.barriers:
            raise Fault(f"no barrier is at {address}: {statement.text}")
        known = program.barriers[address]
        if operation == "try_wait":
            over = known.phase % 2 != warp.get(statement.operands[2], "u32")[lane]
            warp.set(statement.operands[0], np.full(LANES, over), warp.lanes == lane)
            warp.waiting = warp.waiting if over else "memory"
        else:
            if ".expect_tx." in statement.name:
                known.bytes += int(warp.get(statement.operands[2], "u32")[lane])
            known.arrived += 1
            if known.arrived > known.count:
                raise Fault(f"more arrive than a barrier counts: {statement.text}")
            known.settle()


def copy(warp: Warp, statement: Statement, active: np.ndarray) -> None:
    """From an array to shared memory; it arrives later."""
    to, of, size, done = statement.operands
    program = warp.program
    for lane in np.flatnonzero(active):
        count, known = int(warp.get(size, "u32")[lane]), int(warp.addresses(done)[lane])
        if count % 16 or known not in program.barriers:
            raise Fault(f"{count} bytes, announced at {known}: {statement.text}")
        ((_, _, start),) = program.places(
            "shared", warp.addresses(to)[lane : lane + 1], count, statement.text, align=16
        )
        ((source, _, first),) = program.places(
            "global", warp.addresses(of)[lane : lane + 1], count, statement.text, align=16
        )
        program.copies.append(partial(arrive, program, source, int(first[0]), int(start[0]), count, known))


def arrive(program: Program, source: np.ndarray, first: int, start: int, count: int, known: int) -> None:
    program.shared[start : start + count] = source[first : first + count]
    program.barriers[known].bytes -= count
    program.barriers[known].settle()


def nothing(warp: Warp, statement: Statement, active: np.ndarray) -> None:
    pass


OPERATIONS: dict[str, Callable] = {
    "abs": unary(np.abs),
    "add": binary(np.add),
    "and": binary(np.bitwise_and),
    "bar": meet,
    "bfe": field_of,
    "bra": branch,
    "cp": copy,
    "cvt": convert,
    "div": binary(np.divide),
    "ex2": unary(np.exp2),
    "fence": nothing,
    "fma": product,
    "ld": load,
    "lg2": unary(np.log2),
    "lop3": logic3,
    "mad": product,
    "max": binary(np.fmax),
    "mbarrier": barrier,
    "min": binary(np.fmin),
    "mma": multiply,
    "mov": move,
    "movmatrix": transpose,
    "mul": product,
    "neg": unary(np.negative),
    "not": unary(np.bitwise_not),
    "or": binary(np.bitwise_or),
    "prmt": permute,
    "rcp": unary(lambda x: 1 / x),
    "ret": leave,
    "selp": select,
    "setp": compare,
    "shfl": shuffle,
    "shl": shift,
    "shr": shift,
    "st": store,
    "sub": binary(np.subtract),
    "xor": binary(np.bitwise_xor),
}


def launch(ptx: str, arrays: Sequence[np.ndarray], grid: Sequence[int], seed: int = 0) -> None:
    """Run a kernel over a grid; `arrays` are its arguments, written in place."""
    code, chance = Code(ptx), np.random.default_rng(seed)
    flat = [each.reshape(-1).view(np.uint8) for each in arrays]
    x, y, z = (*grid, 1, 1)[:3]
    with np.errstate(all="ignore"):
        for index in np.ndindex(z, y, x):
            Program(code, flat, index[::-1], chance).run()
