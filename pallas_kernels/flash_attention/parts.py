"""Attention to many keys, put together from attention to sets of them.

With o_s and l_s of the sets s of keys that a query has met, each attention by itself and its log-sum-exp,

    l = log sum_s exp l_s        o = sum_s exp(l_s - l) o_s

is attention to all of them. Sets join one after the other, in float32; a set in which a query sees no key has l_s = -inf.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Part = tuple[Float[Array, "B S N D"], Float[Array, "B N S"]]  # output and log-sum-exp


def joined(first: Part, second: Part) -> Part:
    """Of the keys of both; the output is float32."""
    (out, lse), (other_out, other_lse) = first, second
    both = jnp.logaddexp(lse, other_lse)
    shift = jnp.where(both == -jnp.inf, 0, both)
    mine, theirs = (jnp.exp(each - shift).swapaxes(1, 2)[..., None] for each in (lse, other_lse))
    return mine * out.astype(jnp.float32) + theirs * other_out.astype(jnp.float32), both


def known(lse: Float[Array, "B N S"], seen: Bool[Array, "B S"] | None) -> Float[Array, "B N S"]:
    """-inf for a query that saw no key, where the kernels have 0; None: all saw some."""
    return lse if seen is None else jnp.where(seen[:, None], lse, -jnp.inf)
