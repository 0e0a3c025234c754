"""Checkpoints of a run: output_dir/checkpoint-N, complete or not there.

    checkpoint-N/state/              the arrays of the TrainState, written by Orbax, each under its path in the tree
    checkpoint-N/trainer_state.json  the step, the steps not yet logged, and the fingerprint of the run

Both are written to a temporary directory that is renamed at the end, so a kill leaves the last good checkpoint alone and a
half-written one never looks like one. The fingerprint says what the state belongs to: the model, the optimizer, the data
and the shape of every array. Resuming compares it, and names the first thing that differs.

Arrays are stored whole, in the pieces that devices had, so a run may go on with another mesh or none, each device reading its
own part. What compressed gradients still owe (parallel/compressed.py) alone belongs to the mesh it came from: it is taken
up where mesh and reduction are the same, and is otherwise let go, which costs a part of the rounding of one step.

Of several processes each writes the shards it has, into the same directory on a disk that all of them see; making, renaming
and removing directories is the writer's.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastjax.data.batches import Position
from fastjax.distributed.absent import is_of_another
from fastjax.distributed.roles import is_writer, wait_for_all
from fastjax.errors import UserError
from fastjax.train.metrics import Metrics
from fastjax.train.step import TrainState

FILE_NAME = "trainer_state.json"
OWED = "owed."  # how the names of arrays begin that belong to a mesh
NAME = re.compile(r"checkpoint-(\d+)")
TEMPORARY = ".tmp"
AUTO = "auto"

REMEDIES = {  # for what a change of the mesh brings about
    "data.rows_per_step": "choose per_device_train_batch_size and gradient_accumulation_steps so that, times the devices of"
    " mesh axes data and fsdp, they make as many rows a step",
}

type Fingerprint = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run stands: what a checkpoint holds beside the TrainState."""

    step: int = 0
    num_tokens: int = 0
    position: Position | None = None  # of the next step's batch
    window: list[Metrics] = dataclasses.field(default_factory=list)  # of the steps since the last log record


class CheckpointWriter:
    """Writes checkpoints of a run in the background; one at a time.

    A failed write raises at the next call. Leave it with `close`, which waits for the last one.
    """

    def __init__(self, output_dir: Path, keep: int | None) -> None:
        self.output_dir = output_dir
        self.keep = keep
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(
        self, state: TrainState, progress: Progress, fingerprint: Fingerprint, protected: Path | None = None
    ) -> Path:
        """Starts to write checkpoint-N, N being the step, and returns at once: what is written is a copy on the device, made
        before the next step may overwrite the arrays.

        Of older checkpoints the newest `keep` are kept, this one counted, and `protected`.
        """
        self.wait()
        final = self.output_dir / f"checkpoint-{progress.step}"
        content = dataclasses.asdict(progress) | {"fingerprint": fingerprint | {"state": shapes(state)}}
        text = json.dumps(content, indent=1, allow_nan=True) + "\n"
        with self._explained(final):
            self._check_room(stored_arrays(state))
        arrays, begun = _copied(stored_arrays(state)), None
        if jax.process_count() > 1:
            # Orbax's processes meet in collectives, which must lie between the same steps in all of them
            with self._explained(final):
                begun = self._begin(final, arrays)

        def write() -> None:
            try:
                with self._explained(final):
                    self._finish(final, begun or self._begin(final, arrays), text)
                    for path in list_checkpoints(self.output_dir)[: -self.keep if self.keep else 0]:
                        if path != protected and is_writer():
                            shutil.rmtree(path)
            except Exception as error:
                self._error = error

        self._thread = threading.Thread(target=write, name="fastjax-checkpoint")
        self._thread.start()
        return final

    def _check_room(self, arrays: dict[str, jax.Array]) -> None:
        """Of a disk that is full Orbax tells as well, in many words, and only halfway."""
        if not is_writer():
            return
        self.output_dir.mkdir(parents=True, exist_ok=True)
        size, free = sum(leaf.nbytes for leaf in arrays.values()), shutil.disk_usage(self.output_dir).free
        if size > free:
            raise OSError(f"it takes {size / 2**20:,.1f} MiB and the disk has {free / 2**20:,.1f}")

    def _begin(self, final: Path, arrays: dict[str, jax.Array]) -> Any:
        """Orbax's checkpointer, at work in a temporary directory."""
        import orbax.checkpoint as ocp

        temporary = final.with_name(final.name + TEMPORARY)
        if is_writer():
            for leftover in self.output_dir.glob(f"checkpoint-*{TEMPORARY}"):
                shutil.rmtree(leftover)
            temporary.mkdir(parents=True)
        wait_for_all(temporary.name)
        checkpointer = ocp.StandardCheckpointer()
        checkpointer.save(temporary.resolve() / "state", arrays)
        return checkpointer

    def _finish(self, final: Path, checkpointer: Any, text: str) -> None:
        with checkpointer:  # waits at its end
            pass
        if not is_writer():
            return
        temporary = final.with_name(final.name + TEMPORARY)
        (temporary / FILE_NAME).write_text(text)
        if final.exists():  # of a run that was resumed from before it
            shutil.rmtree(final)
        temporary.rename(final)

    def wait(self) -> None:
        """Until what was saved is there."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    @contextlib.contextmanager
    def _explained(self, path: Path) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise many kinds for a full disk
            if is_of_another(error):
                raise
            code = re.search(r"os_error_code='(\d+)'", str(error))  # TensorStore's, at the end of a long line
            first = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            reason = os.strerror(int(code[1])) if code else first
            last = next(reversed(list_checkpoints(self.output_dir)), None)
            kept = f"; {last} is whole, resume from it" if last else ""
            raise UserError(
                f"{path} could not be written ({reason}): make room on the disk or choose another output_dir{kept}."
            ) from error


@jax.jit
def _copied(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """One program for all of them: the host, which is about to start the next step, is not kept."""
    return jax.tree.map(jnp.copy, arrays)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    paths = [path for path in output_dir.glob("checkpoint-*") if NAME.fullmatch(path.name)]
    return sorted((path for path in paths if (path / FILE_NAME).is_file()), key=step_of)


def step_of(path: Path) -> int:
    match = NAME.fullmatch(path.name)
    return int(match[1]) if match else 0


def find_checkpoint(output_dir: Path, resume: bool | str | Path) -> Path | None:
    """The checkpoint to start from: the latest for True, the named one for a path, none for False; for "auto" the latest,
    if there is one, as a job that its scheduler may start again wants.

    A run whose output directory holds checkpoints past its start is refused: they would mix with its own.
    """
    existing = list_checkpoints(output_dir)
    if resume == AUTO:
        resume = bool(existing)
    if resume is True and not existing:
        raise UserError(
            f"{output_dir} holds no checkpoint to resume from: train without resume_from_checkpoint, or with {AUTO!r}."
        )
    start = existing[-1] if resume is True else Path(resume) if resume else None
    if existing and step_of(existing[-1]) > (step_of(start) if start else 0):
        raise UserError(
            f"{existing[-1]} lies past the step this run starts from: continue it with resume_from_checkpoint=True,"
            " choose another output_dir, or remove it."
        )
    return start


def restore_checkpoint(path: Path, template: TrainState, fingerprint: Fingerprint) -> tuple[TrainState, Progress]:
    """The state and the progress saved at `path`; `template` gives the structure, dtypes and shardings."""
    import orbax.checkpoint as ocp

    content = read_content(path)
    saved, current = content.pop("fingerprint"), as_json(fingerprint | {"state": shapes(template)})
    check_fingerprint(path, _of_any_mesh(saved), _of_any_mesh(current))
    target = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
        for name, leaf in stored_arrays(template).items()
        if saved["state"].get(name) == current["state"][name]
    }
    # partial: what is let go is not read
    where = ocp.checkpoint_utils.construct_restore_args(target)
    wanted = ocp.args.PyTreeRestore(item=target, restore_args=where, partial_restore=True)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            arrays = checkpointer.restore(path.resolve() / "state", args=wanted)
    except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise UserError(f"{path}/state cannot be read ({reason}): resume from an earlier checkpoint.") from error
    return with_arrays(template, arrays), Progress(**content)


def _of_any_mesh(fingerprint: Fingerprint) -> Fingerprint:
    """Without the arrays that a run on another mesh does without."""
    return fingerprint | {"state": {name: of for name, of in fingerprint["state"].items() if not name.startswith(OWED)}}


def read_content(path: Path) -> dict[str, Any]:
    file = path / FILE_NAME
    try:
        content = json.loads(file.read_text())
        if set(content) != {field.name for field in dataclasses.fields(Progress)} | {"fingerprint"}:
            raise ValueError("its keys are not those of a checkpoint")
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is not a checkpoint, it has no {FILE_NAME}: give an output_dir/checkpoint-N."
        ) from error
    except ValueError as error:
        raise UserError(f"{file} cannot be read ({error}): resume from an earlier checkpoint.") from error
    return content


def check_fingerprint(path: Path, saved: Fingerprint, current: Fingerprint) -> None:
    before, now = dict(flatten(saved)), dict(flatten(current))
    for name in [*before, *now]:
        if before.get(name) != now.get(name):
            then = f"{name}={before[name]}" if name in before else f"no {name}"
            here = f"has {now[name]}" if name in now else "has none"
            same = REMEDIES.get(name, "resume with the same model, LoRA, optimizer and data")
            raise UserError(
                f"{path} was saved with {then} and this run {here}: {same}, or start anew in another output_dir."
            )


def flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("a.b", value) of every value in nested mappings."""
    if not isinstance(tree, Mapping):
        yield prefix, tree
        return
    for key, value in tree.items():
        yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))


def as_json(tree: Any) -> Any:
    """What `tree` is after it has been written and read: tuples turn to lists."""
    return json.loads(json.dumps(tree))


def leaves_by_name(state: TrainState) -> dict[str, jax.Array]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def is_key(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def shapes(state: TrainState) -> dict[str, str]:
    """What each array is, as in "float32[2,8]"."""
    return {name: f"{leaf.dtype}{list(leaf.shape)}".replace(" ", "") for name, leaf in leaves_by_name(state).items()}


def stored_arrays(state: TrainState) -> dict[str, jax.Array]:
    """The leaves as Orbax takes them: random keys by their data, empty arrays not at all."""
    leaves = leaves_by_name(state)
    return {
        name: jax.random.key_data(leaf) if is_key(leaf) else leaf
        for name, leaf in leaves.items()
        if math.prod(leaf.shape)
    }


def with_arrays(template: TrainState, arrays: dict[str, jax.Array]) -> TrainState:
    """`template` with its leaves replaced; the inverse of `stored_arrays`."""

    def restored(name: str, leaf: jax.Array) -> jax.Array:
        array = arrays.get(name, leaf)
        if not leaf.committed:  # a fresh scalar may go to any device; tied to one, it would not join arrays on a mesh
            array = jnp.asarray(np.asarray(array))
        return jax.random.wrap_key_data(array, impl=jax.random.key_impl(leaf)) if is_key(leaf) else array

    leaves = [restored(name, leaf) for name, leaf in leaves_by_name(template).items()]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)
