"""What two processes hold a half of each is written whole, as one process writes it."""

import os
import sys
from pathlib import Path

import jax

from bench.kill_resume import write_run
from fastjax import FastLanguageModel
from fastjax.distributed.launch import launch
from tests.lightly import environment

SCRIPT = """
import sys
from pathlib import Path

from fastjax import make_mesh
from fastjax.distributed.cluster import find_run
from fastjax.distributed.start import join
from tests.distributed.test_exports import export

flags = dict(zip(sys.argv[2::2], sys.argv[3::2]))
join(find_run(flags["--coordinator"], int(flags["--processes"]), int(flags["--process"]), {}))
export(Path(sys.argv[1]), "two", make_mesh(fsdp=2))
"""


def export(directory: Path, name: str, mesh: jax.sharding.Mesh | None) -> None:
    """An adapter with a trained head, and the merged model."""
    options = {"dtype": "float32", "load_in_4bit": False, "mesh": mesh, "progress": False}
    model, _ = FastLanguageModel.from_pretrained(directory / "base", **options)
    model = FastLanguageModel.get_peft_model(model, r=2, modules_to_save=["lm_head"])
    model.save_pretrained(directory / name / "adapter")
    model.save_pretrained_merged(directory / name / "merged")


def test_exports_of_two_processes(tmp_path):
    write_run(tmp_path, steps=1)
    environ = os.environ | environment(tmp_path)
    assert launch([sys.executable, "-c", SCRIPT, str(tmp_path)], 2, tmp_path / "logs", environ) == 0
    export(tmp_path, "one", None)
    written = {path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file()}
    assert written == {path.relative_to(tmp_path / "two") for path in (tmp_path / "two").rglob("*") if path.is_file()}
    for path in written:
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes(), path
