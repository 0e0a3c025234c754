"""The stack of decoder layers: which layers keep what for the backward pass, and how they are compiled.

Forward runs the layers in order, backward in reverse; gradients of trained parameters come out stacked like the
parameters. What a layer keeps is its policy:

    none      all that its backward pass needs (decoder_layer.py lists it)
    full      its input alone; the layer is run again, its widest half a part of the tokens at a time
    offload   its input, q, k, v and attention's output, in pinned host memory, copied there and back while layers compute;
              only what leads from there to the next layer is run again
    offload_o the same without q, k and v, which are made again: of long rows, half of what the host would have to hold

On its way back, what a layer needs first (its input and attention's output) is fetched while the layer after it is at
work, and q, k and v, which it needs last, while it is at work itself.

Layers of one policy form a run. A run is either compiled once and looped over, or each layer in line: the loop is small
and quick to compile, but copies what it keeps into and out of stacks; the same arithmetic either way.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from fastjax.models.decoder_layer import (
    DecoderLayer,
    carried_room,
    layer_backward,
    layer_backward_again,
    layer_forward,
    layer_output,
)
from fastjax.models.saved import Attended, Context
from pallas_kernels.nf4 import NF4Array, NF4Slice
from pallas_kernels.ordering import after, zero_after

Policy = Literal["none", "full", "offload", "offload_o"]
POLICIES: tuple[Policy, ...] = get_args(Policy)
OFFLOADS = ("offload", "offload_o")
Runs = tuple[tuple[Policy, int], ...]  # (policy, number of layers), in order


class Gather(Protocol):
    """Makes a layer's parameters whole before use, in either pass, of a model whose layers are divided over devices."""

    def __call__(self, layer: Any) -> Any: ...

    def scatter(self, gradients: Any) -> Any:
        """This device's part of what all devices found of a layer's gradients, summed."""
        ...


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which layers keep what, and whether a run of layers is looped over or compiled in line."""

    runs: Runs
    loop: bool

    def loops(self, policy: Policy) -> bool:
        """In line are only layers that keep all, whose copies into stacks would cost time. The others keep little, and in
        line they take more memory: XLA makes buffers of a layer's inner loops for many layers at once, and leaves on the
        device what in one program goes to the host and back with nothing between.
        """
        return self.loop or policy != "none"

    def __post_init__(self) -> None:
        unknown = sorted({policy for policy, _ in self.runs} - set(POLICIES))
        if unknown or any(count < 1 for _, count in self.runs):
            raise ValueError(f"{self.runs=} must be (policy, layers) with policies of {POLICIES}.")


def run_decoder(
    layers: DecoderLayer,
    x: Float[Array, "T H"],
    context: Context,
    keys: jax.Array | None,
    plan: Plan,
    gather: Gather | None = None,
) -> Float[Array, "T H"]:
    """x through all layers. `keys` [L] turn LoRA dropout on.

    Sharded training passes the collectives that make a layer whole, `gather`.
    """
    definition, params, frozen = nnx.split(layers, nnx.Param, ...)
    stack = _Stack(definition, plan, gather)
    return _decode(stack, params, frozen, x, context, keys)


def layer_of(
    definition: nnx.GraphDef, state: nnx.State, index: jax.Array, gather: Callable[[Any], Any] | None = None
) -> DecoderLayer:
    """One layer of a stack. Packed weights stay in the stack, for kernels that find theirs by the index."""

    def of_layer(leaf: Any) -> Any:
        if isinstance(leaf, NF4Array) and not gather:
            return NF4Slice(leaf, index)
        return jax.tree.map(lambda x: x[index], leaf)

    state = jax.tree.map(of_layer, state, is_leaf=lambda leaf: isinstance(leaf, NF4Array))
    return nnx.merge(definition, gather(state) if gather else state)


@dataclasses.dataclass(frozen=True)
class _Stack:
    """All of a pass that is not an array."""

    definition: nnx.GraphDef
    plan: Plan
    gather: Gather | None

    def layer(self, params: nnx.State, frozen: nnx.State, index: jax.Array) -> DecoderLayer:
        return layer_of(self.definition, nnx.merge_state(params, frozen), index, self.gather)

    def forward(self, policy: Policy, shared: Sequence[Any], x: jax.Array, index: jax.Array) -> tuple[jax.Array, Any]:
        """One layer: its output and what its policy keeps."""
        params, frozen, context, keys = shared
        key = None if keys is None else keys[index]
        layer = self.layer(params, frozen, index)
        if policy == "none":
            return layer_forward(layer, x, context, key)
        y, first = layer_output(layer, x, context, key)
        if policy == "full":
            return y, x
        return y, _to_host((x, Attended.of(first, with_qkv=policy == "offload")))

    def backward(
        self, policy: Policy, shared: Sequence[Any], g: jax.Array, index: jax.Array, kept: Any
    ) -> tuple[jax.Array, nnx.State]:
        """One layer: dx, and the gradients of its trained parameters as a State like theirs."""
        params, frozen, context, keys = shared
        layer, key = self.layer(params, frozen, index), None if keys is None else keys[index]
        # a gradient that is never set stays None, and then the tree does not fit that of the parameters
        unset = jax.tree.map(lambda _: None, params)
        gradients = nnx.merge(self.definition, unset, frozen)
        # what is made again waits for g: run earlier, or shared with the forward pass, it would fill the memory
        if policy == "none":
            first = dataclasses.replace(kept.first, x=after(kept.first.x, g))
            kept = dataclasses.replace(kept, first=first, m=after(kept.m, g))
            dx = layer_backward(layer, gradients, kept, context, key, g)
        else:
            x, attended = (kept, None) if policy == "full" else kept
            dx = layer_backward_again(layer, gradients, after(x, g), attended, context, key, g)
        gradients = nnx.state(gradients, nnx.Param)
        gradients = self.gather.scatter(gradients) if self.gather else gradients
        # nothing else waits for these: put off to the end of the pass, they would keep what they are made of until then
        return after(dx, *jax.tree.leaves(gradients)), gradients


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _decode(
    stack: _Stack, params: nnx.State, frozen: nnx.State, x: jax.Array, context: Context, keys: Any
) -> jax.Array:
    # undifferentiated, nothing is kept; "full" says so at the least cost
    plan = dataclasses.replace(stack.plan, runs=(("full", sum(count for _, count in stack.plan.runs)),))
    return _decode_forward(dataclasses.replace(stack, plan=plan), params, frozen, x, context, keys)[0]


def _decode_forward(
    stack: _Stack, params: nnx.State, frozen: nnx.State, x: jax.Array, context: Context, keys: Any
) -> tuple[jax.Array, tuple]:
    shared, kept, start = (params, frozen, context, keys), [], 0
    for policy, count in stack.plan.runs:
        layers = range(start, start + count)
        run = _loop if stack.plan.loops(policy) else _in_line
        x, of_run = run(functools.partial(stack.forward, policy), shared, x, layers)
        kept.append(of_run)
        start += count
    return x, (*shared, kept)


def _decode_backward(stack: _Stack, saved: tuple, g: jax.Array) -> tuple:
    *shared, kept = saved
    params, frozen = shared[:2]
    gradients, stop = [], sum(count for _, count in stack.plan.runs)
    width, zero = g.shape[1], zero_after(g) if stack.gather else 0
    g = jnp.pad(g, ((0, 0), (0, carried_room(nnx.merge(stack.definition, params, frozen)))))
    for (policy, count), of_run in zip(reversed(stack.plan.runs), reversed(kept), strict=True):
        one_layer, layers = functools.partial(stack.backward, policy), range(stop - 1, stop - count - 1, -1)
        if policy in OFFLOADS:
            g, run_gradients = _fetching_loop(one_layer, shared, g, layers, of_run)
        elif stack.plan.loops(policy):
            g, run_gradients = _loop(one_layer, shared, g, layers, of_run)
        else:
            g, run_gradients = _in_line(one_layer, shared, g, layers, of_run, zero=zero)
            run_gradients = jax.tree.map(lambda *leaves: jnp.stack(leaves), *run_gradients)
        gradients.insert(0, run_gradients)
        stop -= count
    return jax.tree.map(lambda *runs: jnp.concatenate(runs), *gradients), None, g[:, :width], None, None


_decode.defvjp(_decode_forward, _decode_backward)


def _loop(
    one_layer: Callable, shared: Sequence[Any], carry: jax.Array, layers: range, *per_layer: Any
) -> tuple[jax.Array, Any]:
    """carry through one_layer(shared, carry, index, *its own of per_layer), in a loop; what else it returns, stacked.

    Stacks are in the model's order, whichever way `layers` runs.
    """
    indices = jnp.array(sorted(layers), jnp.int32)
    return jax.lax.scan(
        lambda x, row: one_layer(shared, x, *row), carry, (indices, *per_layer), reverse=layers.step < 0
    )


def _fetching_loop(
    one_layer: Callable, shared: Sequence[Any], carry: jax.Array, layers: range, kept: Any
) -> tuple[jax.Array, Any]:
    """`_loop` backwards over layers whose rows of `kept` lie in host memory. The first of what a layer needs is carried to
    it, fetched while the layer before it in this order is at work.
    """
    x, attended = kept
    needed_first = (x, dataclasses.replace(attended, qkv=None))
    indices = jnp.array(sorted(layers), jnp.int32)

    def fetch(place: jax.Array) -> Any:
        return _to_device(jax.tree.map(lambda rows: _row(rows, place), needed_first))

    def turn(carry: Any, row: Any) -> Any:
        g, (x, attended) = carry
        index, qkv = row
        following = fetch(jnp.maximum(index - indices[0] - 1, 0))
        g, of_layer = one_layer(shared, g, index, (x, dataclasses.replace(attended, qkv=_to_device(qkv))))
        return (g, following), of_layer

    # the last row's place is computed: of a constant one XLA makes a copy out of the whole stack
    last = zero_after(carry) + len(layers) - 1
    (carry, _), of_layers = jax.lax.scan(turn, (carry, fetch(last)), (indices, attended.qkv), reverse=True)
    return carry, of_layers


def _row(rows: jax.Array, place: jax.Array) -> jax.Array:
    """rows[place] for a place that is there, in the form that XLA knows as a copy out of host memory."""
    starts = (place, *[0] * (rows.ndim - 1))
    row = jax.lax.dynamic_slice(rows, starts, (1, *rows.shape[1:]), allow_negative_indices=False)
    return jax.lax.squeeze(row, (0,))


def _to_host(tree: Any) -> Any:
    return jax.device_put(tree, jax.memory.Space.Host)


def _to_device(tree: Any) -> Any:
    return jax.device_put(tree, jax.memory.Space.Device)


def _in_line(
    one_layer: Callable, shared: Sequence[Any], carry: jax.Array, layers: range, *per_layer: list, zero: Any = 0
) -> tuple[jax.Array, list]:
    """The same, layer after layer in one program; lists where `_loop` has stacks.

    The layer is traced and lowered once, as a function that the program calls; the compiler puts it in line. It would also
    gather a layer's weights once for both passes, and keep them in between: a `zero` that only the backward pass knows,
    from its start on, makes them two gatherings.
    """
    first, others, layer = min(layers), {}, jax.jit(one_layer)
    for index in layers:
        own = [rows[index - first] for rows in per_layer]
        carry, others[index] = layer(shared, carry, jnp.int32(index) + zero, *own)
    return carry, [others[index] for index in sorted(others)]
