"""Recipes: YAML in which every key is an argument of a function or class, read, checked and merged.

A recipe has the sections `method` (a slug, or `name` and its arguments), `data` (how the task loads its data), one for
each network that the system takes (`student`, `teacher`: how the task loads a network, or `run`, a recipe that trains
it first), `seed`, and the `claim` that `limbeck prove` measures. A `Method` has `streams` (one a stream that it
declares) and a `trainer`; a system of several stages has `stages`, each with its own `trainer` and `streams`. `task` is
only needed for systems from outside. The signatures are the interface: an unknown key is an error that names it.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

import yaml

from limbeck import catalog
from limbeck.errors import UserError

if TYPE_CHECKING:
    from limbeck.recipes.tasks import Task

FOLDER = Path(__file__).parent
SECTIONS = ("method", "task", "data", "streams", "trainer", "stages", "seed", "claim")  # beside those of networks


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
        raise UserError(f"{name} is no mapping of sections ({', '.join(SECTIONS)}, and a network's, such as student)")
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
        try:
            place[last] = yaml.safe_load(value) if isinstance(value, str) else value
        except yaml.YAMLError:
            raise UserError(f"--{dotted}: {value!r} is no valid YAML; close its brackets and quotes") from None
        if dotted == "method":
            result["method"] = {"name": value}
    return result


def merge(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe `base` with the keys of `change`; naming another method replaces that whole section, and so does
    describing a network that a recipe trains (`run`), or having a recipe train one that was described."""
    change = dict(change)
    if "method" in change:
        method = {"name": change["method"]} if isinstance(change["method"], str) else change["method"]
        if method.get("name", base["method"]["name"]) != base["method"]["name"]:
            base = {**base, "method": {}}
        change["method"] = method
    for section, content in change.items():
        before = base.get(section)
        if isinstance(content, Mapping) and isinstance(before, Mapping) and ("run" in content) != ("run" in before):
            base = {**base, section: {}}
    return _merge(base, change)


def _merge(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `change`, mappings merged key by key."""
    result = copy.deepcopy(dict(base))
    for key, value in change.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = _merge(result[key], value) if both else copy.deepcopy(value)
    return result


def fit_to_method(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe without the networks, streams and stages that its method does not use, for a comparison's arms."""
    result = copy.deepcopy(dict(recipe))
    method = method_class(result["method"]["name"])
    known = {*Interface.of(method).sections, "method", "task", "data", "seed", "claim"}
    result = {section: content for section, content in result.items() if section in known}
    if "streams" in result:
        result["streams"] = {name: value for name, value in result["streams"].items() if name in method.streams}
    if "stages" in result:
        stages = Interface.of(method).stages
        result["stages"] = {name: value for name, value in result["stages"].items() if name in stages}
    return result


@dataclass(frozen=True)
class Interface:
    """What a system's signature asks a recipe for: sections of networks, stages, and plain arguments.

    A network's section is a parameter that is annotated as `nn.Module` (a network) or `Teacher` (a frozen one).
    """

    system: Any
    networks: dict[str, type]
    stages: tuple[str, ...]
    objects: tuple[str, ...]  # parameters that are no keys of `method`: the above, tensors, workspace and data
    optional: tuple[str, ...]  # networks and stages that may be left out

    @classmethod
    def of(cls, system: Any) -> Interface:
        """Read the signature of a `Method` class, or of a function over a `Workspace`."""
        from torch import Tensor, nn

        from limbeck.data import Data
        from limbeck.teachers import Teacher
        from limbeck.train import Stage, Workspace

        function: Any = inspect.getattr_static(system, "__init__") if isinstance(system, type) else system
        hints = get_type_hints(function)
        hints.pop("return", None)
        defaults = inspect.signature(function).parameters
        networks: dict[str, type] = {}
        stages, objects = [], []
        for name, hint in hints.items():
            kinds = [kind for kind in (hint, *get_args(hint)) if isinstance(kind, type)]
            for kind in (nn.Module, Teacher):
                if any(issubclass(each, kind) for each in kinds):
                    networks[name] = kind
            if Stage in kinds:
                stages.append(name)
            if any(issubclass(each, Tensor | nn.Module | Teacher | Stage | Workspace | Data) for each in kinds):
                objects.append(name)
        empty = inspect.Parameter.empty
        optional = [name for name in (*networks, *stages) if defaults[name].default is not empty]
        return cls(system, networks, tuple(stages), tuple(objects), tuple(optional))

    @property
    def is_method(self) -> bool:
        """Whether the system is one `Method`, and no function of several stages."""
        return isinstance(self.system, type)

    @property
    def sections(self) -> tuple[str, ...]:
        """The sections that depend on the system."""
        return (*self.networks, *(("streams", "trainer") if self.is_method else ("stages",)))


def method_class(name: str, allow_imports: bool = False) -> Any:
    """The class of a slug, or of `package.module:Class` where the user allows imports."""
    if ":" in name:
        return import_object(name, allow_imports)
    return catalog.load(name)


def bind(system: Any, *positional: Any, **named: Any) -> None:
    """Raise `TypeError` where a system's signature does not take these arguments, before it does any work."""
    inspect.signature(system).bind(*positional, **named)


def name_of(recipe: str | Path) -> str:
    """The name of a slug, variant (`kd.transformers`) or YAML file, for folders and arms."""
    return Path(recipe).name.removesuffix(".yaml").removesuffix(".yml")


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


def parser_of(method: Any, task: Task, without: Collection[str] = ()) -> Any:
    """The jsonargparse parser of a system's recipes: one argument for each key, with types, defaults and help.

    `without` names networks and stages that the recipe does not describe.
    """
    from jsonargparse import ArgumentParser

    from limbeck.teachers import Teacher
    from limbeck.train import StreamSettings, Trainer

    interface = Interface.of(method)
    parser = ArgumentParser(prog="limbeck run", exit_on_error=False, default_env=False)
    parser.add_argument("--seed", type=int, default=0, help="of splits, initial weights, order and views")
    parser.add_argument("--task", type=str, default=task.name, help="what is done; known for a system by its slug")
    parser.add_argument("--method.name", type=str, required=True, help="slug of the system")
    add_method = parser.add_class_arguments if interface.is_method else parser.add_function_arguments
    add_method(method, "method", skip={*interface.objects}, **({"instantiate": False} if interface.is_method else {}))
    task.add_data_arguments(parser)
    for section in interface.networks:
        if section in without:
            continue
        parser.add_function_arguments(task.load_model, section)
        parser.add_argument(f"--{section}.run", type=str, help="recipe that trains this network first")
        if interface.networks[section] is Teacher:
            parser.add_argument(f"--{section}.store", type=str, help="folder of its stored answers (`limbeck label`)")
            parser.add_argument(f"--{section}.answer", type=str, help="stored view that stands for every view")
            parser.add_argument(f"--{section}.served", type=dict, help="settings of an endpoint that is asked instead")
    if interface.is_method:
        for stream in method.streams:
            parser.add_class_arguments(StreamSettings, f"streams.{stream}")
        parser.add_class_arguments(Trainer, "trainer", skip={"seed"})
    for stage in interface.stages:
        if stage in without:
            continue
        parser.add_class_arguments(Trainer, f"stages.{stage}.trainer", skip={"seed"})
        parser.add_argument(f"--stages.{stage}.streams", type=dict[str, StreamSettings], default={}, help="by name")
    return parser


@dataclass(frozen=True)
class Elsewhere:
    """A teacher whose answers are on disk (`store`), or are asked for over HTTP (`served`) and kept in `store`.

    `answer` is the stored view that stands for every view.
    """

    store: str | None = None
    served: Mapping[str, Any] | None = None
    answer: str | None = None


@dataclass(frozen=True)
class Parsed:
    """A recipe that was checked: the system, its task, its settings, the networks that recipes train first, and the
    teachers that answer from elsewhere."""

    system: Any
    interface: Interface
    task: Task
    settings: Any
    trained: dict[str, Any]
    elsewhere: dict[str, Elsewhere]

    @property
    def arguments(self) -> dict[str, Any]:
        """The plain arguments of the system."""
        return {key: value for key, value in plain(self.settings.method).items() if key != "name"}


def parse(recipe: Mapping[str, Any], allow_imports: bool = False) -> Parsed:
    """The system and the checked settings of a recipe (without its claim), with trainers and streams built.

    Raises:
        UserError: a key is unknown (with the nearest one), a value has the wrong type, or foreign code is named.
    """
    refuse_foreign_classes(recipe, allow_imports)
    name = str(recipe["method"].get("name", ""))
    method = method_class(name, allow_imports)
    task = task_of(recipe, name)
    interface = Interface.of(method)
    parser = parser_of(method, task)
    settings = {key: expand(value) for key, value in recipe.items() if key != "claim"}
    _check_keys(settings, parser)
    elsewhere = {s: _elsewhere(settings, s) for s in interface.networks if _keys_of(settings, s) & _ELSEWHERE}
    trained = {section: settings.pop(section)["run"] for section in interface.networks if _runs(settings, section)}
    stages = settings["stages"] = {k: v for k, v in (settings.get("stages") or {}).items() if v is not None}
    if not stages:
        del settings["stages"]
    absent = {section for section in interface.networks if section not in settings}
    absent |= {stage for stage in interface.stages if stage not in stages}
    if missing := absent - {*trained, *elsewhere, *interface.optional}:
        section = min(missing) if min(missing) in interface.networks else f"stages.{min(missing)}"
        raise UserError(f"{name} needs {section}; add this section to the recipe")
    from jsonargparse import ArgumentError

    try:
        parser = parser_of(method, task, absent)
        built = parser.instantiate(parser.parse_object(settings, defaults=True))
    except (ArgumentError, TypeError, KeyError) as error:
        raise UserError(f"the recipe does not fit: {_one_line(error)}") from None
    return Parsed(method, interface, task, built, trained, elsewhere)


_ELSEWHERE = {field.name for field in fields(Elsewhere)}


def _keys_of(settings: Mapping[str, Any], section: str) -> set[str]:
    content = settings.get(section)
    return set(content) if isinstance(content, Mapping) else set()


def _elsewhere(settings: dict[str, Any], section: str) -> Elsewhere:
    """Take what says where a teacher answers from out of its section; what is left describes the network itself."""
    content = dict(settings.pop(section))
    found = {name: content.pop(name) for name in _ELSEWHERE if name in content}
    if content:
        settings[section] = content
    if found.get("store") is None and found.get("served") is None:
        raise UserError(f"{section} has 'answer' and no 'store'; give the folder of its stored answers")
    return Elsewhere(**found)


def _runs(settings: Mapping[str, Any], section: str) -> bool:
    """Whether a network's section names a recipe that trains it."""
    content = settings.get(section)
    if not content or content.get("run") is None:
        return False
    if len(content) > 1:
        other = min(set(content) - {"run"})
        raise UserError(f"{section} has both 'run' and '{other}'; a network that a recipe trains is described there")
    return True


def task_of(recipe: Mapping[str, Any], name: str) -> Task:
    """The task that the recipe names, or that of its system's card."""
    from limbeck.recipes.tasks import find_task

    if "task" in recipe:
        return find_task(str(recipe["task"]))
    return find_task("classification" if ":" in name else catalog.system(name).task.split(",")[0].strip())


def columns_of(recipe: str | Path | Mapping[str, Any]) -> tuple[str, ...]:
    """The metrics that a recipe's tables show, the main one first."""
    content = read(recipe)
    return task_of(content, content["method"]["name"]).columns


def plain(namespace: Any) -> dict[str, Any]:
    """Parsed settings as a dict."""
    return namespace.as_dict() if hasattr(namespace, "as_dict") else dict(namespace)


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
            known = sorted({name.split(".")[0] for name in kinds})
            raise UserError(
                f"{settings['method']['name']} has no use for the section '{section}'{nearest(section, known)}; "
                f"it has {', '.join(known)}"
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
            kind = inside.get(key)
            if get_origin(kind) is dict and (known := _settings_of(get_args(kind)[1])):  # free names, known settings
                for free, settings in value.items() if isinstance(value, Mapping) else ():
                    _check_section(f"{section}.{key}.{free}", settings, dict.fromkeys(known))
                continue
            deeper |= dict.fromkeys(_settings_of(kind))
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
