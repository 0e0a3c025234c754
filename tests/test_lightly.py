"""Only tests that ask for it are compiled lightly."""

import jax
import pytest
from jax._src import compiler

from tests.lightly import OLD_EMITTERS


@pytest.mark.parametrize("light", [False, True])
def test_the_older_emitters_are_for_programs_that_are_not_optimised(light: bool) -> None:
    jax.config.update("jax_disable_most_optimizations", light)  # set anew before each test
    options = compiler.get_compile_options(num_replicas=1, num_partitions=1)
    assert (OLD_EMITTERS.encode() in options.SerializeAsString()) == light
    assert options.num_partitions == 1
