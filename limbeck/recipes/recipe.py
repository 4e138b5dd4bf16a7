"""Recipes: YAML in which every key is an argument of a function or class, read, checked and merged.

A recipe has the sections `method` (a slug, or `name` and the constructor's arguments), `data` (`load_data`), `student`
and `teacher` (`load_model`), `streams` (one a stream that the method declares), `trainer` (`Trainer`), `seed`, and the
`claim` that `limbeck prove` measures. The signatures are the interface: an unknown key is an error that names it.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from limbeck import catalog
from limbeck.errors import UserError

FOLDER = Path(__file__).parent
SECTIONS = ("method", "data", "student", "teacher", "streams", "trainer", "seed", "claim")


@dataclass(frozen=True)
class StreamSettings:
    """Batches of one stream.

    Args:
        batch_size: samples of one process in one step.
        views: name of each view, and which one it is: a name (`weak`) or a name with arguments
            (`{name: weak, padding: 4}`).
        cycle: repeat a set that is smaller than a batch, or not a multiple of it, without dropping samples.
        workers: processes that decode images which do not fit into memory.
    """

    batch_size: int = 64
    views: dict[str, Any] = field(default_factory=lambda: {"weak": "identity"})
    cycle: bool = False
    workers: int = 0


def read(recipe: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """The content of a recipe: a slug (its own recipe), a YAML file, or a mapping.

    Raises:
        UserError: there is no such slug or file (with the nearest slug), or it is no mapping of known sections.
    """
    if isinstance(recipe, Mapping):
        content: Any = copy.deepcopy(dict(recipe))
        name = "the recipe"
    else:
        path = _file(str(recipe))
        name = path.name
        try:
            content = yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            place = getattr(error, "problem_mark", None)
            where = f" in line {place.line + 1}" if place else ""
            raise UserError(f"{path} is no valid YAML{where}; {getattr(error, 'problem', None) or error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{name} is no mapping of sections ({', '.join(SECTIONS)})")
    for key in content:
        if key not in SECTIONS:
            raise UserError(
                f"{name} has the unknown section '{key}'{nearest(key, SECTIONS)}; it may have {', '.join(SECTIONS)}"
            )
    if "method" not in content:
        raise UserError(f"{name} names no method; add a line such as 'method: kd'")
    if isinstance(content["method"], str):
        content["method"] = {"name": content["method"]}
    return content


def _file(recipe: str) -> Path:
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UserError(f"there is no recipe file {path}")
        return path
    if (variant := FOLDER / f"{recipe}.yaml").is_file():  # kd, or a variant of it such as kd.transformers
        return variant
    catalog.system(recipe)  # an unknown slug is an error with the nearest name
    raise UserError(f"'{recipe}' has no recipe of its own yet; write one and give its file")


def override(recipe: dict[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with dotted keys set, e.g. `{"trainer.epochs": 3}`; values may be YAML text."""
    result = copy.deepcopy(recipe)
    for dotted, value in settings.items():
        *parents, last = dotted.split(".")
        place = result
        for name in parents:
            inner = place.setdefault(name, {})
            if isinstance(inner, str):  # `views: {weak: identity}` grows arguments
                inner = place[name] = {"name": inner}
            if not isinstance(inner, dict):
                raise UserError(f"--{dotted}: '{name}' is {inner!r} in the recipe, it has no keys")
            place = inner
        place[last] = yaml.safe_load(value) if isinstance(value, str) else value
        if dotted == "method":
            result["method"] = {"name": value}
    return result


def merge(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe `base` with the keys of `change`; naming another method replaces that whole section."""
    change = dict(change)
    if "method" in change:
        method = {"name": change["method"]} if isinstance(change["method"], str) else change["method"]
        if method.get("name", base["method"]["name"]) != base["method"]["name"]:
            base = {**base, "method": {}}
        change["method"] = method
    return _merge(base, change)


def _merge(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `change`, mappings merged key by key."""
    result = copy.deepcopy(dict(base))
    for key, value in change.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = _merge(result[key], value) if both else copy.deepcopy(value)
    return result


def fit_to_method(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe without the teacher and the streams that its method does not use, for the arms of a comparison."""
    result = copy.deepcopy(dict(recipe))
    method = method_class(result["method"]["name"])
    if "teacher" not in inspect.signature(method).parameters:
        result.pop("teacher", None)
    if "streams" in result:
        result["streams"] = {name: value for name, value in result["streams"].items() if name in method.streams}
    return result


def method_class(name: str, allow_imports: bool = False) -> Any:
    """The class of a slug, or of `package.module:Class` where the user allows imports."""
    if ":" in name:
        return import_object(name, allow_imports)
    return catalog.load(name)


def import_object(name: str, allow_imports: bool) -> Any:
    """What `package.module:name` names. Importing runs that module's code, so the user must have allowed it."""
    if not allow_imports:
        raise UserError(
            f"the recipe names '{name}', code from outside Limbeck; read it, and pass --allow-imports if you trust it"
        )
    import importlib

    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"'{name}' cannot be imported ({error})") from error


def refuse_foreign_classes(value: Any, allow_imports: bool, where: str = "") -> None:
    """Refuse `class_path`, which imports what it names before any type is checked, and code of a hub's checkpoints."""
    if allow_imports:
        return
    if isinstance(value, Mapping):
        for key, inner in value.items():
            place = f"{where}.{key}" if where else str(key)
            if key == "class_path" or (key == "trust_remote_code" and inner not in (False, None)):
                raise UserError(
                    f"the recipe asks for code from outside Limbeck at {place} ({inner}); read it, and pass "
                    "--allow-imports if you trust it"
                )
            refuse_foreign_classes(inner, allow_imports, place)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for number, inner in enumerate(value):
            refuse_foreign_classes(inner, allow_imports, f"{where}[{number}]")


def parser_of(method: Any) -> Any:
    """The jsonargparse parser of a method's recipes: one argument for each key, with types, defaults and help."""
    from jsonargparse import ArgumentParser

    from limbeck.data import load_data
    from limbeck.models import load_model
    from limbeck.recipes.data import NOT_IN_RECIPES, harder, tokenized
    from limbeck.train import Trainer

    parser = ArgumentParser(prog="limbeck run", exit_on_error=False, default_env=False)
    parser.add_argument("--seed", type=int, default=0, help="of splits, initial weights, order and views")
    parser.add_argument("--method.name", type=str, required=True, help="slug of the system")
    parser.add_class_arguments(method, "method", skip={*_objects(method)}, instantiate=False)
    parser.add_function_arguments(load_data, "data", skip={*NOT_IN_RECIPES})
    parser.add_function_arguments(harder, "data", as_group=False, skip={"data", "seed"})
    parser.add_function_arguments(tokenized, "data", as_group=False, skip={"data"})
    parser.add_function_arguments(load_model, "student")
    if "teacher" in inspect.signature(method).parameters:
        parser.add_function_arguments(load_model, "teacher")
    for stream in method.streams:
        parser.add_class_arguments(StreamSettings, f"streams.{stream}")
    parser.add_class_arguments(Trainer, "trainer", skip={"seed"})
    return parser


def _objects(method: Any) -> list[str]:
    """Arguments of a method that are networks, teachers or tensors: objects, which YAML text must not bring to life."""
    from torch import Tensor, nn

    from limbeck.teachers import Teacher

    hints = get_type_hints(method.__init__)
    kinds = {name: [kind for kind in (hint, *get_args(hint)) if isinstance(kind, type)] for name, hint in hints.items()}
    return [name for name, found in kinds.items() if any(issubclass(k, Tensor | nn.Module | Teacher) for k in found)]


def parse(recipe: Mapping[str, Any], allow_imports: bool = False) -> tuple[Any, Any]:
    """The method's class and the checked settings of a recipe (without its claim), with `Trainer` and streams built.

    Raises:
        UserError: a key is unknown (with the nearest one), a value has the wrong type, or foreign code is named.
    """
    refuse_foreign_classes(recipe, allow_imports)
    method = method_class(str(recipe["method"].get("name", "")), allow_imports)
    parser = parser_of(method)
    settings = {key: expand(value) for key, value in recipe.items() if key != "claim"}
    _check_keys(settings, parser)
    from jsonargparse import ArgumentError

    try:
        return method, parser.instantiate(parser.parse_object(settings, defaults=True))
    except (ArgumentError, TypeError, KeyError) as error:
        raise UserError(f"the recipe does not fit: {_one_line(error)}") from None


def expand(value: Any) -> Any:
    """`${LIMBECK_DATA}` and `${LIMBECK_MODELS}` in texts become the folders that the environment names."""
    from limbeck.data.sources import data_folder

    if isinstance(value, str):
        folders = {"LIMBECK_DATA": data_folder(), "LIMBECK_MODELS": data_folder().parent / "models"}
        for name, default in folders.items():
            value = value.replace("${" + name + "}", os.environ.get(name, str(default)))
        return value
    if isinstance(value, Mapping):
        return {key: expand(inner) for key, inner in value.items()}
    return [expand(inner) for inner in value] if isinstance(value, list) else value


def _check_keys(settings: Mapping[str, Any], parser: Any) -> None:
    """Name an unknown key in our own words, with the nearest known one."""
    kinds = {action.dest: getattr(action, "_typehint", None) for action in parser._actions}
    kinds = {name: kind for name, kind in kinds.items() if not name.endswith(".help")}
    for section, content in settings.items():
        inside = {n.removeprefix(f"{section}."): kind for n, kind in kinds.items() if n.startswith(f"{section}.")}
        if section not in kinds and not inside:
            raise UserError(
                f"the method {settings['method']['name']} has no use for the section '{section}'; remove it"
            )
        if inside:
            _check_section(section, content, inside)


def _check_section(section: str, content: Any, inside: Mapping[str, Any]) -> None:
    if not isinstance(content, Mapping):  # text would be taken for a file of settings, which nobody has checked
        raise UserError(
            f"{section} is {content!r} in the recipe; it is a mapping with keys such as {next(iter(inside))}"
        )
    first = sorted({name.split(".")[0] for name in inside})
    for key, value in content.items():
        if key not in first:
            raise UserError(
                f"unknown key '{section}.{key}' in the recipe{nearest(str(key), first)}; "
                f"{section} has {', '.join(first)}"
            )
        if value is not None:
            deeper = {n.removeprefix(f"{key}."): kind for n, kind in inside.items() if n.startswith(f"{key}.")}
            deeper |= dict.fromkeys(_settings_of(inside.get(key)))
            if deeper:
                _check_section(f"{section}.{key}", value, deeper)


def _settings_of(kind: Any) -> list[str]:
    """The field names of a dataclass, or of the one in a union with None; nothing for free-form mappings."""
    found = [each for each in (kind, *get_args(kind)) if is_dataclass(each)]
    return [each.name for each in fields(found[0])] if found else []


def nearest(word: str, words: Sequence[str]) -> str:
    """`; did you mean 'x'?` or nothing."""
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)[:400]
