"""Device memory of a training step, counted before anything runs.

    static      weights, trained parameters (the model keeps those it started with, the state has its own), their gradients
                (twice when micro-batches accumulate), optimizer state
    kept        what the forward pass leaves of each layer to the backward pass; decoder.py names the policies
    at work     the largest set of temporaries alive at once beside those: in the loss, or in one layer

Weights and states are counted leaf by leaf, from the arrays or from their shapes alone; on a mesh, of each leaf the part that
a device has (mesh_layout.py), and what it gathers is at work: two layers, packed as they are, and in the loss the head.
Temporaries follow from the order of computation in decoder_layer.py and linear_cross_entropy, T tokens at a time:

    one layer   at the MLP's backward: dy, dn, n [T, H], dgate_up [T, 2M], h [T, M], dh [T, M], one unpacked weight
    run again   x, m [T, H], q, k, v, o, and the larger of two: the MLP as above with its gate_up, a part of the tokens at
                a time, beside dy and dm; or attention's backward: dm, u, du [T, H], do, dq, dk, dv, dqkv, sums of dq in float32
    offloaded   as run again; with o, also the next layer's x and o, ahead on their way from the host
    the ring    where rows are divided over devices, attention's backward: dm, u [T, H], do; pairs of q, o, do, dq; two
                visitors' k and v, pairs of them; in float32 the sums of dq, and of dk and dv on their way
    loss        hidden, its copy without ignored rows, its gradient [T, H], one chunk of logits

On several devices what whole layers keep takes two thirds more, as recorded with data, fsdp and tensor (scaling.json): XLA
makes more buffers of it there.

Peaks: at the end of the forward pass all layers' kept rows and the loss at work; then the backward pass of each run of
layers beside what it and the runs before it kept: what those after it kept is gone. A test holds this to
within 5 % of the peaks recorded on one H200 and on several. Not counted is what XLA takes while it compiles and tries out
products, some 2 GiB at 8B beside weights and states: it shows only where a step takes less than that.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fastjax.models.config import LlamaConfig
from fastjax.models.decoder import OFFLOADS, POLICIES, Policy, Runs
from fastjax.models.decoder_layer import parts_of
from fastjax.models.llama import Llama
from fastjax.parallel.collectives import split_dimension
from fastjax.parallel.mesh import axis_size
from fastjax.train.mesh_layout import FSDP, MeshLayout, optimizer_specs, parts
from fastjax.train.param_rules import names
from pallas_kernels.linear_cross_entropy.chunks import chunk_rows


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """Bytes on one device."""

    layers: int
    weights: int
    trained: int
    optimizer: int
    gradients: int
    kept: dict[Policy, int]  # of one layer
    layer_work: int  # of a layer that kept all
    again_work: int  # of a layer that is run again
    loss_work: int
    ahead: int  # of a layer fetched from the host while another is at work
    host: dict[Policy, int]  # of one layer, in host memory
    row: int  # tokens of a row
    rows: int = 1  # at a time

    @property
    def static(self) -> int:
        return self.weights + 2 * self.trained + self.optimizer + self.gradients

    def activations(self, runs: Runs) -> int:
        """The most that is alive at once of kept rows and temporaries."""
        kept, peaks = 0, []
        for policy, count in runs:
            kept += self.kept[policy] * count
            work = self.layer_work if policy == "none" else self.again_work
            peaks.append(kept + work + (self.ahead if policy == "offload_o" else 0))
        return max(*peaks, kept + self.loss_work)

    def on_host(self, runs: Runs) -> int:
        return sum(self.host[policy] * count for policy, count in runs)

    def peak(self, runs: Runs) -> int:
        return self.static + self.activations(runs)


def step_memory(
    model: Llama,
    opt_state: Any,
    tokens: int,
    *,
    row: int | None = None,
    accumulate: bool = False,
    layout: MeshLayout | None = None,
) -> StepMemory:
    """Of a step with micro-batches of `tokens` a device, on one that has its part of a mesh, in rows of `row` tokens, or a
    single one. Only shapes and dtypes are read: all may be abstract.
    """
    params, frozen = nnx.state(model, nnx.Param), nnx.state(model, nnx.Not(nnx.Param))
    held, whole, of_layers, outside = (params, frozen, opt_state, params), None, 0, 0
    if layout is not None:
        states = optimizer_specs(opt_state, params, layout.trained, layout.mesh)
        specs = (layout.trained, layout.frozen, states, layout.given)
        held = tuple(parts(tree, of, layout.mesh) for tree, of in zip(held, specs, strict=True))
        whole = params if layout.in_codes else None  # the step is given whole ones
        of_layers, outside = gathered_bytes(params, frozen, layout)
    trained, weights, optimizer, gradients = map(tree_bytes, held)
    config, itemsize = model.config.share(1 if layout is None else layout.tensor), model.dtype.itemsize
    kept: dict[Policy, int] = {policy: kept_bytes(config, itemsize, tokens, policy) for policy in POLICIES}
    if layout is not None and math.prod(layout.mesh.shape.values()) > 1:
        kept["none"] = kept["none"] * 5 // 3
    ring = layout is not None and layout.split is not None
    ring_work = ring_work_bytes(config, itemsize, tokens) if ring else 0
    return StepMemory(
        layers=config.num_layers,
        weights=weights,
        trained=trained,
        optimizer=optimizer,
        gradients=gradients * (2 if accumulate else 1) + tree_bytes(whole),
        kept=kept,
        layer_work=max(layer_work_bytes(config, itemsize, tokens), ring_work) + of_layers,
        again_work=again_work_bytes(config, itemsize, tokens, ring_work) + of_layers,
        loss_work=loss_work_bytes(config, itemsize, tokens) + outside,
        ahead=sent_bytes(config, itemsize, tokens, "offload_o"),
        row=row or tokens,
        rows=max(1, tokens * (1 if layout is None else layout.context) // (row or tokens)),
        host={policy: sent_bytes(config, itemsize, tokens, policy) for policy in POLICIES},
    )


def gathered_bytes(params: Any, frozen: Any, layout: MeshLayout) -> tuple[int, int]:
    """What is whole for a while of what fsdp splits: (in the layers, in the loss).

    One layer runs while the next is on its way; trained weights have their gradients beside them. The head and the
    embedding are gathered by themselves, at other times.
    """
    of_layers = outside = 0
    for tree, specs, gradients in ((frozen, layout.frozen, 0), (params, layout.given, 1)):
        leaves, _ = jax.tree_util.tree_flatten_with_path(parts(tree, specs, layout.mesh))
        for (path, part), spec in zip(leaves, jax.tree.leaves(specs), strict=True):
            if split_dimension(spec, FSDP) is None:
                continue
            size = tree_bytes(part) * axis_size(layout.mesh, FSDP)
            if names(path)[0] == "layers":
                of_layers += (2 + gradients) * size // part.shape[0]
            else:
                outside = max(outside, (1 + gradients) * size)
    return of_layers, outside


def tree_bytes(tree: Any) -> int:
    return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree) if hasattr(leaf, "size"))


def kept_bytes(config: LlamaConfig, itemsize: int, tokens: int, policy: Policy) -> int:
    """On the device, of one layer: decoder_layer.Saved, LoRA's low-rank products left out as too small to matter."""
    if policy in OFFLOADS:
        return 0
    if policy == "full":
        return tokens * config.hidden_size * itemsize
    heads = config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
    row = 2 * config.hidden_size + heads + 2 * config.intermediate_size
    return tokens * (row * itemsize + 4 * config.num_heads)


def sent_bytes(config: LlamaConfig, itemsize: int, tokens: int, policy: Policy) -> int:
    """To the host, of one layer: x, and o with its log-sum-exp."""
    if policy not in OFFLOADS:
        return 0
    attended = config.num_heads * (config.head_dim * itemsize + 4) if policy == "offload_o" else 0
    return tokens * (config.hidden_size * itemsize + attended)


def layer_work_bytes(config: LlamaConfig, itemsize: int, tokens: int) -> int:
    weight = 2 * config.intermediate_size * config.hidden_size
    return (tokens * (3 * config.hidden_size + 4 * config.intermediate_size) + weight) * itemsize


def again_work_bytes(config: LlamaConfig, itemsize: int, tokens: int, ring_work: int = 0) -> int:
    hidden, queries, keys = config.hidden_size, *(n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
    held = tokens * ((2 * hidden + 2 * queries + 2 * keys) * itemsize + 4 * config.num_heads)
    part = tokens // parts_of(tokens)
    mlp = (
        layer_work_bytes(config, itemsize, part)
        + (2 * config.intermediate_size * part + 2 * hidden * tokens) * itemsize
    )
    # of long rows the gradient of q is summed in float32
    attention = tokens * ((3 * hidden + 3 * queries + 4 * keys) * itemsize + 4 * queries)
    return held + max(mlp, attention, ring_work)


def ring_work_bytes(config: LlamaConfig, itemsize: int, tokens: int) -> int:
    queries, keys = (heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads))
    return tokens * ((2 * config.hidden_size + 5 * queries + 8 * keys) * itemsize + 4 * (queries + 4 * keys))


def loss_work_bytes(config: LlamaConfig, itemsize: int, tokens: int) -> int:
    chunk = chunk_rows(tokens, config.vocab_size, itemsize) * config.vocab_size * (4 + itemsize)
    return 3 * tokens * config.hidden_size * itemsize + chunk
