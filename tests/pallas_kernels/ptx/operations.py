"""What each of PTX's operations does to a warp's registers and to memory."""

import re
from collections.abc import Callable
from functools import partial

import ml_dtypes
import numpy as np

from tests.pallas_kernels.ptx.code import Statement, split
from tests.pallas_kernels.ptx.machine import ARRAY, LANES, TYPES, Barrier, Fault, Operation, Program, Warp


def elements(operand: str) -> list[str]:
    return split(operand.strip("{} ")) if operand.startswith("{") else [operand]


def binary(function: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Callable:
    def run(warp: Warp, statement: Statement, active: np.ndarray) -> None:
        kind, (target, a, b) = statement.kind, statement.operands
        if kind == "f16x2":
            x, y = (warp.get(each, "b32").view(np.float16) for each in (a, b))
            return warp.set(target, function(x, y).view(np.uint32), active)
        x, y = warp.get(a, kind), warp.get(b, kind)
        return warp.set(target, function(x, y).astype(x.dtype), active)

    return run


def unary(function: Callable[[np.ndarray], np.ndarray]) -> Callable:
    def run(warp: Warp, statement: Statement, active: np.ndarray) -> None:
        kind, (target, a) = statement.kind, statement.operands
        x = warp.get(a, kind)
        warp.set(target, function(x).astype(x.dtype), active)

    return run


def product(warp: Warp, statement: Statement, active: np.ndarray) -> None:
    _, *modes, kind = statement.name.split(".")
    target, *operands = statement.operands
    if kind == "bf16x2":
        x, y = (warp.get(each, "b32").view(TYPES["bf16"]) for each in operands)
        return warp.set(target, (x * y).view(np.uint32), active)
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


def funnel(warp: Warp, statement: Statement, active: np.ndarray) -> None:
    """Of two words beside each other, a and above it b: the upper one of what is shifted left, or the lower one."""
    _, direction, mode, _ = statement.name.split(".")
    target, a, b, by = statement.operands
    low, high, by = (warp.get(each, "b32").astype(np.uint64) for each in (a, b, by))
    by = by & np.uint64(31) if mode == "wrap" else np.minimum(by, np.uint64(32))
    both = low | high << np.uint64(32)
    shifted = both << by >> np.uint64(32) if direction == "l" else both >> by
    warp.set(target, shifted & np.uint64(2**32 - 1), active)


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
    kind, (target, a, b, p) = statement.kind, statement.operands
    warp.set(target, np.where(warp.get(p, "pred"), warp.get(a, kind), warp.get(b, kind)), active)


def move(warp: Warp, statement: Statement, active: np.ndarray) -> None:
    kind, (target, source) = statement.kind, statement.operands
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
    kind, (target, a, first, length) = statement.kind, statement.operands
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
    if to.endswith("x2"):  # the first operand is the upper half
        pair = np.stack(values[::-1], axis=1).astype(TYPES[to.removesuffix("x2")])
        return warp.set(target, pair.view(np.uint32)[:, 0], active)
    return warp.set(target, values[0].astype(TYPES[to]), active)


ORDERING = ("acquire", "release", "gpu")  # programs run one after the other


def memory_of(statement: Statement) -> tuple[str, int, str]:
    """The space, how many elements, their type."""
    parts = [part for part in statement.name.split(".") if part not in ORDERING]
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


def count_up(warp: Warp, statement: Statement, active: np.ndarray) -> None:
    """A number in memory and what a lane adds to it."""
    space, _, kind = memory_of(statement)
    target, added = statement.operands
    values, lanes = warp.get(added, kind), np.flatnonzero(active)
    for memory, which, at in warp.program.places(space, warp.addresses(target)[lanes], 4, statement.text):
        for lane, first in zip(lanes[which], at, strict=True):
            memory[first : first + 4].view(TYPES[kind])[0] += values[lane]


def shuffle(warp: Warp, statement: Statement, active: np.ndarray) -> None:
    warp.needs_all(statement, active)
    mode, (target, source, by, *_) = statement.name.split(".")[2], statement.operands
    other = warp.get(by, "u32")
    lanes = {"bfly": warp.lanes ^ other, "idx": other % LANES}[mode]
    warp.set(target, warp.bits(source)[lanes], active)


def transpose(warp: Warp, statement: Statement, active: np.ndarray) -> None:
    """8x8 numbers of 16 bits."""
    warp.needs_all(statement, active)
    target, source = statement.operands
    square = np.ascontiguousarray(warp.get(source, "b32")).view(np.uint16).reshape(8, 8)
    warp.set(target, np.ascontiguousarray(square.T).view(np.uint32).reshape(LANES), active)


def multiply(warp: Warp, statement: Statement, active: np.ndarray) -> None:
    """D [16, 8] = A [16, 16] B [16, 8] + C; lane (g, t) = (lane / 4, lane % 4)."""
    warp.needs_all(statement, active)
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
    warp.needs_all(statement, active)
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


OPERATIONS: dict[str, Operation] = {
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
    "red": count_up,
    "ret": leave,
    "rsqrt": unary(lambda x: 1 / np.sqrt(x)),
    "selp": select,
    "setp": compare,
    "shf": funnel,
    "shfl": shuffle,
    "shl": shift,
    "shr": shift,
    "st": store,
    "sub": binary(np.subtract),
    "xor": binary(np.bitwise_xor),
}
