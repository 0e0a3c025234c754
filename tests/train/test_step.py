"""The step: any split of a batch makes the same update; bad steps are skipped; nothing frozen is kept twice."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from fastjax import init_train_state, make_mesh, make_train_step
from fastjax.errors import UserError
from fastjax.lora import LoraConfig, add_lora, lora_modules
from fastjax.models import Llama, LlamaConfig, decoder_layer, init_weights, param_specs
from fastjax.models.layers import Frozen
from fastjax.parallel.rules import partition_spec
from fastjax.parallel.traffic import sent_bytes
from fastjax.train.loss import causal_lm_loss
from fastjax.train.optimizers import make_optimizer
from pallas_kernels import NF4Array, dequantize_nf4, quantize_nf4

Batch = dict[str, np.ndarray]

CONFIG = LlamaConfig(
    vocab_size=101,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    initializer_range=0.1,
)


def make_lora_model(dtype: Any = jnp.float32, packed: bool = False, **options: Any) -> Llama:
    """A frozen base with LoRA whose B is drawn at random, so that every gradient is alive."""
    weights: dict[str, Any] = jax.tree.map(lambda w: w.astype(dtype), init_weights(CONFIG, jax.random.key(0)))
    for name, spec in param_specs(CONFIG).items():
        if packed and spec.quantize:
            layers = [quantize_nf4(layer) for layer in weights[name]]
            weights[name] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    model = Llama(CONFIG, weights, dtype=dtype)
    add_lora(model, LoraConfig.create(**{"r": 4, "lora_alpha": 8} | options))
    for index, lora in enumerate(lora_modules(model).values()):
        lora.b[...] = 0.1 * jax.random.normal(jax.random.key(index), lora.b[...].shape)
    return model


def draw_batch() -> Batch:
    """Rows of unequal lengths, padded on the right, some with an unlabelled prompt."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1, CONFIG.vocab_size, (8, 24)).astype(np.int32)
    segment_ids = (np.arange(24) < rng.integers(8, 25, 8)[:, None]).astype(np.int32)
    labels = np.where(segment_ids == 1, ids, -100).astype(np.int32)
    labels[::3, :5] = -100
    return {"input_ids": ids * segment_ids, "labels": labels, "segment_ids": segment_ids}


@pytest.fixture
def batch() -> Batch:
    return draw_batch()


def gradients(model: Llama, batch: Batch, **options: Any) -> tuple[float, float, list[np.ndarray]]:
    """Loss, tokens and gradients of one step, read off an update with plain SGD at rate 1."""
    optimizer = optax.sgd(1.0)
    state = init_train_state(model, optimizer)
    before = [np.array(leaf) for leaf in jax.tree.leaves(state.params)]
    state, metrics = make_train_step(model, optimizer, **options)(state, as_arrays(batch))
    after = [np.array(leaf) for leaf in jax.tree.leaves(state.params)]
    return float(metrics["loss"]), float(metrics["tokens"]), [b - a for b, a in zip(before, after, strict=True)]


def as_arrays(batch: Batch) -> dict[str, jax.Array]:
    return {name: jnp.asarray(value) for name, value in batch.items()}


def assert_same(ours: tuple, reference: tuple, tolerance: float = 1e-5) -> None:
    assert ours[0] == pytest.approx(reference[0], rel=tolerance)
    assert ours[1] == reference[1]
    for mine, theirs in zip(ours[2], reference[2], strict=True):
        # read off an update, gradients carry the rounding of the parameters they were taken from
        assert np.linalg.norm(mine - theirs) <= tolerance * np.linalg.norm(theirs) + 1e-7 * mine.size**0.5


def test_accumulation_changes_nothing(batch: Batch) -> None:
    """Of eight micro-batches; of two on all meshes: test_tensor_parallel.py."""
    model = make_lora_model()
    split = {name: value[:, None] for name, value in batch.items()}
    assert_same(gradients(model, split), gradients(model, batch))


def test_padding_changes_nothing(batch: Batch) -> None:
    model = make_lora_model()
    fill = {"input_ids": 7, "labels": -100, "segment_ids": 0}
    padded = {
        name: np.pad(value, ((0, 3), (0, 9)), constant_values=fill[name]).astype(np.int32)
        for name, value in batch.items()
    }
    assert_same(gradients(model, padded), gradients(model, batch))


def test_packing_changes_nothing(batch: Batch) -> None:
    """Two documents in a row, told apart by segment ids, against one a row."""
    model = make_lora_model()
    lengths = batch["segment_ids"].sum(axis=1)
    packed = {
        "input_ids": np.zeros((4, 48), np.int32),
        "labels": np.full((4, 48), -100, np.int32),
        "segment_ids": np.zeros((4, 48), np.int32),
    }
    for row in range(8):
        start = 0 if row % 2 == 0 else lengths[row - 1]
        where = slice(start, start + lengths[row])
        for name in ("input_ids", "labels"):
            packed[name][row // 2, where] = batch[name][row, : lengths[row]]
        packed["segment_ids"][row // 2, where] = 1 + row % 2
    assert_same(gradients(model, packed), gradients(model, batch))


def test_recomputing_changes_nothing(batch: Batch) -> None:
    """tests/models/test_decoder.py has all policies."""
    model = make_lora_model()
    reference = gradients(model, batch, gradient_checkpointing="none")
    assert_same(gradients(model, batch, gradient_checkpointing="full"), reference)


def on_mesh(model: Llama, mesh: jax.sharding.Mesh) -> Llama:
    """The model's weights split over the mesh by the rules; norms, LoRA and biases whole everywhere."""
    axes = {"q_proj": ("heads", "embed"), "down_proj": ("embed", "mlp")}

    def place(path: Any, leaf: jax.Array) -> jax.Array:
        names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
        spec = PartitionSpec()
        for projection, logical in axes.items():
            if projection in names and "codes" in names:
                spec = PartitionSpec(None, *partition_spec(logical, mesh))
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    definition, state = nnx.split(model)
    return nnx.merge(definition, jax.tree_util.tree_map_with_path(place, state))


def test_a_loss_of_ones_own_finds_whole_layers_on_a_mesh(batch: Batch) -> None:
    mesh, optimizer, seen = make_mesh(fsdp=2), optax.sgd(1.0), []
    model = on_mesh(make_lora_model(packed=True), mesh)

    def own_loss(model: Llama, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        seen.append(model.layers.self_attn.q_proj.weight.get_value().codes.shape[1])
        return causal_lm_loss(model, batch)

    step = make_train_step(model, optimizer, mesh=mesh, loss_fn=own_loss)
    step.trace(init_train_state(model, optimizer), as_arrays(batch))
    assert set(seen) == {CONFIG.num_heads * CONFIG.head_dim}


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def test_gradients_sent_as_codes_train_alike_and_survive_a_bad_step(batch: Batch) -> None:
    """A step sends a quarter of what bfloat16 would, and what it leaves out it owes; a bad step leaves that alone."""
    mesh, rate = make_mesh(data=4), 0.5
    model, optimizer = on_mesh(make_lora_model(r=16), mesh), optax.sgd(rate)
    steps, states = {}, {}
    for reduction in ("full", "4bit"):
        steps[reduction] = make_train_step(model, optimizer, mesh=mesh, gradient_reduction=reduction)
        states[reduction] = init_train_state(model, optimizer, gradient_reduction=reduction)
    arrays, before = as_arrays(batch), flat(states["full"].params)
    sent = sent_bytes(steps["4bit"].trace(states["4bit"], arrays).jaxpr)
    assert sent <= 0.29 * (2 * 3 / 4 * before.size * 2)

    states = {name: steps[name](state, arrays)[0] for name, state in states.items()}
    gradients = {name: (before - flat(state.params)) / rate for name, state in states.items()}
    assert np.linalg.norm(gradients["4bit"] - gradients["full"]) <= 0.2 * np.linalg.norm(gradients["full"])
    owed = jax.tree.map(np.array, states["4bit"].owed)
    debt = owed.sent.sum(0) + owed.shared.reshape(-1)
    np.testing.assert_allclose(gradients["4bit"] + debt[: before.size], gradients["full"], atol=1e-5)

    poisoned = jax.tree.map(lambda leaf: leaf * jnp.nan, states["4bit"].params)
    bad, metrics = steps["4bit"](dataclasses.replace(states["4bit"], params=poisoned), arrays)
    assert int(metrics["skipped"]) == 1
    jax.tree.map(np.testing.assert_array_equal, bad.owed, owed)
    with pytest.raises(UserError, match="gradient_reduction='4bit': give the same to init_train_state"):
        steps["4bit"](states["full"], arrays)

    text = np.frombuffer(Path(__file__).read_bytes()[: 40 * 8 * 24], np.uint8).astype(np.int32) % CONFIG.vocab_size
    losses: dict[str, list[float]] = {}
    for name, step in steps.items():
        state, losses[name] = init_train_state(model, optimizer, gradient_reduction=name), []
        for ids in text.reshape(40, 8, 24):
            state, metrics = step(state, as_arrays({"input_ids": ids, "labels": ids, "segment_ids": np.ones_like(ids)}))
            losses[name].append(float(metrics["loss"]))
    last = {name: np.mean(found[-8:]) for name, found in losses.items()}
    assert last["full"] < 0.85 * losses["full"][0]
    assert last["4bit"] == pytest.approx(last["full"], rel=0.002)


def test_in_full_nothing_is_owed_and_gradients_are_summed_once(batch: Batch) -> None:
    """Accumulated and sharded: one all-reduce of the compiled program, at its end, holds them all."""
    mesh, optimizer = make_mesh(data=2), optax.sgd(1.0)
    model = on_mesh(make_lora_model(), mesh)
    split = as_arrays({name: value.reshape(2, 4, -1) for name, value in batch.items()})
    state = init_train_state(model, optimizer)
    assert state.owed is None
    step = make_train_step(model, optimizer, mesh=mesh)
    size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert sent_bytes(step.trace(state, split).jaxpr) == (size + 2) * 4
    program = step.lower(state, split).compile().as_text()
    assert len(re.findall(r" all-reduce(-start)?\(", program)) == 1


def test_packed_and_dense_weights_give_the_same_gradients(batch: Batch) -> None:
    packed = make_lora_model(packed=True)
    dense = make_lora_model(packed=True)
    for _, module in nnx.iter_modules(dense):
        weight = getattr(module, "weight", None)
        if isinstance(weight, nnx.Variable) and isinstance(weight.get_value(), NF4Array):
            module.weight = Frozen(dequantize_nf4(weight.get_value(), jnp.float32))
    assert_same(gradients(packed, batch), gradients(dense, batch))


def test_nothing_of_a_base_weights_size_is_saved(batch: Batch) -> None:
    """What the backward pass keeps of the base is its packed bytes: no array has a weight's shape in 16 or 32 bits."""
    model = make_lora_model(jnp.bfloat16, packed=True)
    definition, params, frozen = nnx.split(model, nnx.Param, ...)

    def loss(params: nnx.State) -> jax.Array:
        return causal_lm_loss(nnx.merge(definition, params, frozen), as_arrays(batch))[0]

    weight_shapes = {
        module.weight.get_value().shape[-2:]
        for _, module in nnx.iter_modules(model)
        if hasattr(module, "weight") and isinstance(module.weight.get_value(), NF4Array)
    }
    assert len(weight_shapes) == 4
    _, pullback = jax.vjp(loss, params)
    saved = jax.tree.leaves(pullback)
    assert any(
        leaf.dtype == jnp.uint8 for leaf in saved
    )  # the packed weights are among them: the test looks at the right thing
    for leaf in saved:
        like_a_weight = leaf.shape[-2:] in weight_shapes or leaf.shape[-2:][::-1] in weight_shapes
        assert not (like_a_weight and leaf.dtype.itemsize > 1), (leaf.shape, leaf.dtype)


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_a_layer_run_again_never_holds_its_widest_array(
    rate: float, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[gate up] is there for a part of the tokens at a time, with dropout too."""
    monkeypatch.setattr(decoder_layer, "PART", 64)
    monkeypatch.setattr(decoder_layer, "TILE", 8)
    optimizer, model = optax.sgd(1.0), make_lora_model(jnp.bfloat16, packed=True, lora_dropout=rate)
    step = make_train_step(model, optimizer, gradient_checkpointing="full")
    text = str(step.trace(init_train_state(model, optimizer), as_arrays(batch)).jaxpr)
    tokens, width = batch["input_ids"].size, 2 * CONFIG.intermediate_size
    assert f"[64,{width}]" in text  # the parts
    assert f"[{tokens},{width}]" not in text


def test_nan_weights_are_skipped_and_counted(batch: Batch) -> None:
    model = make_lora_model()
    optimizer = make_optimizer("adamw", learning_rate=1e-2)
    state, step = init_train_state(model, optimizer), make_train_step(model, optimizer)
    arrays = as_arrays(batch)
    state, metrics = step(state, arrays)
    assert int(metrics["skipped"]) == 0
    healthy = jax.tree.map(np.array, (state.params, state.opt_state))

    def poisoned(module: Llama, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        total, tokens = causal_lm_loss(module, batch)
        return total * jnp.nan, tokens

    bad_step = make_train_step(model, optimizer, loss_fn=poisoned)
    for count in (1, 2):
        state, metrics = bad_step(state, arrays)
        assert int(metrics["skipped"]) == count
        assert int(metrics["skipped_in_row"]) == count
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), healthy)
    state, metrics = step(state, arrays)
    assert (int(metrics["skipped"]), int(metrics["skipped_in_row"])) == (2, 0)


def test_float16_scales_its_loss_and_follows_float32(batch: Batch) -> None:
    losses = {}
    for dtype in (jnp.float32, jnp.float16):
        model = make_lora_model(dtype)
        optimizer = make_optimizer("adamw", learning_rate=1e-2)
        state, step = init_train_state(model, optimizer), make_train_step(model, optimizer)
        losses[dtype] = []
        for _ in range(15):
            state, metrics = step(state, as_arrays(batch))
            losses[dtype].append(float(metrics["loss"]))
    assert float(state.loss_scale.scale) > 1
    assert losses[jnp.float32][-1] < 0.8 * losses[jnp.float32][0]
    np.testing.assert_allclose(losses[jnp.float16], losses[jnp.float32], rtol=2e-2)


def test_an_overflowing_scale_is_lowered_until_steps_succeed(batch: Batch) -> None:
    model = make_lora_model(jnp.float16)
    optimizer = optax.sgd(0.0)
    state, step = init_train_state(model, optimizer), make_train_step(model, optimizer)
    state = dataclasses.replace(state, loss_scale=dataclasses.replace(state.loss_scale, scale=jnp.float32(2.0**40)))
    for _ in range(40):
        state, metrics = step(state, as_arrays(batch))
    assert 0 < int(metrics["skipped"]) < 40
    assert int(metrics["skipped_in_row"]) == 0


def test_dropout_is_drawn_anew_each_step_and_off_without_a_rate(batch: Batch) -> None:
    optimizer = optax.sgd(0.0)  # nothing learnt: losses differ by dropout alone
    for rate, different in ((0.5, True), (0.0, False)):
        model = make_lora_model(lora_dropout=rate)
        state, step = init_train_state(model, optimizer), make_train_step(model, optimizer)
        losses = []
        for _ in range(3):
            state, metrics = step(state, as_arrays(batch))
            losses.append(float(metrics["loss"]))
        assert (len(set(losses)) == 3) is different


def test_full_parameter_training(batch: Batch) -> None:
    model = Llama(CONFIG, init_weights(CONFIG, jax.random.key(0)), dtype=jnp.float32, trainable=True)
    optimizer = make_optimizer("adamw", learning_rate=3e-3)
    state, step = init_train_state(model, optimizer), make_train_step(model, optimizer)
    losses = []
    for _ in range(30):
        state, metrics = step(state, as_arrays(batch))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]


def test_a_frozen_model_is_refused() -> None:
    model = Llama(CONFIG, init_weights(CONFIG, jax.random.key(0)), dtype=jnp.float32)
    with pytest.raises(UserError, match="nothing to train"):
        init_train_state(model, optax.sgd(1.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, "lacks"),
        ({"attention_mask": np.ones((8, 24), np.int32)}, "attention_mask"),
        ({"labels": np.ones((8, 23), np.int32)}, "labels"),
    ],
)
def test_bad_batches_are_refused(change: dict, message: str, batch: Batch) -> None:
    model = make_lora_model()
    optimizer = optax.sgd(1.0)
    wrong = {name: value for name, value in (batch | change).items() if value is not None}
    with pytest.raises(UserError, match=message):
        make_train_step(model, optimizer)(init_train_state(model, optimizer), as_arrays(wrong))


def test_rows_that_do_not_split_over_the_mesh_are_refused(batch: Batch) -> None:
    mesh = make_mesh(data=8)
    model, optimizer = on_mesh(make_lora_model(), mesh), optax.sgd(1.0)
    uneven = {name: value[:6] for name, value in batch.items()}
    with pytest.raises(UserError, match="multiple of 8"):
        make_train_step(model, optimizer, mesh=mesh)(init_train_state(model, optimizer), as_arrays(uneven))


def test_an_unknown_policy_is_refused(batch: Batch) -> None:
    with pytest.raises(UserError, match="auto, none, full"):
        gradients(make_lora_model(), batch, gradient_checkpointing="most")
