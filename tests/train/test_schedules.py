"""Schedules against transformers.get_scheduler, step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from fastjax.train.schedules import SCHEDULES, make_schedule, warmup_step_count

PEAK = 2e-4


def reference_rates(name: str, warmup: int, total: int) -> np.ndarray:
    """The rate of each of `total` updates and the one after."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = transformers.get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    rates = []
    for _ in range(total + 1):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return np.array(rates)


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "constant"])
@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (0, 60), (1, 60), (7, 60), (59, 60), (60, 60)])
def test_equal_to_transformers(name, warmup, total):
    if name.startswith("cosine") and warmup == total:
        total += 1  # transformers' cosine is back at its peak at the last step of a run that is all warm-up
    schedule = jax.jit(make_schedule(name, PEAK, warmup_steps=warmup, total_steps=total))
    ours = np.array([schedule(step) for step in range(total + 1)])
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, reference_rates(name, warmup, total), rtol=1e-6, atol=1e-7 * PEAK)


def test_constant_equals_transformers_and_says_that_it_has_no_warmup():
    with pytest.warns(UserWarning, match="'constant' has no warm-up: 7 .* use 'constant_with_warmup'"):
        schedule = make_schedule("constant", PEAK, warmup_steps=7, total_steps=20)
    np.testing.assert_allclose([schedule(step) for step in range(21)], reference_rates("constant", 7, 20), rtol=1e-6)


def test_first_update_of_a_warmup_has_rate_zero():
    assert make_schedule("linear", PEAK, warmup_steps=5, total_steps=10)(jnp.int32(0)) == 0


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_stays_at_zero_past_the_end(name):
    schedule = make_schedule(name, PEAK, total_steps=10)
    assert [float(schedule(step)) for step in (10, 11, 15, 20)] == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("steps", "ratio", "expected"), [(5, 0, 5), (5, 0.3, 5), (0, 0.03, 4), (0.1, 0, 11), (0, 0, 0)]
)
def test_warmup_step_count(steps, ratio, expected):
    assert warmup_step_count(steps, ratio, 101) == expected
    arguments = transformers.TrainingArguments(warmup_steps=steps or ratio, use_cpu=True)
    assert arguments.get_warmup_steps(101) == expected


def test_ratio_reaches_the_schedule():
    by_ratio = make_schedule("cosine", PEAK, warmup_ratio=0.1, total_steps=50)
    by_steps = make_schedule("cosine", PEAK, warmup_steps=5, total_steps=50)
    assert [by_ratio(step) for step in range(51)] == [by_steps(step) for step in range(51)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type='cosin' is unknown; did you mean 'cosine'.*constant_with"),
        ({"total_steps": 0}, "total_steps=0 must be at least 1"),
        ({"warmup_steps": -1}, "warmup_steps=-1 must not be negative"),
        ({"warmup_ratio": 5}, "warmup_ratio=5 is a share of the run, at most 1"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_schedule(**{"lr_scheduler_type": "linear", "learning_rate": PEAK, "total_steps": 10} | arguments)
