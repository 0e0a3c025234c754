"""What fills a step's memory: buffers alive where its compiled program needs most, by size and by what made them.

    python -m bench.live_memory --mesh fsdp=2 --batch 8 --layers 8 [--option xla_gpu_enable_latency_hiding_scheduler=false]

The step is compiled and not run; a part of the layers is enough to see what each leaves behind. What lies where is read off
XLA's buffer assignment and its schedule, two protocol buffers whose classes jaxlib does not ship, so that the few fields that
matter are read from their bytes.
"""

import argparse
import collections
import dataclasses
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from bench.step import mesh_sizes, random_rows
from bench.workloads import SHAPES, random_packed_model
from fastjax import FastLanguageModel, init_train_state, make_mesh, make_train_step
from fastjax.parallel.hosts import place_batch
from fastjax.train.optimizers import make_optimizer
from fastjax.train.step import GPU_OPTIONS

Message = list[tuple[int, Any]]  # (field number, a number or bytes)


class Instruction(NamedTuple):
    name: str
    source: str  # the operation in Python's program
    operands: list[int]


class Buffer(NamedTuple):
    size: int
    first: int  # places in the schedule
    last: int
    made_by: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama3.1-8b")
    parser.add_argument("--layers", type=int, help="of the shape's; all by default")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--policy", default="none")
    parser.add_argument("--mesh", type=mesh_sizes, default={}, help="such as data=2,fsdp=2; the batch is that of all")
    parser.add_argument("--option", action="append", default=[], help="one of XLA's, as name=value, on a GPU")
    parser.add_argument("--top", type=int, default=16)
    arguments = parser.parse_args()
    GPU_OPTIONS.update(tuple(option.split("=", 1)) for option in arguments.option)
    compiled = compile_step(arguments)
    stats = compiled.memory_analysis()
    assert stats is not None
    print(f"temporary, as compiled: {stats.temp_size_in_bytes / 2**30:.2f} GiB")
    module = compiled.runtime_executable().hlo_modules()[0].as_serialized_hlo_module_proto()
    instructions, schedule = scheduled(module)
    live = fullest(buffers(stats.serialized_buffer_assignment_proto, instructions, schedule), len(schedule))
    print("\n".join(table(live, arguments.top)))


def compile_step(arguments: argparse.Namespace) -> Any:
    config = SHAPES[arguments.shape]
    config = dataclasses.replace(config, num_layers=arguments.layers or config.num_layers)
    mesh = make_mesh(**arguments.mesh) if arguments.mesh else None
    module = random_packed_model(config, mesh=mesh, scan_layers=False)
    model = FastLanguageModel.get_peft_model(FastLanguageModel(module, mesh=mesh), r=16, lora_alpha=16)
    optimizer = make_optimizer("adamw_8bit", learning_rate=2e-4)
    state = init_train_state(model, optimizer)
    arguments.packed = False
    rows, _ = random_rows(arguments, config.vocab_size)
    batch = jax.device_put(place_batch(rows, mesh, arguments.batch))
    return (
        make_train_step(model, optimizer, mesh, gradient_checkpointing=arguments.policy).lower(state, batch).compile()
    )


def fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Of a message in protocol buffers' wire format."""
    at = 0
    while at < len(data):
        tag, at = varint(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = varint(data, at)
        else:
            size, at = varint(data, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
            value, at = data[at : at + size], at + size
        yield tag >> 3, value


def varint(data: bytes, at: int) -> tuple[int, int]:
    """(a number, where the next field begins)."""
    value = shift = 0
    while True:
        byte = data[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at


def numbers(values: Iterator[tuple[int, Any]] | Message, field: int) -> list[int]:
    """Of a repeated field, packed or not."""
    found = []
    for number, value in values:
        if number == field and isinstance(value, int):
            found.append(value)
        elif number == field:
            at = 0
            while at < len(value):
                one, at = varint(value, at)
                found.append(one)
    return found


def scheduled(module: bytes) -> tuple[dict[int, Instruction], list[int]]:
    """All instructions of an HloModuleProto by id, and the ids of its entry computation in the order they run."""
    whole, instructions, sequences = list(fields(module)), {}, {}
    for _, computation in (pair for pair in whole if pair[0] == 3):
        for _, instruction in (pair for pair in fields(computation) if pair[0] == 2):
            own = list(fields(instruction))
            each = dict(own)
            source = dict(fields(each.get(7, b""))).get(2, b"")
            instructions[each.get(35, 0)] = Instruction(each[1].decode(), source.decode(), numbers(own, 36))
    for _, sequence in (pair for schedule in whole if schedule[0] == 7 for pair in fields(schedule[1])):
        each = dict(fields(sequence))
        sequences[each.get(1, 0)] = numbers(fields(each.get(2, b"")), 1)
    return instructions, sequences[dict(whole)[6]]


def buffers(assignment: bytes, instructions: dict[int, Instruction], schedule: list[int]) -> list[Buffer]:
    """Of a BufferAssignmentProto: the temporary ones, from where they are made to their last reader."""
    place = {identity: at for at, identity in enumerate(schedule)}
    last = dict(place)
    for identity in schedule:
        for operand in instructions[identity].operands:
            last[operand] = max(last.get(operand, 0), place[identity])
    made: dict[int, int] = {}
    holders: dict[int, set[int]] = collections.defaultdict(set)
    spans: dict[tuple[int, int, int], list[Buffer]] = collections.defaultdict(list)
    whole = list(fields(assignment))
    for number, value in whole:
        if number in (1, 2):  # a value, or one more instruction that hands it on
            each = dict(fields(value))
            identity = dict(fields(each[3 if number == 1 else 2])).get(4, 0)
            holders[each.get(1, 0)].add(identity)
            if number == 1:
                made[each.get(1, 0)] = identity
    for number, value in whole:
        allocation = list(fields(value)) if number == 3 else []
        known = dict(allocation)
        if known.get(5) or known.get(7):  # a parameter's, or one that lives on as a result
            continue
        for assigned in (dict(fields(one)) for field, one in allocation if field == 9):
            of = assigned.get(1, 0)
            if own := [identity for identity in holders[of] if identity in place]:
                maker = instructions[made[of]]
                name = f"{re.sub('[0-9.]+', '', maker.name):32} {re.sub('[0-9]+', '', maker.source)[-70:]}"
                span = min(place[each] for each in own), max(last[each] for each in own)
                key = known.get(1, 0), assigned.get(2, 0), assigned.get(3, 0)
                spans[key].append(Buffer(key[2], *span, name))
    return [buffer for at_one_place in spans.values() for buffer in joined(at_one_place)]


def joined(buffers: list[Buffer]) -> list[Buffer]:
    """Of buffers at one place those that touch are one, changed in place: it keeps the name of the first."""
    found: list[Buffer] = []
    for each in sorted(buffers, key=lambda buffer: buffer.first):
        if found and each.first <= found[-1].last:
            found[-1] = found[-1]._replace(last=max(found[-1].last, each.last))
        else:
            found.append(each)
    return found


def fullest(found: list[Buffer], places: int) -> list[Buffer]:
    """Those alive where there are most bytes of them."""
    change = [0] * (places + 1)
    for buffer in found:
        change[buffer.first] += buffer.size
        change[buffer.last + 1] -= buffer.size
    total, best, at = 0, 0, 0
    for place, bytes_more in enumerate(change):
        total += bytes_more
        best, at = max((best, at), (total, place), key=lambda pair: pair[0])
    return [buffer for buffer in found if buffer.first <= at <= buffer.last]


def table(live: list[Buffer], top: int) -> list[str]:
    alike = collections.defaultdict(list)
    for buffer in live:
        alike[buffer.size, buffer.made_by].append(buffer)
    groups = sorted(alike.items(), key=lambda group: -group[0][0] * len(group[1]))[:top]
    lines = [f"alive at once: {sum(buffer.size for buffer in live) / 2**30:.2f} GiB"]
    for (size, made_by), group in groups:
        lines.append(f"{size * len(group) / 2**20:10.1f} MiB = {len(group):3} x {size / 2**20:8.1f}  {made_by}")
    return lines


if __name__ == "__main__":
    main()
