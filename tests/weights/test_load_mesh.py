"""Loading onto a mesh of eight virtual devices: each holds its share alone, and the values are those of one device."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fastjax.models import LlamaConfig, ParamSpec, param_specs
from fastjax.parallel.mesh import make_mesh
from fastjax.parallel.rules import partition_spec
from fastjax.weights import safetensors_file, transfer
from fastjax.weights.bnb import nf4_to_bnb
from fastjax.weights.errors import UnevenShardingError
from fastjax.weights.load import load_weights
from fastjax.weights.placement import make_target
from fastjax.weights.transfer import Landing, pieces_of
from pallas_kernels import NF4Array, dequantize_nf4, quantize_nf4


@pytest.fixture(scope="module")
def config() -> LlamaConfig:
    """Wide enough for four-way column shards, and for nested_scales of every kind of cell."""
    return LlamaConfig(
        vocab_size=96,
        hidden_size=512,
        intermediate_size=768,
        num_layers=2,
        num_heads=8,
        num_kv_heads=4,
        head_dim=64,
        attention_bias=True,
    )


def load(directory, config, mesh, *, load_in_4bit=True):
    specs = param_specs(config)
    return load_weights(directory, specs, load_in_4bit=load_in_4bit, dtype="bfloat16", mesh=mesh, progress=False)


def share(shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh) -> tuple[int, ...]:
    return NamedSharding(mesh, spec).shard_shape(shape)


def check_shares(weight, spec: ParamSpec, mesh: Mesh) -> None:
    """Every device holds its part of every leaf, and no more."""
    partition = PartitionSpec(*([] if spec.layers is None else [None]), *partition_spec(spec.axes, mesh))
    out_in = (weight.codes, weight.scales) if isinstance(weight, NF4Array) else (weight,)
    for leaf in out_in:
        expected = share(leaf.shape, partition, mesh)
        assert [s.data.shape for s in leaf.addressable_shards] == [expected] * mesh.size
    if isinstance(weight, NF4Array):
        rows, columns = share(weight.scales.shape, partition, mesh)[1:]
        cell_rows, cell_columns = weight.nested_cell
        for dimension, (local, cell) in enumerate([(rows, cell_rows), (columns, cell_columns)], 1):
            cells = weight.nested_scales.addressable_shards[0].data.shape[dimension]
            assert cells == -(-local // cell) or weight.nested_scales.shape[dimension] == 1


def assert_equal_values(weight, reference) -> None:
    if not isinstance(reference, NF4Array):
        assert np.asarray(weight).tobytes() == np.asarray(reference).tobytes()
        return
    assert np.array_equal(weight.codes, reference.codes)
    # the offset is a mean, whose last bit depends on the order of summation
    np.testing.assert_allclose(weight.offset, reference.offset, rtol=2e-7)
    on_one_device = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), weight)
    values = np.asarray(dequantize_nf4(on_one_device, jnp.float32))
    np.testing.assert_allclose(values, dequantize_nf4(reference, jnp.float32), rtol=1e-5, atol=1e-7)


def test_shares_and_values(config, tensors, write, monkeypatch):
    monkeypatch.setattr(transfer, "PIECE_BYTES", 50_000)
    directory = write(tensors)
    reference = load(directory, config, None)
    for mesh in (make_mesh(fsdp=8), make_mesh(data=2, fsdp=2, tensor=2)):
        weights = load(directory, config, mesh)
        for key, spec in param_specs(config).items():
            check_shares(weights[key], spec, mesh)
            assert_equal_values(weights[key], reference[key])


def test_unquantised(config, tensors, write):
    directory, mesh = write(tensors), make_mesh(fsdp=2, tensor=4)
    weights = load(directory, config, mesh, load_in_4bit=False)
    reference = load(directory, config, None, load_in_4bit=False)
    for key, spec in param_specs(config).items():
        check_shares(weights[key], spec, mesh)
        assert_equal_values(weights[key], reference[key])


@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_packed_checkpoint(config, tensors, write, load_in_4bit):
    for spec in param_specs(config).values():
        for name in spec.hf_names() if spec.quantize else []:
            tensors |= nf4_to_bnb(quantize_nf4(jnp.asarray(tensors[name])), "bfloat16", name)
    directory, mesh = write(tensors), make_mesh(fsdp=4, tensor=2)
    weights = load(directory, config, mesh, load_in_4bit=load_in_4bit)
    reference = load(directory, config, None, load_in_4bit=load_in_4bit)
    for key, spec in param_specs(config).items():
        check_shares(weights[key], spec, mesh)
        assert_equal_values(weights[key], reference[key])


@pytest.mark.parametrize(
    "key", ["layers.self_attn.k_proj.weight", "layers.mlp.up_proj.weight", "layers.mlp.down_proj.weight"]
)
def test_a_share_dequantises_by_itself(config, tensors, write, key):
    mesh = make_mesh(fsdp=2, tensor=4)
    weight = load(write(tensors), config, mesh)[key]
    spec = PartitionSpec(None, *partition_spec(param_specs(config)[key].axes, mesh))
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, weight)
    local = jax.shard_map(lambda q: dequantize_nf4(q, jnp.float32), mesh=mesh, in_specs=(specs,), out_specs=spec)
    assert np.array_equal(local(weight), dequantize_nf4(weight, jnp.float32))


def test_mesh_with_explicit_axes(config, tensors, write):
    """What `jax.make_mesh` makes by default."""
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"))
    directory = write(tensors)
    weights, reference = load(directory, config, mesh), load(directory, config, None)
    for key in weights:
        assert_equal_values(weights[key], reference[key])


def test_reads_only_rows_that_are_kept(tmp_path, write):
    """What one process of several reads: here the devices of half a mesh stand for its own."""
    array = np.arange(64 * 8, dtype=np.float32).astype(ml_dtypes.bfloat16).reshape(64, 8)
    info = safetensors_file.read_header(write({"w": array}) / "model.safetensors")["w"]

    class Half:
        def addressable_devices_indices_map(self, shape):
            whole = NamedSharding(make_mesh(fsdp=4, tensor=2), PartitionSpec("fsdp", "tensor"))
            return dict(list(whole.addressable_devices_indices_map(shape).items())[2:4])

    assert pieces_of(info, Half()) == [(16, 32)]
    landing = Landing(info, Half())
    landing.add(16, safetensors_file.read_rows(info, 16, 32))
    assert [buffer.shape for buffer in landing.buffers.values()] == [(16, 4), (16, 4)]
    assert np.array_equal(np.concatenate(list(landing.buffers.values()), axis=1), array[16:32])


def test_uneven_rows():
    spec = ParamSpec((96, 64), ("kv_heads", "embed"), "x.{layer}.k_proj.weight", 2, quantize=True)
    expected = "weight x.{layer}.k_proj.weight cannot be split evenly: its axis 'kv_heads' of size 96 does not divide"
    with pytest.raises(UnevenShardingError, match=re.escape(expected) + r" into 64 equal parts \(tensor 8 x fsdp 8\)"):
        make_target(spec, quantize=True, dtype="bfloat16", mesh=fake_mesh(fsdp=8, tensor=8))


def test_uneven_blocks():
    spec = ParamSpec((64, 192), ("embed", "mlp"), "x.weight", quantize=True)
    mesh = make_mesh(tensor=2)
    with pytest.raises(
        UnevenShardingError, match=r"axis 'mlp' of size 192 .* 2 equal parts of 64-value blocks \(tensor 2\)"
    ):
        make_target(spec, quantize=True, dtype="bfloat16", mesh=mesh)
    make_target(spec, quantize=False, dtype="bfloat16", mesh=mesh)  # whose columns need no blocks


def test_flat_layout_does_not_shard():
    spec = ParamSpec((64, 100), ("mlp", "embed"), "x.weight", quantize=True)
    with pytest.raises(UnevenShardingError, match=r"axis 'embed' of size 100 does not divide .* 64-value blocks"):
        make_target(spec, quantize=True, dtype="bfloat16", mesh=make_mesh(fsdp=2))


def fake_mesh(**sizes: int) -> Mesh:
    """More virtual devices than there are: the same one over and over, for checks that look at sizes alone."""
    return Mesh(np.full(tuple(sizes.values()), jax.devices()[0]), tuple(sizes))
