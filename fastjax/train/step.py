"""The training step: a state in, a batch in, a state out, compiled once.

Only the model's `nnx.Param`s are differentiated; everything frozen is passed to the compiled program as an argument.
A batch may carry a leading accumulation axis. On a mesh its rows are split over `data` and `fsdp`, and the positions of
each row over `context`, on each of whose devices the batch's integers lie whole (parallel/sequence.py); the devices of
`tensor` share the work on the same tokens (tensor_parallel.py). What lies where is mesh_layout.py's. Losses and gradients are
summed over all of it and divided once by its number of labelled tokens, so that every split of a batch makes the same update.
Devices sum theirs once a step, after its last micro-batch (over `fsdp` layer by layer, each to keep its part): in full, or as
codes of 8 or 4 bits (parallel/compressed.py), whose rounding errors the state carries on. A step whose gradients are not
finite changes nothing but the count of skipped steps.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from fastjax.errors import UserError
from fastjax.models.decoder import Runs
from fastjax.models.llama import Llama
from fastjax.parallel import compressed
from fastjax.parallel.hosts import mesh_of, onto_mesh
from fastjax.parallel.mesh import BATCH_AXES, TOKEN_AXES, axis_size, summing_devices
from fastjax.parallel.sequence import part_length
from fastjax.train.loss import Batch, LossFn, causal_lm_loss
from fastjax.train.loss_scale import LossScale, all_finite, init_loss_scale, select_tree
from fastjax.train.memory import StepMemory, step_memory
from fastjax.train.mesh_layout import MeshLayout, trained_shardings
from fastjax.train.recompute import choose_runs
from fastjax.train.room import Room, find_room
from fastjax.train.tensor_parallel import AXIS as TENSOR

# Of XLA's settings (bench/results/h200/trials.json): a schedule that hides latencies lets collectives and copies run under
# what does not need them, 1 % on one GPU where nothing is offloaded. XLA's own Triton products win its short trials of a
# product alone and gain nothing in a step, where the card's power is the limit; without them there is less to try out.
GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_enable_latency_hiding_scheduler": True}
BATCH_KEYS = ("input_ids", "labels", "positions", "segment_ids")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes. A pytree: save it, restore it, and training goes on as if never stopped."""

    params: nnx.State  # the model's nnx.Params, float32
    opt_state: optax.OptState
    step: jax.Array  # int32, optimizer updates attempted
    rng: jax.Array  # the key of all dropout; folded with `step`
    loss_scale: LossScale
    skipped: jax.Array  # int32, steps left out for gradients that were not finite
    skipped_in_row: jax.Array  # int32, of which the latest in a row
    owed: compressed.Owed | None = None  # what gradients left out that were sent as codes; in full they leave nothing


class HasModule(Protocol):
    """What carries a model in `.module`, as FastLanguageModel does."""

    @property
    def module(self) -> Llama: ...


def as_module(model: Llama | HasModule) -> Llama:
    """The nnx module of a FastLanguageModel, or the module itself."""
    return model if isinstance(model, Llama) else model.module


def trained_parameters(module: Llama) -> nnx.State:
    """The model's `nnx.Param`s; a model without any is refused."""
    params = nnx.state(module, nnx.Param)
    if not jax.tree.leaves(params):
        raise UserError(
            "the model has nothing to train: attach LoRA with get_peft_model, or load with full_finetuning=True."
        )
    return params


def init_train_state(
    model: Llama | HasModule,
    optax_optimizer: optax.GradientTransformation,
    *,
    seed: int = 3407,
    gradient_reduction: str = "full",
) -> TrainState:
    """The state to start from. Parameters are copied, as a step donates its state's memory to the next one.

    `gradient_reduction` is that of `make_train_step`.
    """
    module = as_module(model)
    params = trained_parameters(module)

    def start(params: nnx.State) -> tuple[nnx.State, Any]:
        return jax.tree.map(jnp.copy, params), optax_optimizer.init(params)

    # one program, where each operation on each leaf would be compiled by itself
    mesh = mesh_of(params)
    opt_state = jax.eval_shape(optax_optimizer.init, params)
    where = None if mesh is None else trained_shardings(params, opt_state, module.config, mesh)
    params, opt_state = jax.jit(start, out_shardings=where)(params)
    # three arrays, not one thrice: donated memory must not be shared
    step, skipped, skipped_in_row = (jnp.zeros((), jnp.int32) for _ in range(3))
    state = TrainState(
        params=params,
        opt_state=opt_state,
        step=step,
        rng=jax.random.key(seed),
        loss_scale=init_loss_scale(module.dtype),
        skipped=skipped,
        skipped_in_row=skipped_in_row,
        owed=compressed.initial_debt(params, mesh, gradient_reduction),
    )
    return onto_mesh(state, mesh)


def make_train_step(
    model: Llama | HasModule,
    optax_optimizer: optax.GradientTransformation,
    mesh: Mesh | None = None,
    gradient_checkpointing: str | bool = "auto",
    loss_fn: LossFn | None = None,
    neftune_noise_alpha: float | None = None,
    gradient_reduction: str = "full",
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """A function (state, batch) -> (state, metrics).

    `batch` holds int32 [B, S], or [A, B, S] to accumulate A micro-batches: input_ids, labels and optionally positions
    and segment_ids. `loss_fn(module, batch)` -> (sum of losses, number of tokens) replaces the language-model loss; as it may
    use the module in any way, on a mesh with fsdp the (packed) weights of all layers are gathered for it, not one at a time.
    `neftune_noise_alpha` adds noise to the embeddings of the language-model loss (Llama.hidden).
    `gradient_reduction`: how devices sum their gradients, "full" in float32, "8bit" or "4bit" (parallel/compressed.py).
    `metrics`: loss (mean over labelled tokens), grad_norm (before clipping), tokens, skipped, skipped_in_row.
    """
    module = as_module(model)
    definition, _, frozen = nnx.split(module, nnx.Param, ...)
    bits = compressed.bits_of(gradient_reduction, summing_devices(mesh))
    layout = None if mesh is None else MeshLayout.of(module, mesh, in_codes=bits is not None)
    for axis in ("tensor", "context"):
        if loss_fn is not None and mesh is not None and axis_size(mesh, axis) > 1:
            raise UserError(
                f"a loss_fn sees whole weights and rows, of which mesh axis {axis} leaves parts: use data and fsdp."
            )
    room = find_room(mesh)  # asked for here, as all processes must take part, and not in the middle of tracing
    gradients = partial(
        _summed_gradients,
        definition=definition,
        loss_fn=loss_fn,
        layout=layout,
        noise_alpha=neftune_noise_alpha,
        bits=bits,
    )

    def update(frozen: nnx.State, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(state.rng, state.step)
        runs = None if loss_fn else _fitting_runs(module, state, batch, gradient_checkpointing, layout, room)
        run = partial(gradients, runs=runs)
        run = run if layout is None else layout.shard(run, batch)
        grads, loss_sum, tokens, owed = run(frozen, state.params, batch, key, state.loss_scale.scale, state.owed)
        tokens_or_one = jnp.maximum(tokens, 1)
        grads = jax.tree.map(lambda g: g / tokens_or_one, state.loss_scale.unscale(grads))
        new_state, metrics = _apply(optax_optimizer, state, grads, loss_sum / tokens_or_one, tokens, owed)
        if layout is not None:  # each step finds the state as the last one did
            params, opt_state = new_state.params, new_state.opt_state
            where = trained_shardings(params, opt_state, module.config, layout.mesh)
            params, opt_state = jax.lax.with_sharding_constraint((params, opt_state), where)
            new_state = dataclasses.replace(new_state, params=params, opt_state=opt_state)
        return new_state, metrics

    compiled = jax.jit(
        update, donate_argnums=1, compiler_options=GPU_OPTIONS if jax.default_backend() == "gpu" else None
    )

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        check_batch(batch, layout.batch_shards if layout else 1)
        if (state.owed is None) != (bits is None):
            raise UserError(
                f"the state was not made for {gradient_reduction=}: give the same to init_train_state and make_train_step."
            )
        return compiled(frozen, state, batch)

    step.lower = lambda state, batch: compiled.lower(frozen, state, batch)  # pyright: ignore[reportFunctionMemberAccess]
    step.trace = lambda state, batch: compiled.trace(frozen, state, batch)  # pyright: ignore[reportFunctionMemberAccess]
    return step


def _fitting_runs(
    module: Llama, state: TrainState, batch: Batch, checkpointing: str | bool, layout: MeshLayout | None, room: Room
) -> Runs:
    """What the backward pass keeps of each layer, by the memory of one device."""
    return choose_runs(checkpointing, memory_of_step(module, state, batch, layout), *room)


def memory_of_step(module: Llama, state: TrainState, batch: Batch, layout: MeshLayout | None) -> StepMemory:
    """What a step takes on one device; arrays may be abstract."""
    *micro_batches, rows, row = batch["input_ids"].shape
    rows //= layout.batch_shards if layout else 1
    length = part_length(row, layout.context) if layout and layout.context > 1 else row
    owed = jax.eval_shape(partial(jax.tree.map, lambda row: row[:1]), state.owed)  # a device has one row of it
    accumulate = bool(micro_batches and micro_batches[0] > 1)
    opt_state = (state.opt_state, owed)
    return step_memory(module, opt_state, rows * length, row=row, accumulate=accumulate, layout=layout)


def make_mesh_loss(model: Llama | HasModule, mesh: Mesh) -> Callable[[nnx.State, Batch], tuple[jax.Array, jax.Array]]:
    """A function (trained parameters, batch [B, S]) -> (sum of the language-model losses, number of labelled tokens).

    Each device does its part, as in a step: left to XLA, all would run kernels, which it cannot divide, on the whole batch.
    """
    definition, _, frozen = nnx.split(as_module(model), nnx.Param, ...)
    layout = MeshLayout.of(as_module(model), mesh)

    def of_part(frozen: nnx.State, params: nnx.State, part: Batch) -> tuple[jax.Array, jax.Array]:
        sums = causal_lm_loss(
            nnx.merge(definition, *layout.gather(params, frozen, part["input_ids"], whole=False)),
            part,
            gather_layer=layout.gather_layer,
            gather_head=layout.gather_head,
            tensor=TENSOR if layout.tensor > 1 else None,
            split=layout.split,
            rows_over=BATCH_AXES,
        )
        return jax.lax.psum(sums, TOKEN_AXES)

    in_specs = (layout.frozen, layout.given, PartitionSpec(BATCH_AXES))
    compiled = jax.jit(
        jax.shard_map(of_part, mesh=layout.mesh, in_specs=in_specs, out_specs=PartitionSpec(), check_vma=False)
    )
    return partial(compiled, frozen)


def check_batch(batch: Batch, shards: int) -> None:
    """Refuse a batch whose keys or shapes the step would misread."""
    unknown = sorted(set(batch) - set(BATCH_KEYS))
    absent = sorted({"input_ids", "labels"} - set(batch))
    if unknown or absent:
        raise UserError(f"batch has {unknown=} and lacks {absent}; it holds {', '.join(BATCH_KEYS)}.")
    shape = batch["input_ids"].shape
    for key, value in batch.items():
        if value.shape != shape or len(shape) not in (2, 3):
            raise UserError(
                f"batch[{key!r}] has shape {value.shape}; all must be [B, S] or [A, B, S], as input_ids {shape}."
            )
    if shape[-2] % shards:
        raise UserError(
            f"a batch of {shape[-2]} rows does not split over {shards} devices; use a multiple of {shards}."
        )


def _apply(
    optimizer: optax.GradientTransformation,
    state: TrainState,
    grads: nnx.State,
    loss: jax.Array,
    tokens: jax.Array,
    owed: compressed.Owed | None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    finite = all_finite(grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    kept = (state.params, state.opt_state, state.owed)
    params, opt_state, owed = select_tree(finite, (params, opt_state, owed), kept)
    skip = 1 - finite.astype(jnp.int32)
    new_state = TrainState(
        params=params,
        opt_state=opt_state,
        step=state.step + 1,
        rng=state.rng,
        loss_scale=state.loss_scale.adjust(finite),
        skipped=state.skipped + skip,
        skipped_in_row=(state.skipped_in_row + 1) * skip,
        owed=owed,
    )
    metrics = {
        "loss": loss,
        "grad_norm": optax.tree.norm(grads),
        "tokens": tokens,
        "skipped": new_state.skipped,
        "skipped_in_row": new_state.skipped_in_row,
    }
    return new_state, metrics


def _summed_gradients(
    frozen: nnx.State,
    params: nnx.State,
    batch: Batch,
    key: jax.Array,
    scale: jax.Array,
    owed: compressed.Owed | None,
    *,
    definition: nnx.GraphDef,
    loss_fn: LossFn | None,
    layout: MeshLayout | None,
    noise_alpha: float | None,
    bits: int | None,
    runs: Runs | None,
) -> tuple[nnx.State, jax.Array, jax.Array, compressed.Owed | None]:
    """Over all micro-batches and devices: scaled gradients of the summed loss, the summed loss, the token count; and what is
    then owed."""
    gather_layer, gather_head, tensor, split, first_row = None, None, 1, None, 0
    if layout is not None:
        gather_layer, gather_head, tensor = layout.gather_layer, layout.gather_head, layout.tensor
        split, first_row = layout.split, jax.lax.axis_index(BATCH_AXES) * batch["input_ids"].shape[-2]
    if batch["input_ids"].ndim == 2:
        batch = {name: value[None] for name, value in batch.items()}
    micro_batches, rows, length = batch["input_ids"].shape
    # cotangents of a sum over tokens would overflow float16: work per token, by a power of two so that nothing rounds
    unit = 1.0 / (1 << (rows * length - 1).bit_length())

    def micro_batch(
        params: nnx.State, part: Batch, part_key: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        states = (params, frozen)
        if layout is not None:
            states = layout.gather(*states, part["input_ids"], whole=loss_fn is not None)
        model = nnx.merge(definition, *states)
        if loss_fn is not None:
            loss_sum, tokens = loss_fn(model, part)
        else:
            noise = None if noise_alpha is None else (jax.random.fold_in(part_key, 1), noise_alpha)
            loss_sum, tokens = causal_lm_loss(
                model,
                part,
                dropout_key=part_key,
                runs=runs,
                gather_layer=gather_layer,
                gather_head=gather_head,
                noise=noise,
                tensor=TENSOR if tensor > 1 else None,
                split=split,
                first_row=first_row,
                rows_over=() if layout is None else BATCH_AXES,
            )
        return loss_sum * (scale * unit), (loss_sum, tokens)

    differentiate = jax.grad(micro_batch, has_aux=True)
    keys = jax.random.split(key, micro_batches)
    if micro_batches == 1:
        total = differentiate(params, {name: value[0] for name, value in batch.items()}, keys[0])
    else:
        zeros = (jax.tree.map(jnp.zeros_like, params), (jnp.float32(0), jnp.float32(0)))

        def accumulate(so_far: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, so_far, differentiate(params, *part)), None

        total, _ = jax.lax.scan(accumulate, zeros, (batch, keys))
    if layout is not None:
        total, owed = layout.summed(total, owed, scale * unit, bits)
    grads, (loss_sum, tokens) = total
    return jax.tree.map(lambda g: g / unit, grads), loss_sum, tokens, owed
