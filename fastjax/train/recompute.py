"""What the backward pass keeps of each decoder layer: its choice by name, or by the memory there is."""

from fastjax.errors import UserError
from fastjax.models.decoder import Policy, Runs
from fastjax.train.memory import StepMemory
from fastjax.train.room import PINNED

CHOICES = ("auto", "none", "full", "offload")
# what scripts for HF and Unsloth say
ALIASES: dict[str | bool, str] = {True: "full", False: "none", "unsloth": "auto"}
SHARE = 0.88  # of what weights and states leave of the device: activations are one block, and what is free need not be
SURE = 1.05  # of what there is: what is planned to take more does not fit, as plans are right to 5 %
# of rows so long, attention takes longer again than its output to the host and back; of 12,000 as long, by 50 GB/s of link
# and 600 TFLOP/s, and measured at 65,536 (bench/results/h200/trials.json)
LONG_ROW = 16384
# of long rows an eighth of the layers whole or none: each takes much and, as none attends twice, saves little
FEWEST_WHOLE = 8


def choose_runs(gradient_checkpointing: str | bool, memory: StepMemory, limit: int | None, host: int) -> Runs:
    """The policies of the layers (decoder.py says what each keeps); "auto" keeps as many layers whole as fit `limit`.

    `limit` is the device's memory in bytes, None no limit; `host` that of the host for what is offloaded from the device.
    What is sure not to fit is refused.
    """
    choice = checked_choice(gradient_checkpointing)
    runs = fitting_runs(memory, limit, host) if choice == "auto" else named_runs(choice, memory, host)
    if limit is None or (runs is not None and memory.peak(runs) <= SURE * limit):
        return runs or ()
    if runs is None or fitting_runs(memory, limit, host) is None:
        raise UserError(misfit(memory, limit, host))
    raise UserError(
        f"gradient_checkpointing={choice!r} needs {gib(memory.peak(runs))} GiB on each device, and it has {gib(limit)}: choose"
        f" 'auto', or change what else takes memory ({remedies(memory, limit)})."
    )


def checked_choice(gradient_checkpointing: str | bool) -> str:
    """The choice by its name of CHOICES."""
    choice = ALIASES.get(gradient_checkpointing, str(gradient_checkpointing))
    if choice not in CHOICES:
        raise UserError(f"gradient_checkpointing={choice!r} is unknown; use one of {', '.join(CHOICES)}.")
    return choice


def named_runs(choice: str, memory: StepMemory, host: int) -> Runs:
    """Of the policy of all layers, whether it fits or not."""
    if choice == "none":
        return (("none", memory.layers),)
    if choice == "full":
        return (("full", memory.layers),)
    return offloading_runs(memory, memory.layers, host)


def fitting_runs(memory: StepMemory, limit: int | None, host: int) -> Runs | None:
    """The fastest policies that fit: as many layers whole as can be beside recomputed ones, else beside offloaded ones;
    of long rows, beside offloaded ones.

    Layers that are run again come first: the backward pass reaches them last, when what the others kept is gone. None
    if even with every layer offloaded the step does not fit.
    """
    layers, long = memory.layers, memory.row >= LONG_ROW
    fewest = -(-layers // FEWEST_WHOLE) if long else 1
    for offloaded in (True,) if long else (False, True):
        for whole in (*range(layers, fewest - 1, -1), 0):
            again = layers - whole
            rest: Runs = offloading_runs(memory, again, host) if offloaded else (("full", again),)
            runs = without_empty((*rest, ("none", whole)))
            if fits(memory, runs, limit):
                return runs
    return None


def fits(memory: StepMemory, runs: Runs, limit: int | None) -> bool:
    return limit is None or memory.activations(runs) <= SHARE * (limit - memory.static)


def offloading_runs(memory: StepMemory, layers: int, host: int) -> Runs:
    """So many layers in the host's memory, with attention's output if rows are long. Those for which there is no room keep
    their input on the device; so do a few if then half of what may be pinned does for the others.
    """
    policy: Policy = "offload_o" if memory.row >= LONG_ROW else "offload"
    half = min(host, PINNED // 2 - PINNED // 128)
    at_half, at_most = (min(layers, room // memory.host[policy]) for room in (half, host))
    count = at_half if 10 * at_half >= 9 * layers else at_most
    return without_empty(((policy, count), ("full", layers - count)))


def without_empty(runs: Runs) -> Runs:
    return tuple((policy, count) for policy, count in runs if count)


def misfit(memory: StepMemory, limit: int, host: int) -> str:
    """One sentence: what is needed at least, what there is, and the three changes that help most."""
    least = memory.static + memory.activations(offloading_runs(memory, memory.layers, host)) / SHARE
    return (
        f"a step needs at least {gib(least)} GiB on each device even with every layer offloaded, and it has {gib(limit)}: "
        f"{remedies(memory, limit)}."
    )


def remedies(memory: StepMemory, limit: int) -> str:
    """Three changes that help: with weights and states where these are too much by themselves, else with the batch."""
    if memory.static > SHARE * limit:
        return (
            f"weights and states alone take {gib(memory.static)}, so split them over more devices with mesh.fsdp, pack weights"
            " with load_in_4bit, or train fewer parameters (lora.r, target_modules, optim adamw_8bit)"
        )
    fewer_rows = "halve per_device_train_batch_size (and double gradient_accumulation_steps), " * (memory.rows > 1)
    weights = "or split the model over more devices with mesh.fsdp" + ", its rows with mesh.context" * (memory.rows > 1)
    return f"{fewer_rows}shorten max_length, {'split rows with mesh.context, ' * (memory.rows == 1)}{weights}"


def gib(size: float) -> str:
    return f"{size / 2**30:.1f}"
