"""The tuner on a GPU: candidates compile, are right, and what is fastest is written."""

import importlib

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import nf4_matmul, quantize_nf4, tuning
from pallas_kernels.dispatch import device_kind

pytestmark = pytest.mark.gpu
command = importlib.import_module("pallas_kernels.tune.__main__")


@pytest.mark.parametrize(
    ("op", "workload", "choices"),
    [
        ("dequantize_nf4", "tiny/gate/1", {"dequantize_nf4"}),
        ("decode_attention", "tiny/attention/2x64", {"decode_attention.tiles"}),
        ("swiglu", "tiny/gate_up/64", {"swiglu.forward", "swiglu.backward"}),
        (
            "nf4_matmul",
            "tiny/gate_up/64",
            {f"nf4_matmul.{which}{what}" for which in ("forward", "input_gradient") for what in ("", ".tiles")},
        ),
    ],
)
def test_what_is_fastest_is_written(op, workload, choices, tmp_path, capsys):
    path = tmp_path / "table.json"
    assert command.main([op, "--shapes", workload, "--out", str(path)]) == 0
    said = capsys.readouterr().out
    assert "off by" not in said  # every candidate that compiled was right
    table = tuning.read(path)
    assert {name for name, _ in table} == choices


@pytest.mark.parametrize("implementation", ["triton", "xla"])
def test_the_table_decides(implementation, tmp_path, monkeypatch):
    """The same product either way, and by the one that the table names."""
    shape = {"tokens": 32, "out": 512, "width": 256}
    entry = tuning.Entry("nf4_matmul.forward", shape, {"implementation": implementation})
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    tuning.write(tuning.path_of(device_kind()), device_kind(), [entry], {})
    tuning._table.cache_clear()
    try:
        q = quantize_nf4(jax.random.normal(jax.random.key(0), (512, 256)))
        x = jax.random.normal(jax.random.key(1), (30, 256), jnp.bfloat16)
        run = jax.jit(lambda x: nf4_matmul(x, q))
        assert ("dot_general" in run.lower(x).as_text()) == (implementation == "xla")
        named = jax.jit(lambda x: nf4_matmul(x, q, implementation=implementation))(x)
        assert jnp.array_equal(run(x), named)
    finally:
        tuning._table.cache_clear()
