"""NF4Array: a weight matrix in 4 bits, as a pytree that jit, scan, sharding and checkpoints treat like any array.

A logical weight W [out, in] is cut, row by row, into blocks of 64 values. A value is a code (0..15, see codebook.py)
times its block's scale. With double quantisation, the default, the scales are compressed too: block scale = map[code]
* nested scale + offset, with one nested scale for every 256 block scales and one offset for the whole matrix. That is
4 + 8/64 + 32/(64*256) = 4.127 bits a weight; with float32 scales it is 4.5.

Layout "rows", whenever `in` is a multiple of 64, so that a block never crosses a row; s = in/64:

    codes          uint8   [out, in/2]   byte j of a block's 32: value j in the low nibble, value j+32 in the high one
    scales         uint8   [out, s]      codes into the dynamic map; or float32 [out, s] if single-quantised
    nested_scales  float32 [R, C]        one value per `nested_cell` = (rows, columns) of scales, or None
    offset         float32 []            or None

The half-block split lets whole words of low and of high nibbles be decoded side by side, without interleaving. The
grid of nested scales makes W shardable by plain PartitionSpecs. The 256 scales that share a nested scale form a run of
the flattened [out, s] array, and a cell is a rectangle within such a run: 256/s whole rows, or 256 columns of one row,
or gcd(s, 256) columns, the value then repeated. A slice of the leaves along `out` (whole cells) or along `in` (whole
cells, or any blocks where C == 1, with nested_scales kept whole) is itself a valid NF4Array of that slice of W.

Layout "flat", for any other matrix with an even number of values: one-dimensional leaves in block order, the last
block may be partial (m values in m/2 bytes, split in halves like the others), nested_scales [ceil(blocks/256)], and
W's shape in `flat_shape`. It does not shard.

Every leaf may have the same leading axes, a stack of matrices: [L, out, in] is what a scan over layers slices. In
layout "rows" the shape is read off the leaves, so slices know theirs.
"""

import dataclasses
import math
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from pallas_kernels.nf4.codebook import BLOCK, NESTED_BLOCK


def _static(default: Any) -> Any:
    return dataclasses.field(default=default, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class NF4Array:
    """A packed weight [..., out, in]. The module's docstring gives the layout; `check_nf4` checks it.

    Attributes:
        codes: uint8 [..., out, in/2], or [..., out*in/2] if flat.
        scales: uint8 (double-quantised) or float32 [..., out, in/64], or [..., blocks] if flat.
        nested_scales: float32 [..., R, C], or [..., ceil(blocks/256)] if flat; None if single-quantised.
        offset: float32 [...]; None if single-quantised.
        layout: "rows" or "flat".
        nested_cell: (rows, columns) of scales that one nested scale covers, in layout "rows".
        flat_shape: (out, in), in layout "flat".
        nested_map: 256 float32 values that `scales` are codes into, where they differ from `dynamic_map()`: a
            checkpoint may bring its own, rounded otherwise in a few last bits.
    """

    block_size: ClassVar[int] = BLOCK

    codes: jax.Array
    scales: jax.Array
    nested_scales: jax.Array | None
    offset: jax.Array | None
    layout: Literal["rows", "flat"] = _static("rows")
    nested_cell: tuple[int, int] | None = _static(None)
    flat_shape: tuple[int, int] | None = _static(None)
    nested_map: tuple[float, ...] | None = _static(None)

    @property
    def double_quant(self) -> bool:
        return self.nested_scales is not None

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical weight's, [..., out, in]."""
        if self.flat_shape is not None:
            return (*self.codes.shape[:-1], *self.flat_shape)
        return (*self.codes.shape[:-1], 2 * self.codes.shape[-1])

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves, shared values repeated in cells included."""
        return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(self))

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.size

    def __repr__(self) -> str:
        kind = "double-quantised" if self.double_quant else "single-quantised"
        leaves = f"shape={self.shape}" if hasattr(self.codes, "shape") else f"codes={self.codes}"  # PartitionSpecs, say
        return f"NF4Array({self.layout}, {kind}, {leaves})"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class NF4Slice:
    """One matrix of a stack [L, out, in], by its index: not cut out, as that would copy it."""

    stack: NF4Array
    index: jax.Array  # int32 []

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stack.shape[1:]

    def cut(self) -> NF4Array:
        """The matrix by itself."""
        return jax.tree.map(lambda leaf: leaf[self.index], self.stack)


def nested_cell_for(scale_columns: int) -> tuple[int, int]:
    """The cell of a matrix with this many scales a row: the largest rectangle inside every 256-run of scales."""
    if NESTED_BLOCK % scale_columns == 0:
        return NESTED_BLOCK // scale_columns, scale_columns
    return 1, math.gcd(scale_columns, NESTED_BLOCK)


def nested_grid(nested: Any, out: int, scale_columns: int) -> Any:
    """[ceil(out*s/256)] nested scales, one per run, laid out as [R, C] cells. numpy in, numpy out; jax likewise."""
    rows, columns = nested_cell_for(scale_columns)
    xp = np if isinstance(nested, np.ndarray) else jnp
    first = xp.arange(0, out, rows)[:, None] * scale_columns + xp.arange(0, scale_columns, columns)[None, :]
    return nested[first // NESTED_BLOCK]


def nested_runs(q: NF4Array) -> np.ndarray:
    """The inverse of nested_grid, on the host: [ceil(out*s/256)] from a single matrix in layout "rows"."""
    assert q.nested_cell is not None
    out, scale_columns = q.scales.shape
    first = np.arange(0, out * scale_columns, NESTED_BLOCK)
    rows, columns = q.nested_cell
    return np.asarray(q.nested_scales)[first // scale_columns // rows, first % scale_columns // columns]


def nf4_partition_specs(q: NF4Array, spec: PartitionSpec) -> NF4Array:
    """An NF4Array of PartitionSpecs, one per leaf, for W laid out by `spec` (which names leading axes too, if any).

    A shard must hold whole blocks, and whole cells of nested scales or, along `in`, a part of the only one.
    """
    if q.layout == "flat":
        if any(axis is not None for axis in spec[-2:]):
            raise ValueError(f"{q} cannot be sharded by {spec}: only layout 'rows' (in a multiple of {BLOCK}) shards.")
        lead = tuple(spec[:-2])
        leaf = PartitionSpec(*lead)
        return dataclasses.replace(q, codes=leaf, scales=leaf, **_nested_specs(q, leaf, lead))
    full = PartitionSpec(*spec, *[None] * (q.ndim - len(spec)))
    *lead, rows, columns = full
    if not q.double_quant:
        return dataclasses.replace(q, codes=full, scales=full)
    assert q.nested_scales is not None
    cells_down, cells_across = q.nested_scales.shape[-2:]
    nested = PartitionSpec(*lead, rows if cells_down > 1 else None, columns if cells_across > 1 else None)
    return dataclasses.replace(q, codes=full, scales=full, **_nested_specs(q, nested, lead))


def _nested_specs(q: NF4Array, nested: PartitionSpec, lead: Any) -> dict[str, Any]:
    return {"nested_scales": nested, "offset": PartitionSpec(*lead)} if q.double_quant else {}


def check_packed(op: str, q: Any, kinds: Any = NF4Array) -> None:
    """Raises a TypeError where a weight that is not packed, say, is given for one that is."""
    if not isinstance(q, kinds):
        raise TypeError(f"{op} takes an NF4Array, as quantize_nf4 makes it of a weight, not {type(q).__name__}.")


def check_nf4(q: NF4Array) -> None:
    """Raises a ValueError that names the leaf whose shape or dtype breaks an invariant of the layout."""
    _check_dtypes(q)
    if q.layout == "rows":
        _check_rows(q)
    elif q.layout == "flat":
        _check_flat(q)
    else:
        raise ValueError(f"NF4Array.layout is {q.layout!r}; it must be 'rows' or 'flat'.")
    lead = q.codes.shape[: q.ndim - 2]
    if q.offset is not None:
        _check_shape("offset", q.offset, lead)


def _check_dtypes(q: NF4Array) -> None:
    if (q.nested_scales is None) != (q.offset is None):
        raise ValueError("NF4Array.nested_scales and NF4Array.offset belong together; give both or neither.")
    expected = {"codes": jnp.uint8, "scales": jnp.uint8 if q.double_quant else jnp.float32}
    if q.double_quant:
        expected |= {"nested_scales": jnp.float32, "offset": jnp.float32}
    for name, dtype in expected.items():
        got = getattr(q, name).dtype
        if got != dtype:
            kind = "double" if q.double_quant else "single"
            raise ValueError(f"NF4Array.{name} is {got}; a {kind}-quantised array has {jnp.dtype(dtype)} there.")
    if q.nested_map is not None and (not q.double_quant or len(q.nested_map) != 256):
        raise ValueError(
            f"NF4Array.nested_map has {len(q.nested_map)} values; it needs 256, and nested scales to go with."
        )


def _check_rows(q: NF4Array) -> None:
    if q.flat_shape is not None:
        raise ValueError(f"NF4Array.flat_shape is {q.flat_shape}; in layout 'rows' the shape is that of the codes.")
    if q.codes.ndim < 2 or q.codes.shape[-1] == 0 or q.codes.shape[-1] % (BLOCK // 2):
        raise ValueError(
            f"NF4Array.codes has shape {q.codes.shape}; layout 'rows' needs [..., out, in/2] of whole blocks."
        )
    *lead, out, half = q.codes.shape
    columns = half // (BLOCK // 2)
    _check_shape("scales", q.scales, (*lead, out, columns))
    if q.nested_scales is None:
        return
    if q.nested_cell is None:
        raise ValueError("NF4Array.nested_cell is None; a double-quantised array in layout 'rows' needs it.")
    rows, across = q.nested_cell
    grid = q.nested_scales.shape[-2:]
    # A shard along `in` of a matrix with one column of cells sees a part of that column, hence "at least".
    fits_across = across >= columns if grid[-1] == 1 else grid[-1] * across == columns
    if q.nested_scales.shape[:-2] != tuple(lead) or grid[0] != -(-out // rows) or not fits_across:
        raise ValueError(
            f"NF4Array.nested_scales has shape {q.nested_scales.shape}; with cells of {q.nested_cell} it does not "
            f"cover scales of shape {q.scales.shape}."
        )


def _check_flat(q: NF4Array) -> None:
    if q.flat_shape is None or q.nested_cell is not None:
        raise ValueError(
            f"{q.flat_shape=}, {q.nested_cell=}: layout 'flat' needs the former and has none of the latter."
        )
    lead, size = q.codes.shape[:-1], math.prod(q.flat_shape)
    if size % 2:
        raise ValueError(f"NF4Array.flat_shape {q.flat_shape} has an odd number of values; 4-bit codes come in pairs.")
    blocks = -(-size // BLOCK)
    _check_shape("codes", q.codes, (*lead, size // 2))
    _check_shape("scales", q.scales, (*lead, blocks))
    if q.nested_scales is not None:
        _check_shape("nested_scales", q.nested_scales, (*lead, -(-blocks // NESTED_BLOCK)))


def _check_shape(name: str, leaf: jax.Array, expected: tuple[int, ...]) -> None:
    if tuple(leaf.shape) != tuple(expected):
        raise ValueError(
            f"NF4Array.{name} has shape {tuple(leaf.shape)}; with leaves like the others it must be {expected}."
        )
