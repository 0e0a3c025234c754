"""Draws by place: any division of the work draws the same, and what is drawn looks like chance."""

import jax
import numpy as np

from fastjax.models.draws import draw, places_of


def test_parts_draw_what_the_whole_draws() -> None:
    key = jax.random.key(0)
    whole = np.array(draw(key, places_of(4, 32).reshape(-1)).bits(48)).reshape(4, 32, 48)
    row = draw(key, places_of(1, 32, first_row=2).reshape(-1), first_column=16).bits(16)
    np.testing.assert_array_equal(row, whole[2, :, 16:32])


def test_draws_look_like_chance() -> None:
    """Bits are even and know nothing of those beside them, of the rows below, nor of another key's."""
    places = places_of(8, 64).reshape(-1)
    kept = np.array([draw(key, places).kept(256, 0.25) for key in jax.random.split(jax.random.key(0))], float)
    error = (0.25 * 0.75 / kept[0].size) ** 0.5
    assert abs(kept.mean() - 0.75) < 4 * error
    pairs = [(kept[0, :, 1:], kept[0, :, :-1]), (kept[0, 1:], kept[0, :-1]), (kept[0, 64:], kept[0, :-64]), tuple(kept)]
    for one, other in pairs:
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 4 / one.size**0.5
