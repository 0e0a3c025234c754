"""Loss scaling and the rule for steps that are not finite."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from fastjax.train.loss_scale import LossScale, all_finite, init_loss_scale, select_tree


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", jnp.bfloat16, np.float32])
def test_static_for_dtypes_with_range(dtype):
    loss_scale = init_loss_scale(dtype)
    assert (float(loss_scale.scale), loss_scale.dynamic) == (1.0, False)
    grads = {"w": jnp.arange(3.0)}
    assert loss_scale.unscale(grads) is grads
    after = loss_scale.adjust(jnp.asarray(False)).adjust(jnp.asarray(True))
    assert (float(after.scale), int(after.good_steps)) == (1.0, 0)


def test_dynamic_for_float16():
    loss_scale = init_loss_scale(jnp.float16)
    assert (float(loss_scale.scale), int(loss_scale.good_steps), loss_scale.dynamic) == (2.0**15, 0, True)
    assert (loss_scale.scale.dtype, loss_scale.good_steps.dtype) == (jnp.float32, jnp.int32)
    assert (loss_scale.growth_interval, loss_scale.factor, loss_scale.minimum) == (2000, 2.0, 1.0)


def test_unscale_undoes_the_scaling_exactly():
    loss_scale = init_loss_scale("float16")
    w = jnp.asarray(np.random.default_rng(0).normal(size=100), jnp.float32)
    plain = jax.grad(lambda w: jnp.sum(jnp.sin(w)))(w)
    scaled = jax.grad(lambda w: jnp.sum(jnp.sin(w)) * loss_scale.scale)(w)
    assert not np.array_equal(scaled, plain)
    np.testing.assert_array_equal(loss_scale.unscale({"w": scaled})["w"], plain)


@pytest.mark.parametrize("seed", range(3))
def test_follows_torch_grad_scaler(seed):
    """The same scale after every step of a run with overflows, down to the smallest scale and up again."""
    rng = np.random.default_rng(seed)
    good = np.concatenate([rng.random(40) < 0.9, rng.random(30) < 0.2, np.ones(20, bool)])
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    ours = dataclasses.replace(init_loss_scale("float16"), scale=jnp.float32(2.0**10), growth_interval=3)
    adjust = jax.jit(LossScale.adjust)
    for step, finite in enumerate(good):
        optimizer.zero_grad()
        theirs.scale((parameter * (1.0 if finite else float("inf"))).sum()).backward()
        theirs.step(optimizer)
        theirs.update()
        if theirs.get_scale() < 1:
            theirs.update(new_scale=1.0)  # torch has no smallest scale
        ours = adjust(ours, jnp.asarray(finite))
        assert float(ours.scale) == theirs.get_scale(), step


def test_scale_stays_within_its_bounds():
    low = dataclasses.replace(init_loss_scale("float16"), scale=jnp.float32(1.0))
    assert low.adjust(jnp.asarray(False)).scale == 1
    high = dataclasses.replace(init_loss_scale("float16"), scale=jnp.float32(2.0**24), growth_interval=1)
    assert high.adjust(jnp.asarray(True)).scale == 2**24


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_all_finite_sees_one_bad_value(bad, dtype):
    good = {"a": jnp.full((3, 4), jnp.finfo(dtype).max, dtype), "n": jnp.arange(3), "b": [jnp.zeros((), dtype)]}
    assert jax.jit(all_finite)(good)
    assert not jax.jit(all_finite)(good | {"a": good["a"].at[1, 2].set(bad)})
    assert not jax.jit(all_finite)(good | {"b": [jnp.asarray(bad, dtype)]})


def test_all_finite_of_nothing():
    assert all_finite({})


def test_select_tree_takes_one_side_whole():
    new = {
        "w": jnp.array([jnp.nan, 1.0]),
        "codes": jnp.array([7], jnp.uint8),
        "key": jax.random.key(1),
        "n": jnp.int32(1),
    }
    old = {"w": jnp.array([2.0, 3.0]), "codes": jnp.array([9], jnp.uint8), "key": jax.random.key(2), "n": jnp.int32(0)}
    select = jax.jit(select_tree)
    for finite, expected in ((True, new), (False, old)):
        chosen = select(jnp.asarray(finite), new, old)
        assert chosen["codes"].dtype == jnp.uint8
        for name in ("w", "codes", "n"):
            np.testing.assert_array_equal(chosen[name], expected[name])
        assert jnp.array_equal(jax.random.key_data(chosen["key"]), jax.random.key_data(expected["key"]))


def test_a_bad_step_changes_nothing_but_the_scale():
    """Ten steps in float16 whose third overflows: the scale is halved once and that step's update is left out."""

    @jax.jit
    def step(w, loss_scale, x):
        grads = jax.grad(
            lambda w: (w.astype(jnp.float16) * x.astype(jnp.float16)).sum().astype(jnp.float32) * loss_scale.scale
        )(w)
        grads = loss_scale.unscale(grads)
        finite = all_finite(grads)
        return select_tree(finite, w - 0.1 * grads, w), loss_scale.adjust(finite)

    w, loss_scale = jnp.ones(4), init_loss_scale("float16")
    for i in range(10):
        before = w
        w, loss_scale = step(w, loss_scale, jnp.full(4, 30.0 if i == 2 else 0.5))
        assert np.array_equal(w, before) == (i == 2)
    assert loss_scale.scale == 2.0**14
    assert loss_scale.good_steps == 7
    np.testing.assert_allclose(w, 1 - 9 * 0.05, rtol=1e-6)
