"""The repository as a whole: what no file may say, the record behind every figure, bounds, links."""

import json
import re
import subprocess
import tomllib
from functools import cache
from pathlib import Path

import pytest

from fastjax.cli.config import load_run_config

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
CONFIGS = sorted(ROOT.glob("configs/*.yaml"))
RECORDS = sorted(ROOT.glob("bench/results/**/*.json"))
# Written with brackets so that the patterns do not find themselves.
REGISTRIES = re.compile(r"pypi[.]org|pythonhoste[d]|registry[.]npmjs|deb[.]debian|anacond[a][.]org|download[.]pytorch")
MACHINE_PATHS = re.compile(r"/(?:roo[t]|wor[k]|far[m]|mn[t]|hom[e]/[a-z]\w*|User[s]/\w+)/")
FIGURES = re.compile(r"<!-- figures: (?P<records>[^>]*?) -->(?P<body>.*?)<!-- /figures -->", re.DOTALL)
MEASUREMENT = re.compile(r"\d[\d,.]*\s*(?:tok/s|tokens/s|TFLOP/s|TB/s|GiB|GB/s|x faster|times faster)")


@cache
def text_files() -> dict[str, str]:
    """Path -> text of every file that is or would be committed."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    paths = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    found = {}
    for path in paths:
        data = path.read_bytes() if path.is_file() else b""
        if b"\0" not in data:
            found[path.relative_to(ROOT).as_posix()] = data.decode(errors="replace")
    return found


@pytest.mark.parametrize("pattern", [REGISTRIES, MACHINE_PATHS], ids=["package registries", "paths of one machine"])
def test_no_file_names(pattern):
    hits = [f"{name}: {match[0]}" for name, text in text_files().items() for match in pattern.finditer(text)]
    assert not hits


def numbers_in(value) -> list[float]:
    """Every number anywhere in a JSON value."""
    if isinstance(value, dict):
        return [number for item in value.values() for number in numbers_in(item)]
    if isinstance(value, list):
        return [number for item in value for number in numbers_in(item)]
    return [float(value)] if isinstance(value, int | float) and not isinstance(value, bool) else []


def figures_of(table: str) -> list[str]:
    """The measurements in a markdown table: all numbers but those of its header and of the first cell of a row."""
    body = re.split(r"^\|[-:| ]+\|$", table, flags=re.MULTILINE)[-1]
    cells = [cell for line in body.splitlines() for cell in line.strip("| ").split("|")[1:]]
    return [figure for cell in cells for figure in re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?", cell)]


def unbacked(figures: list[str], recorded: list[float]) -> list[str]:
    """Figures that are no recorded number rounded to the places shown."""

    def backed(figure: str) -> bool:
        places = len(figure.partition(".")[2])
        return any(f"{number:,.{places}f}".replace(",", "") == figure.replace(",", "") for number in recorded)

    return [figure for figure in figures if not backed(figure)]


def test_readme_figures_are_recorded():
    """`<!-- figures: a.json b.json -->` to `<!-- /figures -->`: only numbers of those files under bench/results."""
    for block in FIGURES.finditer(README.read_text()):
        paths = [ROOT / "bench" / "results" / name for name in block["records"].split()]
        results = [json.loads(path.read_text())["results"] for path in paths]
        assert results, "a figures block names the records it shows"
        assert not unbacked(figures_of(block["body"]), numbers_in(results))


def test_measurements_stand_in_figures_blocks():
    for name in ("README.md", "CHANGELOG.md"):
        outside = MEASUREMENT.findall(FIGURES.sub("", (ROOT / name).read_text()))
        assert not outside, f"{name}: a speed or size outside a figures block"


def test_unbacked_figures_are_found():
    assert figures_of("| shape | r=16 |\n|---|---|\n| 2x2048 | 12,961 tok/s @ 21.1 |\n") == ["12,961", "21.1"]
    assert unbacked(["12,961", "21.1", "3"], [12960.7, 21.149]) == ["3"]
    assert unbacked(["12,962"], [12960.7]) == ["12,962"]


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_records_say_where_they_come_from(path):
    environment = json.loads(path.read_text())["environment"]
    assert all(environment[key] for key in ("command", "device", "versions", "commit"))
    assert re.match(r"\d{4}-\d{2}-\d{2}", environment["date"])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_load(path):
    assert load_run_config(path).model["model_name"]


def test_dependencies_have_lower_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [item for group in project["optional-dependencies"].values() for item in group]
    others = [item for item in [*project["dependencies"], *extras] if not item.startswith("fastjax[")]
    assert not [item for item in others if not re.search(r">=|==", item)]


def test_relative_links_lead_somewhere():
    broken = []
    for name, text in text_files().items():
        if name.endswith(".md"):
            links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text)
            broken += [f"{name}: {link}" for link in links if not (ROOT / name).parent.joinpath(link).exists()]
    assert not broken
