"""The cache of compiled programs is on where it helps, and never against the user's will."""

from pathlib import Path

import jax
import pytest

from fastjax.compile_cache import enable_compile_cache
from pallas_kernels.triton_cache import keep_kernels, kept_directory

NAMES = (
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """As if there were one; the settings are put back."""
    before = {name: getattr(jax.config, name) for name in NAMES}
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    keep_kernels(None)


def test_on_a_gpu_programs_are_kept_in_the_users_cache(on_gpu: Path) -> None:
    assert enable_compile_cache() == on_gpu / "fastjax" / "xla"
    assert jax.config.jax_compilation_cache_dir == str(on_gpu / "fastjax" / "xla")
    assert jax.config.jax_compilation_cache_max_size > 0
    assert kept_directory() == on_gpu / "fastjax" / "xla" / "triton"


def test_a_directory_of_the_users_is_left_alone(on_gpu: Path) -> None:
    jax.config.update("jax_compilation_cache_dir", str(on_gpu / "mine"))
    size = jax.config.jax_compilation_cache_max_size
    assert enable_compile_cache() == on_gpu / "mine"
    assert jax.config.jax_compilation_cache_max_size == size
    jax.config.update("jax_compilation_cache_dir", "gs://bucket")
    enable_compile_cache()
    assert kept_directory() == on_gpu / "mine" / "triton"  # kernels stay on this machine


def test_it_can_be_turned_off(on_gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTJAX_COMPILE_CACHE", "0")
    assert enable_compile_cache() is None
    assert jax.config.jax_compilation_cache_dir is None
    assert kept_directory() is None


def test_not_on_a_cpu() -> None:
    assert enable_compile_cache() is None
