"""The sanitizer's passes: what they run is what their names say, and what the tool reports is passed on."""

import subprocess
from functools import partial
from pathlib import Path

import jax
import pytest

from bench import sanitize

KERNELS = Path(__file__).parents[1] / "pallas_kernels"


@pytest.mark.parametrize("name", sanitize.PASSES)
def test_a_pass_runs(name):
    """Its shapes fit together: traced in plain jnp, as this machine has no kernels."""
    run = sanitize.PASSES[name].run
    results = jax.tree.leaves(jax.eval_shape(partial(run, "xla")))
    assert results
    with pytest.raises(ValueError, match="needs a"):  # the implementation it names, and none in its place
        jax.eval_shape(partial(run, sanitize.PASSES[name].implementation))


def test_every_op_with_kernels_has_a_pass():
    folders = {path.parent.name for path in KERNELS.glob("*/*_kernels.py")} - {"nf4"}
    assert folders - {"rms_norm", "rope", "swiglu"} <= {name.split()[0] for name in sanitize.PASSES}


def test_what_the_tool_says_is_passed_on(monkeypatch, capsys):
    asked = []

    def run(command, **options):
        asked.append(command)
        unclean = "racecheck" in command
        return subprocess.CompletedProcess(command, sanitize.UNCLEAN if unclean else 0)

    monkeypatch.setattr(sanitize, "find_tool", lambda: "sanitizer")
    monkeypatch.setattr(subprocess, "run", run)
    assert sanitize.main(["low_rank"]) == 0
    assert "all clean" in capsys.readouterr().out
    assert sanitize.main(["flash_attention mosaic", "low_rank"]) == 1
    assert "not clean\nracecheck: flash_attention mosaic" in capsys.readouterr().out
    assert asked[0][:3] == ["sanitizer", "--tool", "memcheck"]
    assert asked[0][-2:] == ["--run", "low_rank"]
    assert asked[1][-3:] == ["--run", "flash_attention mosaic", "low_rank"]


def test_the_pass_at_fault_is_found(monkeypatch, capsys):
    def run(command, **options):
        return subprocess.CompletedProcess(command, sanitize.UNCLEAN if "low_rank" in command else 0)

    monkeypatch.setattr(sanitize, "find_tool", lambda: "sanitizer")
    monkeypatch.setattr(subprocess, "run", run)
    assert sanitize.main([]) == 1
    assert capsys.readouterr().out.splitlines()[-2:] == ["not clean", "memcheck: low_rank"]


def test_without_the_tool(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sanitize.shutil, "which", lambda *_, **__: None)
    assert sanitize.main([]) == sanitize.NOT_FOUND
    assert "comes with the CUDA toolkit" in capsys.readouterr().err
