"""The YAML file of a run, and `key=value` settings that go before it.

    model:   arguments of FastLanguageModel.from_pretrained
    lora:    arguments of FastLanguageModel.get_peft_model; left out, no LoRA is attached
    data:    path and eval_path, of files or data sets on the hub; split, eval_split, name and streaming as `datasets`
             means them; and how records are read, by the settings of SFTConfig listed in FORMAT
    train:   fields of SFTConfig, where the latter may stand as well
    mesh:    how many devices each axis of fastjax.make_mesh has; left out, one device trains

Which keys a section knows is read from the function or class that takes them, so that no second list can fall behind.
"""

import dataclasses
import inspect
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fastjax import FastLanguageModel, SFTConfig
from fastjax.data import Record, Unread, load_records
from fastjax.elsewhere import CONFIG_DATA, FROM_PRETRAINED, GET_PEFT_MODEL, understood
from fastjax.errors import UserError, check_keys
from fastjax.parallel.mesh import AXES
from fastjax.train.recompute import checked_choice

STRINGS = ("path", "eval_path", "split", "eval_split", "name")
FORMAT = (
    "dataset_text_field",
    "completion_only_loss",
    "assistant_only_loss",
    "instruction_part",
    "response_part",
    "overlong",
    "bad_rows",
    "packing",
)
SECTIONS = ("model", "lora", "data", "train", "mesh")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A run as its file describes it, checked as far as can be without a model."""

    model: dict[str, Any]
    lora: dict[str, Any] | None
    mesh: dict[str, Any]
    data_path: str
    eval_path: str | None
    split: str
    eval_split: str
    data_name: str | None
    streaming: bool
    train: SFTConfig


def load_run_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    sections = read_yaml(path)
    for override in overrides:
        section, key, value = parse_override(override)
        sections.setdefault(section, {})[key] = value
    model, data, train = (sections.get(name, {}) for name in ("model", "data", "train"))
    lora, mesh = sections.get("lora"), sections.get("mesh", {})
    model = understood(
        model, arguments(FastLanguageModel.from_pretrained, {"mesh"}), FROM_PRETRAINED, "section 'model'"
    )
    if lora is not None:
        lora = understood(
            lora, arguments(FastLanguageModel.get_peft_model, {"model"}), GET_PEFT_MODEL, "section 'lora'"
        )
        checked_choice(lora.get("use_gradient_checkpointing", "auto"))
    data = understood(data, [*STRINGS, "streaming", *FORMAT], CONFIG_DATA, "section 'data'")
    twice = set(data) & set(train)
    if twice:
        raise UserError(f"{path}: {twice.pop()!r} stands in section 'data' and in 'train': give it once.")
    for section, values, key in (("model", model, "model_name"), ("data", data, "path")):
        if not isinstance(values.get(key), str):
            raise UserError(f"{path}: section {section!r} needs {key!r}, a string; found {values.get(key)!r}.")
    check_mesh(mesh, f"{path}: ")
    for key in STRINGS:
        if not isinstance(data.get(key), str | None):
            raise UserError(f"{path}: {key!r} in section 'data' must be a string, found {data[key]!r}.")
    if not isinstance(data.get("streaming", False), bool):
        raise UserError(f"{path}: 'streaming' in section 'data' must be true or false, found {data['streaming']!r}.")
    return RunConfig(
        model=model,
        lora=lora,
        mesh=mesh,
        data_path=data["path"],
        eval_path=data.get("eval_path"),
        split=data.get("split") or "train",
        eval_split=data.get("eval_split") or "train",
        data_name=data.get("name"),
        streaming=data.get("streaming", False),
        train=SFTConfig.from_dict(train | {key: data[key] for key in FORMAT if key in data}, "section 'train'"),
    )


def load_datasets(config: RunConfig, read: bool = True) -> tuple[Iterable[Record], Iterable[Record] | None]:
    """The records to train on, and those to evaluate on, if any. Without `read` only a stream's are there to be read."""
    train = evaluate = Unread()
    if read or config.streaming:
        train = load_records(config.data_path, config.split, name=config.data_name, streaming=config.streaming)
    if config.eval_path is None:
        return train, None
    if read:
        evaluate = load_records(config.eval_path, config.eval_split, name=config.data_name)
    return train, evaluate


def check_mesh(mesh: Mapping[str, Any], where: str = "") -> None:
    """`where` begins a message about a size."""
    check_keys(mesh, AXES, "section 'mesh'")
    for axis, size in mesh.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise UserError(f"{where}{axis!r} in section 'mesh' must be a whole number of devices, found {size!r}.")


def parse_mesh(overrides: Sequence[str]) -> dict[str, Any]:
    """The axes that a command is given which takes no other settings."""
    mesh = {}
    for override in overrides:
        section, axis, size = parse_override(override)
        if section != "mesh":
            raise UserError(f"{override!r} has no meaning here: only mesh.AXIS=N has, such as mesh.tensor=2.")
        mesh[axis] = size
    check_mesh(mesh)
    return mesh


def arguments(function: Callable, without: set[str]) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name not in without]


def parse_override(text: str) -> tuple[str, str, Any]:
    """(section, key, value) of "section.key=value"; the value is YAML."""
    name, equals, value = text.partition("=")
    section, dot, key = name.partition(".")
    if not (equals and dot and key):
        raise UserError(f"{text!r} is not of the form section.key=value, such as train.learning_rate=1e-4.")
    check_keys([section], SECTIONS, f"{text!r}")
    return section, key, parse_yaml(value, text)


def read_yaml(path: Path) -> dict[str, dict[str, Any]]:
    """The sections of a file. One that is there but empty has no keys."""
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise UserError(
            f"Config file {str(path)!r} cannot be read ({error.strerror}): give the path of a YAML file."
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"Config file {str(path)!r} is not UTF-8 text: give the path of a YAML file.") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: expected the sections {', '.join(SECTIONS)}, found {content!r}.")
    check_keys(content, SECTIONS, str(path))
    for name, section in content.items():
        if not isinstance(section, Mapping | None):
            raise UserError(f"{path}: section {name!r} must hold key: value lines, found {section!r}.")
    return {name: dict(section or {}) for name, section in content.items()}


class Loader(yaml.SafeLoader):
    """YAML as its readers take it: 1e-4 is a number, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for (key_node, _), key in zip(node.value, keys, strict=True):
            if keys.count(key) > 1:
                raise yaml.MarkedYAMLError(problem=f"{key!r} is given twice", problem_mark=key_node.start_mark)
        return super().construct_mapping(node, deep)


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{where}{place}: not valid YAML ({error.problem}).") from error
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML ({error}).") from error
