"""The softmax of one chunk's float32 logits as Triton kernels.

`softmax_kernel` makes statistics and ds of a row in one reading. A row of 128256 logits, 0.5 MB, fits no processor, so
BLOCK logits go to each of several programs, which hold them in registers: each publishes its part's log-sum-exp, waits
until its row is complete, combines the parts and writes its part of ds. Counted per logit: 4 bytes read, 2 written; a
program that walks along its whole row twice reads another 4, as the rows of all programs do not stay in L2 together.
Programs take tickets, in the order in which they start: whoever waits, waits for programs that run or for the next ones
to start, hence never for ever on a device that runs as many at a time as a row has parts.

`statistics_kernel` and `gradient_kernel` are its halves, a program a row: for a loss without gradient, and where the
log-sum-exp is known already or has to be combined between devices first. In the former each lane keeps a maximum and a
sum of its own, so that the walk waits for no other lane; one exponential a logit serves both: with d = t - m, exp(-|d|)
is either what t adds to the sum or what the sum shrinks by.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false
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
def _slope(
    probability, logits, columns, label, lse,
    CAP: tl.constexpr, PEAK: tl.constexpr, UNIFORM: tl.constexpr, Z: tl.constexpr,
):  # fmt: skip
    """ds of a block of logits, before the row's own factor."""
    if Z != 0:
        probability *= 1 + 2 * Z * lse
    slope = probability - tl.where(columns == label, PEAK + UNIFORM, UNIFORM)
    if CAP != 0:
        slope *= 1 - (logits / CAP) * (logits / CAP)
    return slope


@triton.jit
def _gradient_block(
    row, ds, columns, label, lse, scale,
    VOCABULARY: tl.constexpr, CAP: tl.constexpr, PEAK: tl.constexpr, UNIFORM: tl.constexpr, Z: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    logits = _logits(row, columns, VOCABULARY, CAP, TAIL)
    gradient = _slope(tl.exp(logits - lse), logits, columns, label, lse, CAP, PEAK, UNIFORM, Z)
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
def _meet(arrivals, parts: tl.constexpr):
    """Wait until all programs of a row have come here; what each of them stored before, all can load after."""
    tl.debug_barrier()
    arrived = tl.atomic_add(arrivals, 1, sem="acq_rel") + 1
    while arrived < parts:
        arrived = tl.atomic_add(arrivals, 0, sem="acquire")


@triton.jit
def softmax_kernel(
    logits, labels, scales, zeros, lse, at_label, total, ds, arrivals, partial_lse, partial_total,
    ROWS: tl.constexpr, VOCABULARY: tl.constexpr, CAP: tl.constexpr, PEAK: tl.constexpr, UNIFORM: tl.constexpr,
    Z: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`arrivals` [ROWS + 1] starts as `zeros`, whose memory it is: a count for each row, and the next ticket."""
    parts: tl.constexpr = (VOCABULARY + BLOCK - 1) // BLOCK
    ticket = tl.atomic_add(arrivals + ROWS, 1, sem="relaxed")
    index, part = ticket // parts, ticket % parts
    columns = part * BLOCK + tl.arange(0, BLOCK)
    inside = columns < VOCABULARY
    start = index.to(tl.int64) * VOCABULARY
    scale, label = tl.load(scales + index), tl.load(labels + index)
    if scale == 0:
        tl.store(ds + start + columns, tl.zeros([BLOCK], ds.dtype.element_ty), mask=inside)
        if part == 0:
            tl.store(lse + index, 0.0)
            tl.store(at_label + index, 0.0)
            tl.store(total + index, 0.0)
    else:
        own = _capped(tl.load(logits + start + columns, mask=inside, other=0.0, eviction_policy="evict_first"), CAP)
        if (label >= part * BLOCK) & (label < part * BLOCK + BLOCK) & (label < VOCABULARY):
            tl.store(at_label + index, _capped(tl.load(logits + start + label), CAP))
        highest = tl.max(tl.where(inside, own, -float("inf")))
        powers = tl.where(inside, tl.exp(own - highest), 0.0)
        tl.store(partial_lse + ticket, highest + tl.log(tl.sum(powers)))
        if UNIFORM != 0:
            tl.store(partial_total + ticket, tl.sum(own))
        _meet(arrivals + index, parts)
        lanes = tl.arange(0, triton.next_power_of_2(parts))
        first, every = index * parts, lanes < parts
        each = tl.load(partial_lse + first + lanes, mask=every, other=-float("inf"), volatile=True)
        top = tl.max(each)
        lse_here = top + tl.log(tl.sum(tl.exp(each - top)))
        total_here = 0.0
        if UNIFORM != 0:
            total_here = tl.sum(tl.load(partial_total + first + lanes, mask=every, other=0.0, volatile=True))
        if part == 0:
            tl.store(lse + index, lse_here)
            tl.store(total + index, total_here)
            if (label < 0) | (label >= VOCABULARY):
                tl.store(at_label + index, 0.0)
        gradient = powers * tl.exp(highest - lse_here)
        gradient = _slope(gradient, own, columns, label, lse_here, CAP, PEAK, UNIFORM, Z)
        tl.store(ds + start + columns, (gradient * scale).to(ds.dtype.element_ty), mask=inside)


def compile_cases() -> list[tuple]:
    """What the tests compile for GPUs they do not have."""
    floats = ("logits", "scales", "lse", "at_label", "total", "partial_lse", "partial_total")
    arrays = dict.fromkeys(floats, "*fp32") | dict.fromkeys(("labels", "zeros", "arrivals"), "*i32") | {"ds": "*bf16"}
    cases = []
    for vocabulary, cap, block, warps in ((128256, 0.0, 4096, 16), (507, 30.0, 256, 4)):
        walk = {"VOCABULARY": vocabulary, "CAP": cap, "BLOCK": block}
        slopes = {"PEAK": 0.9, "UNIFORM": 0.1 / vocabulary, "Z": 1e-4}
        cases.append((statistics_kernel, arrays, walk | {"TOTAL": True}, {"num_warps": warps}))
        cases.append((softmax_kernel, arrays, walk | slopes | {"ROWS": 1024}, {"num_warps": 4}))
        cases.append((gradient_kernel, arrays | {"ds": "*fp16"}, walk | slopes, {"num_warps": warps}))
    return cases
