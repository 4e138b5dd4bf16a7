"""Facts about the whole repository: what every method brings, what is declared, what no file may say."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from limbeck import catalog

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "limbeck"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

MODULES = sorted(path for path in (PACKAGE / "methods").glob("*/*.py") if not path.stem.startswith("_"))
each_module = pytest.mark.parametrize("module", MODULES, ids=[path.stem for path in MODULES])
each_system = pytest.mark.parametrize("system", catalog.systems(), ids=lambda system: system.slug)

# Declared, although no line of ours imports it: Fabric's TensorBoard logger does.
IMPORTED_BY_OTHERS = {"tensorboard"}

# Spelled in parts, so that this file passes its own test.
FORBIDDEN = re.compile(
    "|".join(
        [
            r"(?<![\w.~])/" + r"(?:work|root|tmp/bash_jobs|opt/wheels|opt/pypi[\w-]*)/",
            r"(?<![\w.~])/" + r"(?:home|Users)/\w+/",
            r"\bpypi\." + r"(?:org|python)",
            r"\bpython" + r"hosted\.org",
            r"\bdownload\.pytorch" + r"\.org",
            r"\bregistry\." + r"npmjs",
            r"\banaconda" + r"\.org",
        ]
    )
)


def repository_files() -> list[Path]:
    """The files that git has or would add; outside of a checkout, all below the folders that are shipped."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True
    )
    if listed.returncode == 0:
        return [ROOT / name for name in os.fsdecode(listed.stdout).split("\0") if name and (ROOT / name).is_file()]
    folders = [ROOT / name for name in ("limbeck", "tests", "benchmarks", "results")]
    return [
        path for folder in folders for path in folder.rglob("*") if path.is_file() and "__pycache__" not in str(path)
    ]


def imports_of(path: Path) -> set[str]:
    """Top-level names of the third-party modules that a file imports anywhere, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"limbeck"}


def names_of(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in requirements}


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}


@pytest.mark.parametrize("module", ["limbeck", "limbeck.cli", "limbeck.catalog"])
def test_import_leaves_torch_out(module: str) -> None:
    heavy = {"torch", "transformers", "sklearn"}
    code = f"import sys, {module}; sys.exit(str(found) if (found := {heavy} & set(sys.modules)) else 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"import {module} brings in or raises: {done.stderr}"


@each_module
def test_every_method_module_has_a_card_beside_it(module: Path) -> None:
    assert module.with_suffix(".md") in {system.card for system in catalog.systems()}


@each_system
def test_every_card_has_a_module_beside_it_that_defines_its_object(system: catalog.System) -> None:
    tree = ast.parse(system.card.with_suffix(".py").read_text(encoding="utf-8"))
    defined = {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    assert system.object in defined


@each_system
def test_every_system_has_a_recipe(system: catalog.System) -> None:
    recipe = yaml.safe_load((PACKAGE / "recipes" / f"{system.slug}.yaml").read_text(encoding="utf-8"))
    assert isinstance(recipe, dict) and recipe


@each_module
def test_every_method_module_has_tests_in_the_mirrored_place(module: Path) -> None:
    tests = ROOT / "tests" / "methods" / module.parent.name / f"test_{module.stem}.py"
    assert tests.is_file(), f"{tests.relative_to(ROOT)} is missing"
    assert re.search(r"^def test_\w+", tests.read_text(encoding="utf-8"), re.MULTILINE)


@each_system
def test_every_system_has_measured_its_claim(system: catalog.System) -> None:
    if system.reference:
        pytest.skip(f"{system.slug} is a reference: others are measured against it, it claims nothing itself")
    assert (ROOT / "results" / f"{system.slug}.json").is_file(), f"run: limbeck prove {system.slug}"


def test_every_recipe_and_every_result_belongs_to_a_system() -> None:
    slugs = {system.slug for system in catalog.systems()}
    results = {path.stem for path in (ROOT / "results").glob("*.json")}
    assert results <= slugs, "results of no system"
    recipes = {path.stem for path in (PACKAGE / "recipes").glob("*.yaml")}
    # A system may come with further recipes (other data, other models), named `<slug>.<what differs>.yaml`.
    assert {name.split(".")[0] for name in recipes} <= slugs, "recipes of no system"


def test_no_file_names_a_path_of_one_machine_or_a_package_registry() -> None:
    found = []
    for path in repository_files():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:  # a picture or another binary
            continue
        found += [
            f"{path.relative_to(ROOT)}:{n}: {line.strip()[:100]}"
            for n, line in enumerate(lines, 1)
            if FORBIDDEN.search(line)
        ]
    assert not found, "\n".join(found)


def test_every_import_of_the_package_is_declared() -> None:
    owners = packages_distributions()
    declared = names_of([*PROJECT["dependencies"], *(r for e in PROJECT["optional-dependencies"].values() for r in e)])
    undeclared = []
    for path in PACKAGE.rglob("*.py"):
        for name in imports_of(path):
            # A package of an extra that is not installed has no owner here: its name stands for itself.
            distributions = {canonicalize_name(owner) for owner in owners.get(name, [name])}
            if not distributions & declared:
                undeclared.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not undeclared, "\n".join(undeclared)


def test_every_core_dependency_is_imported_somewhere() -> None:
    owners = packages_distributions()
    imported = {
        canonicalize_name(owner)
        for path in PACKAGE.rglob("*.py")
        for name in imports_of(path)
        for owner in owners.get(name, [name])
    }
    assert names_of(PROJECT["dependencies"]) - imported == IMPORTED_BY_OTHERS


def test_constraints_pin_every_dependency_inside_its_range() -> None:
    pinned = pins()
    extras = PROJECT["optional-dependencies"]
    for line in [*PROJECT["dependencies"], *extras["dev"], *extras["export"]]:
        requirement = Requirement(line)
        version = pinned.get(canonicalize_name(requirement.name))
        assert version, f"constraints.txt has no pin for {requirement.name}"
        assert requirement.specifier.contains(version, prereleases=True), f"{line} excludes the pin {version}"


def test_constraints_hold_for_every_machine() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    # A local version such as +cpu exists only on some indexes, and a URL only on some machines.
    wrong = [line for line in lines if not re.fullmatch(r"#.*|[\w.-]+==[\w.!]+", line)]
    assert not wrong


def test_ci_runs_the_command_that_the_readme_gives() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert script.splitlines()[-1] == "make test"
    assert "make test" in (ROOT / "README.md").read_text(encoding="utf-8")
