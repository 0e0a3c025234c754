"""The softmax of one chunk's logits as Triton kernels: a program takes a row of float32 logits.

`softmax_kernel` reads a row twice, first for its log-sum-exp, then for the gradient of its logits; the second walk goes
backward, so that what of the row is still in L2 is what it reads first. A vocabulary of 128256 words is 0.5 MB a row:
no shared memory holds it, the L2 holds one for each of some hundred programs. Counted per logit: 4 bytes read, 4 more
from DRAM or L2, 2 written.

`statistics_kernel` and `gradient_kernel` are the two walks apart, for a loss without gradient and where the log-sum-exp
has to be combined between devices first.

Each lane keeps a maximum and a sum of its own, so that the walk waits for no other lane; one exponential a logit serves
both: with d = t - m, exp(-|d|) is either what t adds to the sum or what the sum shrinks by.
"""

# pyright: reportArgumentType=false
# (Triton makes a constexpr of a literal, pyright does not know)
import triton
import triton.language as tl


@triton.jit
def _capped(logits, CAP: tl.constexpr):
    """c tanh(logits / c), or the logits where c is 0; tanh through exp of what is never positive."""
    if CAP != 0:
        decay = tl.exp(tl.abs(logits) * (-2.0 / CAP))
        bound = CAP * (1 - decay) / (1 + decay)
        logits = tl.where(logits < 0, -bound, bound)
    return logits


@triton.jit
def _logits(row, columns, VOCABULARY: tl.constexpr, CAP: tl.constexpr, TAIL: tl.constexpr):
    """Capped logits, and 0 past the vocabulary's end."""
    if TAIL:
        raw = tl.load(row + columns, mask=columns < VOCABULARY, other=0.0)
    else:
        raw = tl.load(row + columns)
    return _capped(raw, CAP)


@triton.jit
def _add(
    row, columns, top, mass, total,
    VOCABULARY: tl.constexpr, CAP: tl.constexpr, TOTAL: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """A block of logits joins the lanes' maxima, sums of exponentials and plain sums."""
    logits = _logits(row, columns, VOCABULARY, CAP, TAIL)
    if TOTAL:
        total += logits
    if TAIL:
        logits = tl.where(columns < VOCABULARY, logits, -float("inf"))
    small = tl.exp(-tl.abs(logits - top))
    mass = tl.where(logits > top, mass * small + 1, mass + small)
    return tl.maximum(top, logits), mass, total


@triton.jit
def _statistics(row, label, VOCABULARY: tl.constexpr, CAP: tl.constexpr, TOTAL: tl.constexpr, BLOCK: tl.constexpr):
    """Log-sum-exp of a row, its logit at the label (0 where that is no word here), the sum of its logits."""
    lanes = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], -1e38, tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    whole: tl.constexpr = VOCABULARY // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        top, mass, total = _add(row, start + lanes, top, mass, total, VOCABULARY, CAP, TOTAL, False)
    if whole < VOCABULARY:
        top, mass, total = _add(row, whole + lanes, top, mass, total, VOCABULARY, CAP, TOTAL, True)
    highest = tl.max(top)
    lse = highest + tl.log(tl.sum(mass * tl.exp(top - highest)))
    here = (label >= 0) & (label < VOCABULARY)
    at_label = _capped(tl.load(row + label, mask=here, other=0.0), CAP)
    return lse, at_label, tl.sum(total)


@triton.jit
def _gradient_block(
    row, ds, columns, label, lse, scale,
    VOCABULARY: tl.constexpr, CAP: tl.constexpr, PEAK: tl.constexpr, UNIFORM: tl.constexpr, Z: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    logits = _logits(row, columns, VOCABULARY, CAP, TAIL)
    gradient = tl.exp(logits - lse)
    if Z != 0:
        gradient *= 1 + 2 * Z * lse
    gradient -= tl.where(columns == label, PEAK + UNIFORM, UNIFORM)
    if CAP != 0:
        gradient *= 1 - (logits / CAP) * (logits / CAP)
    gradient = (gradient * scale).to(ds.dtype.element_ty)
    if TAIL:
        tl.store(ds + columns, gradient, mask=columns < VOCABULARY)
    else:
        tl.store(ds + columns, gradient)


@triton.jit
def _gradient(
    row, ds, label, lse, scale,
    VOCABULARY: tl.constexpr, CAP: tl.constexpr, PEAK: tl.constexpr, UNIFORM: tl.constexpr, Z: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write a row of ds from the vocabulary's end to its start."""
    lanes = tl.arange(0, BLOCK)
    whole: tl.constexpr = VOCABULARY // BLOCK * BLOCK
    if whole < VOCABULARY:
        _gradient_block(row, ds, whole + lanes, label, lse, scale, VOCABULARY, CAP, PEAK, UNIFORM, Z, True)
    for done in range(0, whole, BLOCK):
        columns = whole - BLOCK - done + lanes
        _gradient_block(row, ds, columns, label, lse, scale, VOCABULARY, CAP, PEAK, UNIFORM, Z, False)


@triton.jit
def _clear(ds, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    for start in range(0, VOCABULARY, BLOCK):
        tl.store(ds + start + lanes, tl.zeros([BLOCK], ds.dtype.element_ty), mask=start + lanes < VOCABULARY)


@triton.jit
def statistics_kernel(
    logits, labels, lse, at_label, total,
    VOCABULARY: tl.constexpr, CAP: tl.constexpr, TOTAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0)
    row = logits + index.to(tl.int64) * VOCABULARY
    lse_here, at_label_here, total_here = _statistics(row, tl.load(labels + index), VOCABULARY, CAP, TOTAL, BLOCK)
    tl.store(lse + index, lse_here)
    tl.store(at_label + index, at_label_here)
    tl.store(total + index, total_here)


@triton.jit
def gradient_kernel(
    logits, labels, scales, lse, ds,
    VOCABULARY: tl.constexpr, CAP: tl.constexpr, PEAK: tl.constexpr, UNIFORM: tl.constexpr, Z: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0)
    start = index.to(tl.int64) * VOCABULARY
    scale = tl.load(scales + index)
    if scale == 0:
        _clear(ds + start, VOCABULARY, BLOCK)
    else:
        label, lse_here = tl.load(labels + index), tl.load(lse + index)
        _gradient(logits + start, ds + start, label, lse_here, scale, VOCABULARY, CAP, PEAK, UNIFORM, Z, BLOCK)


@triton.jit
def softmax_kernel(
    logits, labels, scales, lse, at_label, total, ds,
    VOCABULARY: tl.constexpr, CAP: tl.constexpr, PEAK: tl.constexpr, UNIFORM: tl.constexpr, Z: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0)
    start = index.to(tl.int64) * VOCABULARY
    scale, label = tl.load(scales + index), tl.load(labels + index)
    if scale == 0:
        tl.store(lse + index, 0.0)
        tl.store(at_label + index, 0.0)
        tl.store(total + index, 0.0)
        _clear(ds + start, VOCABULARY, BLOCK)
    else:
        row = logits + start
        lse_here, at_label_here, total_here = _statistics(row, label, VOCABULARY, CAP, UNIFORM != 0, BLOCK)
        tl.store(lse + index, lse_here)
        tl.store(at_label + index, at_label_here)
        tl.store(total + index, total_here)
        _gradient(row, ds + start, label, lse_here, scale, VOCABULARY, CAP, PEAK, UNIFORM, Z, BLOCK)


def compile_cases() -> list[tuple]:
    """What the tests compile for GPUs they do not have."""
    arrays = dict.fromkeys(("logits", "scales", "lse", "at_label", "total"), "*fp32") | {
        "labels": "*i32",
        "ds": "*bf16",
    }
    cases = []
    for vocabulary, cap, block, warps in ((128256, 0.0, 4096, 16), (507, 30.0, 512, 4)):
        walk = {"VOCABULARY": vocabulary, "CAP": cap, "BLOCK": block}
        slopes = {"PEAK": 0.9, "UNIFORM": 0.1 / vocabulary, "Z": 1e-4}
        cases.append((statistics_kernel, arrays, walk | {"TOTAL": True}, {"num_warps": warps}))
        cases.append((softmax_kernel, arrays, walk | slopes, {"num_warps": warps}))
        cases.append((gradient_kernel, arrays | {"ds": "*fp16"}, walk | slopes, {"num_warps": warps}))
    return cases
