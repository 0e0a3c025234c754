"""bitsandbytes' serialised NF4, in and out: the same values, another order of bytes.

A Hugging Face checkpoint holds, for a linear's weight W [out, in] named X:

    X                                     uint8 [n/2, 1], n = out * in; or the same bytes as a wider dtype
    X.absmax                              float32 [blocks], or uint8 [blocks] codes under double quantisation
    X.quant_map                           float32 [16], the NF4 levels
    X.nested_absmax                       float32 [ceil(blocks/256)]     } double
    X.nested_quant_map                    float32 [256]                  } quantisation
    X.quant_state.bitsandbytes__nf4       uint8, JSON: quant_type, blocksize, dtype, shape and, doubly quantised,
                                          nested_blocksize, nested_dtype, nested_offset

Byte k holds value 2k in its high nibble and value 2k+1 in its low one, in row-major order of W; `NF4Array` pairs value
j of a block with value j + m/2 (m = 64, or less in a last, partial block). bitsandbytes decodes with its own levels,
whatever quant_map says, so one that says otherwise is an error; nested_quant_map it does use, and one that differs
from the usual one, if only in the last bit of some entries as other machines round it, is kept with the array.

All of this runs on the host, on numpy arrays, and gives numpy arrays: the caller places them.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from fastjax.weights.errors import (
    MissingTensorsError,
    NonFiniteWeightError,
    QuantizedCheckpointError,
    TensorShapeError,
)
from pallas_kernels.nf4 import NF4Array, check_nf4
from pallas_kernels.nf4.array import nested_cell_for, nested_grid, nested_runs
from pallas_kernels.nf4.codebook import BLOCK, NESTED_BLOCK, NF4_LEVELS, dynamic_map

STATE = "quant_state.bitsandbytes__nf4"
LEVEL_TOLERANCE = 1e-6  # what bitsandbytes itself takes for the same map
WEIGHT_DTYPES = ("float32", "bfloat16", "float16")
State = dict[str, Any]


def nf4_from_bnb(tensors: Mapping[str, Any], name: str = "weight") -> NF4Array:
    """The packed weight called `name` in a bitsandbytes checkpoint, as an NF4Array of numpy arrays.

    Args:
        tensors: numpy or jax arrays by full name, at least those listed in this module's docstring.
        name: the weight's, such as "model.layers.0.mlp.up_proj.weight".
    """
    state = _read_state(tensors, name)
    out, columns = state["shape"]
    size = out * columns
    blocks = -(-size // BLOCK)
    codes = _from_bnb_order(_flat(tensors, name, size // 2, as_bytes=True))
    nested, offset, nested_map = _read_nested(tensors, name, state, blocks)
    if nested is None:
        scales = _finite(_flat(tensors, f"{name}.absmax", blocks), f"{name}.absmax")
    else:
        scales = _flat(tensors, f"{name}.absmax", blocks, as_bytes=True)
    if columns % BLOCK:
        layout: dict[str, Any] = {"layout": "flat", "flat_shape": (out, columns)}
    else:
        scale_columns = columns // BLOCK
        codes, scales, layout = codes.reshape(out, -1), scales.reshape(out, -1), {}
        if nested is not None:
            nested, layout = nested_grid(nested, out, scale_columns), {"nested_cell": nested_cell_for(scale_columns)}
    parts: Any = (codes, scales, nested, offset)  # numpy arrays, where NF4Array is annotated with jax's
    q = NF4Array(*parts, nested_map=nested_map, **layout)
    check_nf4(q)
    return q


def nf4_to_bnb(q: NF4Array, dtype: Any, name: str = "weight") -> dict[str, np.ndarray]:
    """The tensors that a bitsandbytes checkpoint holds for one packed matrix [out, in], by full name.

    Args:
        q: the packed weight, not a stack.
        dtype: what bitsandbytes is to unpack it to: float32, bfloat16 or float16.
        name: the weight's.
    """
    check_nf4(q)
    dtype_name = jnp.dtype(dtype).name
    if q.ndim != 2:
        raise ValueError(f"nf4_to_bnb writes one matrix [out, in], but {q.shape=}; index the leaves of the stack.")
    if dtype_name not in WEIGHT_DTYPES:
        raise ValueError(f"nf4_to_bnb: {dtype=} is not a dtype of weights; choose one of {', '.join(WEIGHT_DTYPES)}.")
    tensors = {
        name: _to_bnb_order(np.asarray(q.codes).reshape(-1)).reshape(-1, 1),
        f"{name}.absmax": np.asarray(q.scales).reshape(-1),
        f"{name}.quant_map": NF4_LEVELS.copy(),
    }
    state: State = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": dtype_name, "shape": list(q.shape)}
    if q.double_quant:
        nested = nested_runs(q) if q.layout == "rows" else np.asarray(q.nested_scales)
        tensors[f"{name}.nested_absmax"] = nested
        standard = q.nested_map is None
        tensors[f"{name}.nested_quant_map"] = dynamic_map().copy() if standard else np.array(q.nested_map, np.float32)
        offset = float(np.asarray(q.offset))
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
    tensors[f"{name}.{STATE}"] = np.frombuffer(json.dumps(state).encode(), np.uint8).copy()
    return tensors


def _from_bnb_order(packed: np.ndarray) -> np.ndarray:
    """bitsandbytes' bytes [n/2] -> NF4Array's."""

    def repack(block: np.ndarray) -> np.ndarray:
        values = np.stack([block >> 4, block & 15], axis=-1).reshape(len(block), -1)
        low, high = np.split(values, 2, axis=1)
        return low | (high << 4)

    return _map_blocks(repack, packed)


def _to_bnb_order(packed: np.ndarray) -> np.ndarray:
    """NF4Array's bytes [n/2] -> bitsandbytes'."""

    def repack(block: np.ndarray) -> np.ndarray:
        values = np.concatenate([block & 15, block >> 4], axis=1)
        return (values[:, 0::2] << 4) | values[:, 1::2]

    return _map_blocks(repack, packed)


def _map_blocks(function: Callable[[np.ndarray], np.ndarray], packed: np.ndarray) -> np.ndarray:
    """function([blocks, bytes]) of all whole blocks, and of the last if it is partial."""
    full = packed.size // (BLOCK // 2) * (BLOCK // 2)
    parts = [packed[:full].reshape(-1, BLOCK // 2), packed[full:].reshape(1, -1)]
    return np.concatenate([function(part).reshape(-1) for part in parts if part.size])


def _read_state(tensors: Mapping[str, Any], name: str) -> State:
    """The JSON beside the weight, checked."""
    others = [key for key in tensors if key.startswith(f"{name}.quant_state.") and key != f"{name}.{STATE}"]
    if others:
        raise QuantizedCheckpointError(
            f"{others[0]} says that {name} is not NF4, the only format supported; quantise the model to it."
        )
    key = f"{name}.{STATE}"
    try:
        state = json.loads(np.asarray(_get(tensors, key), np.uint8).tobytes())
        quant_type, block, (out, columns) = state["quant_type"], state["blocksize"], state["shape"]
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, MissingTensorsError):
            raise
        raise QuantizedCheckpointError(
            f"{key} is not the JSON that bitsandbytes writes for a matrix ({error!r}); save the model again."
        ) from error
    if quant_type != "nf4" or block != BLOCK:
        raise QuantizedCheckpointError(
            f"{name} is quantised to {quant_type} in blocks of {block}; only nf4 in blocks of {BLOCK} is "
            "supported, quantise the model again."
        )
    if out * columns % 2 or out * columns == 0:
        raise QuantizedCheckpointError(f"{name} has shape {[out, columns]}; NF4 needs an even number of values.")
    _check_levels(tensors, f"{name}.quant_map")
    return state


def _check_levels(tensors: Mapping[str, Any], key: str) -> None:
    levels = _flat(tensors, key, NF4_LEVELS.size)
    if not np.allclose(levels, NF4_LEVELS, rtol=0, atol=LEVEL_TOLERANCE):
        raise QuantizedCheckpointError(
            f"{key} does not hold the levels of NF4, by which codes are decoded; quantise the model again."
        )


def _read_nested(
    tensors: Mapping[str, Any], name: str, state: State, blocks: int
) -> tuple[np.ndarray | None, np.ndarray | None, tuple[float, ...] | None]:
    """Nested scales [ceil(blocks/256)], offset [] and the map if it is not the usual one; or three times None."""
    if "nested_offset" not in state:
        return None, None, None
    if state.get("nested_blocksize") != NESTED_BLOCK:
        raise QuantizedCheckpointError(
            f"{name} has nested blocks of {state.get('nested_blocksize')} scales; only {NESTED_BLOCK} is "
            "supported, quantise the model again."
        )
    key = f"{name}.nested_absmax"
    nested = _finite(_flat(tensors, key, -(-blocks // NESTED_BLOCK)), key)
    offset = _finite(np.array(state["nested_offset"], np.float32), f"{name}.{STATE}")
    entries = _finite(_flat(tensors, f"{name}.nested_quant_map", 256), f"{name}.nested_quant_map")
    usual = np.array_equal(entries.view(np.uint32), dynamic_map().view(np.uint32))
    return nested, offset, None if usual else tuple(map(float, entries))


def _get(tensors: Mapping[str, Any], key: str) -> np.ndarray:
    if key not in tensors:
        raise MissingTensorsError(f"the checkpoint lacks {key}, which belongs to an NF4 weight; complete the files.")
    return np.asarray(tensors[key])


def _flat(tensors: Mapping[str, Any], key: str, size: int, *, as_bytes: bool = False) -> np.ndarray:
    """A tensor as one dimension of uint8 (any dtype's bytes) or of float32, of this size."""
    array = _get(tensors, key)
    if as_bytes:
        array = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    elif array.dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        array = array.reshape(-1).astype(np.float32)
    else:
        raise QuantizedCheckpointError(
            f"{key} has dtype {array.dtype}, where bitsandbytes writes float32; save the model again."
        )
    if array.size != size:
        raise TensorShapeError(
            f"{key} has {array.size} values, not {size} as its quant_state says; save the model again."
        )
    return array


def _finite(array: np.ndarray, key: str) -> np.ndarray:
    if not np.isfinite(array).all():
        raise NonFiniteWeightError(f"{key} holds NaN or Inf; the checkpoint is damaged, quantise the model again.")
    return array
