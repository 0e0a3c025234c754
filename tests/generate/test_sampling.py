"""Sampling against transformers' processors and against exact probabilities."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fastjax.generate.sampling import Filters, RowSampling, Sampling, choose, filtered, penalised

CHANCE = np.random.default_rng(1)
LOGITS = CHANCE.normal(0, 2, (6, 50)).astype(np.float32)


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(5, 1.0, 0.0), (0, 0.7, 0.0), (0, 1.0, 0.2), (20, 0.8, 0.05), (1, 0.5, 0.0), (200, 0.999, 1.0), (0, 0.01, 0.0)],
)
def test_filters_are_those_of_transformers(top_k, top_p, min_p) -> None:
    theirs = torch.tensor(LOGITS)
    for warper in (
        TopKLogitsWarper(top_k) if top_k else None,
        TopPLogitsWarper(top_p) if top_p < 1 else None,
        MinPLogitsWarper(min_p) if min_p else None,
    ):
        theirs = theirs if warper is None else warper(None, theirs)
    count = len(LOGITS)
    filters = Filters(jnp.full(count, top_k), jnp.full(count, top_p, jnp.float32), jnp.full(count, min_p, jnp.float32))
    np.testing.assert_array_equal(filtered(jnp.asarray(LOGITS), filters), theirs.numpy())


def test_each_row_has_its_own_filters() -> None:
    filters = Filters(jnp.asarray([1, 0, 3]), jnp.asarray([1.0, 0.3, 1.0]), jnp.asarray([0.0, 0.0, 0.5]))
    together = filtered(jnp.asarray(LOGITS[:3]), filters)
    for row in range(3):
        alone = filtered(
            jnp.asarray(LOGITS[row : row + 1]),
            Filters(filters.top_k[row : row + 1], filters.top_p[row : row + 1], filters.min_p[row : row + 1]),
        )
        np.testing.assert_array_equal(together[row : row + 1], alone)


def test_repetition_penalty_is_that_of_transformers() -> None:
    texts = CHANCE.integers(0, 50, (6, 9))
    theirs = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor(texts), torch.tensor(LOGITS))
    seen = np.zeros((6, 50), bool)
    np.put_along_axis(seen, texts, True, axis=1)
    ours = penalised(jnp.asarray(LOGITS), jnp.asarray(seen), jnp.full(6, 1.7))
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 1.0}, {"temperature": 0.7, "top_k": 8}, {"temperature": 1.5, "top_p": 0.8, "min_p": 0.02}],
)
def test_draws_are_distributed_as_they_should_be(settings) -> None:
    """Chi-square against the exact probabilities, at a significance of one in a thousand."""
    draws = 4000
    logits = LOGITS[0, :16]
    theirs = TemperatureLogitsWarper(settings["temperature"])(None, torch.tensor(logits[None]))
    for name, warper in (("top_k", TopKLogitsWarper), ("top_p", TopPLogitsWarper), ("min_p", MinPLogitsWarper)):
        theirs = warper(settings[name])(None, theirs) if name in settings else theirs
    probability = torch.softmax(theirs, -1)[0].numpy().astype(np.float64)
    rows = RowSampling.of([Sampling(seed=seed, **settings) for seed in range(draws)])
    seen = jnp.zeros((draws, 16), bool)
    tokens = choose(jnp.asarray(np.tile(logits, (draws, 1))), seen, jnp.zeros(draws, jnp.int32), rows)
    counts = np.bincount(np.asarray(tokens), minlength=16)
    assert not counts[probability == 0].any()
    expected = draws * probability[probability > 0] / probability.sum()
    statistic = float((((counts[probability > 0] - expected) ** 2) / expected).sum())
    freedom = len(expected) - 1
    # Wilson and Hilferty's approximation of the chi-square distribution's upper thousandth
    bound = freedom * (1 - 2 / (9 * freedom) + 3.09 * np.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < bound


def test_nothing_is_worked_that_no_row_wants() -> None:
    plain = RowSampling.of([Sampling(), Sampling(top_k=3)])
    assert plain.temperature is None
    assert plain.filters is None
    assert plain.repetition_penalty is None
    drawn = RowSampling.of([Sampling(), Sampling(temperature=1.0)])
    assert drawn.filters is None
    tokens = choose(jnp.asarray(LOGITS[:2]), jnp.zeros((2, 50), bool), jnp.zeros(2, jnp.int32), drawn)
    assert tokens[0] == LOGITS[0].argmax()
