"""From a recipe or from objects to a trained student: the one path that Python, command line and YAML share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from matplotlib.figure import Figure
from torch import nn

from limbeck import catalog
from limbeck.data import Data, load_data
from limbeck.distributed import rank
from limbeck.errors import UserError
from limbeck.evaluate import Comparison
from limbeck.files import write_text
from limbeck.models import check_onnx, count_parameters, export_model, load_model, save_model
from limbeck.recipes import recipe as recipes
from limbeck.recipes.recipe import Elsewhere, Interface, Parsed, plain
from limbeck.recipes.tasks import Task
from limbeck.recipes.tasks.task import describe
from limbeck.report import draw, write_report
from limbeck.teachers import Frozen, Stored, Teacher
from limbeck.train import Exhibit, Fit, Method, Stage, StreamSettings, Trainer, Workspace
from limbeck.train.checkpoint import seed_everything

MACHINE = ("learning_rate", "samples_per_second")  # logged, but no measure of the method


@dataclass
class Result:
    """What a run leaves behind.

    `metrics` are those of the shipped student on the test data, together with its parameters, floating-point
    operations, latency in milliseconds (one sample), bytes of weights, the seconds of all stages, and what the system
    measured of itself. `logged` holds the run's mean of everything that the methods logged, as `<stage>.<name>` where
    there are several stages. `method` is None for a system of several stages.
    """

    student: nn.Module
    method: Method | None
    metrics: dict[str, float]
    logged: dict[str, float]
    fits: dict[str, Fit]
    data: Data
    workspace: Path
    task: Task
    config: dict[str, Any] = field(default_factory=dict)
    exhibits: dict[str, Exhibit] = field(default_factory=dict)

    def figures(self) -> dict[str, Figure]:
        """What people look at, by caption: what the task shows of the student, and what the system showed of itself."""
        shown = {caption: draw(exhibit) for caption, exhibit in self.exhibits.items()}
        return {**self.task.exhibits(self.student, self.data), **shown}

    @property
    def fit(self) -> Fit:
        """What the last training stage left behind."""
        return list(self.fits.values())[-1] if self.fits else Fit()


def run(
    recipe: str | Path | Mapping[str, Any],
    settings: Mapping[str, Any] | None = None,
    *,
    workspace: str | Path | None = None,
    allow_imports: bool = False,
    progress: bool = False,
    report: bool = True,
    shared: Path | None = None,
) -> Result:
    """Train what a recipe describes, evaluate it on the test data, and write the student and a report.

    Args:
        recipe: a slug, a YAML file, or the mapping that such a file holds.
        settings: dotted keys to set, e.g. `{"trainer.epochs": 3}`.
        workspace: folder of the run; by default `runs/<recipe>`. A run that was broken off goes on there.
        allow_imports: let the recipe name code from outside Limbeck.
        shared: folder of the networks that other recipes train first, by default below the workspace; a network that
            lies there already is taken as it is.

    Raises:
        UserError: the recipe does not fit, names what is not there, or the workspace belongs to another one.
    """
    content = recipes.override(recipes.read(recipe), settings or {})
    content.pop("claim", None)
    content.setdefault("seed", 0)
    parsed = recipes.parse(content, allow_imports)
    seed = parsed.settings.seed
    name = recipe if isinstance(recipe, str | Path) else content["method"]["name"]
    path = Path(workspace or Path("runs") / recipes.name_of(name))
    trainers = trainers_of(parsed, seed, progress)
    fabric = next(iter(trainers.values())).fabric()
    ws = Workspace(path, content, seed=seed, fabric=fabric)
    data = parsed.task.prepare_data(plain(parsed.settings.data), seed)
    networks = _networks(parsed, data, shared or path / "networks", allow_imports, progress)
    data = parsed.task.attach(data, networks)
    seed_everything(seed, "workspace")
    if parsed.interface.is_method:
        streams = vars(parsed.settings.streams)
        return _train(
            ws,
            parsed.system,
            networks,
            parsed.arguments,
            data,
            streams,
            trainers["student"],
            parsed.task,
            content,
            report,
        )
    stages = {stage: Stage(trainers[stage], getattr(parsed.settings.stages, stage).streams) for stage in trainers}
    return _run_stages(ws, parsed.system, networks, {**parsed.arguments, **stages}, data, parsed.task, content, report)


def trainers_of(parsed: Parsed, seed: int, progress: bool) -> dict[str, Trainer]:
    """The trainer of every stage; a single `Method` is the stage `student`."""
    if parsed.interface.is_method:
        found = {"student": parsed.settings.trainer}
    else:
        found = {stage: settings.trainer for stage, settings in vars(parsed.settings.stages).items()}
    return {stage: replace(trainer, seed=seed, progress=progress) for stage, trainer in found.items()}


def _networks(
    parsed: Parsed, data: Data, shared: Path, allow_imports: bool, progress: bool
) -> dict[str, nn.Module | Teacher]:
    """The networks that the system takes, by section: trained by their own recipe first, or built."""
    networks: dict[str, Any] = {}
    for section, kind in parsed.interface.networks.items():
        if section in parsed.elsewhere:
            networks[section] = build_teacher(
                parsed, section, data, shared, allow_imports, progress, answers=shared / f"{section}-answers"
            )
            continue
        network = _network(parsed, section, data, shared, allow_imports, progress, trained=kind is Teacher)
        if network is not None:  # an optional one that the recipe leaves out
            networks[section] = Frozen(network) if kind is Teacher else network
    return networks


def _network(
    parsed: Parsed, section: str, data: Data, shared: Path, allow_imports: bool, progress: bool, *, trained: bool
) -> nn.Module | None:
    """The network that a section describes, trained by its own recipe first, or built; None where it says nothing."""
    if section in parsed.trained:
        return _trained(parsed.trained[section], shared, allow_imports, progress)
    if section not in parsed.settings:
        return None
    seed_everything(parsed.settings.seed, section)
    settings = getattr(parsed.settings, section)
    return _model(settings, data, parsed.task, section, allow_imports, trained=trained)


def build_teacher(
    parsed: Parsed,
    section: str,
    data: Data,
    shared: Path,
    allow_imports: bool,
    progress: bool,
    *,
    answers: Path,
    live: bool = False,
) -> Teacher:
    """The teacher of a section: a network, an endpoint whose answers are kept, or a store.

    Args:
        answers: folder of an endpoint's answers where the section names none.
        live: pass the store by, for it is to be filled.
    """
    elsewhere = parsed.elsewhere.get(section, Elsewhere())
    if elsewhere.served is not None:
        from limbeck.teachers import Served

        if not hasattr(data, "tokenizer"):
            raise UserError(f"{section}.served answers for tokens; {parsed.task.name} has none to send")
        settings = dict(elsewhere.served)
        top_k = {"top_k": settings.pop("top_k")} if "top_k" in settings else {}
        return Served(
            settings,
            elsewhere.store or answers,
            vocabulary=data.vocab_size,  # type: ignore[attr-defined]
            tokenizer=data.tokenizer,
            progress=progress,
            **top_k,
        )
    network = _network(parsed, section, data, shared, allow_imports, progress, trained=True)
    teacher = None if network is None else Frozen(network)
    if elsewhere.store is not None and not live:
        return Stored(elsewhere.store, teacher=teacher, answer=elsewhere.answer)
    if teacher is None:
        raise UserError(f"{section} names no network to ask; give {section}.name, {section}.run or {section}.served")
    return teacher


def _trained(recipe: str | Path | Mapping[str, Any], shared: Path, allow_imports: bool, progress: bool) -> nn.Module:
    """What a recipe ships; its workspace is named after its content, so that equal ones are trained once."""
    content = recipes.read(recipe)
    content.pop("claim", None)
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
    name = recipes.name_of(recipe) if isinstance(recipe, str | Path) else content["method"]["name"]
    folder = shared / f"{name}-{digest}"
    result = run(content, workspace=folder, allow_imports=allow_imports, progress=progress, report=False, shared=shared)
    return result.student


def distill(
    method: str | type[Method] | Any,
    *,
    data: Any,
    student: str | nn.Module,
    trainer: Trainer | None = None,
    teacher: str | nn.Module | Teacher | None = None,
    streams: Mapping[str, StreamSettings] | None = None,
    workspace: str | Path,
    task: str | None = None,
    seed: int = 0,
    progress: bool = False,
    report: bool = True,
    **arguments: Any,
) -> Result:
    """Train a student of your own with one of the systems.

    Args:
        method: slug, `Method` class, or a function of several stages.
        data: `Data`, or what `load_data` takes. For methods that need unlabelled samples `data.unlabelled` holds them.
        student, teacher: networks, or what `load_model` takes; the teacher may be any `Teacher`.
        trainer: of a `Method`; a system of several stages takes one `Stage` for each by name.
        streams: batch size and views of each stream; by default batches of 64 without augmentation.
        task: what is measured; known for a system by its slug, else classification.
        arguments: of the system: its constants, further networks, and its stages.

    Raises:
        UserError: the parts do not fit each other, said in one sentence.
    """
    system = catalog.load(method) if isinstance(method, str) else method
    name = method if isinstance(method, str) else f"here:{getattr(method, '__name__', method)}"
    about = recipes.task_of({"task": task} if task else {}, name)
    interface = Interface.of(system)
    loaded = data if isinstance(data, Data) else load_data(data, seed=seed)
    networks: dict[str, Any] = {"student": student, **({} if teacher is None else {"teacher": teacher})}
    networks |= {section: arguments.pop(section) for section in interface.networks if section in arguments}
    named = {section: _named(network, weights=section != "student") for section, network in networks.items()}
    for section, network in networks.items():
        seed_everything(seed, section)
        if isinstance(network, str):
            network = about.load_model(network, **about.shape(loaded, section))
        wants_teacher = interface.networks.get(section) is Teacher
        networks[section] = Frozen(network) if wants_teacher and isinstance(network, nn.Module) else network
    loaded = about.attach(loaded, networks)
    stages = {stage: arguments.pop(stage) for stage in interface.stages if stage in arguments}
    stages = {
        stage: replace(value, trainer=replace(value.trainer, seed=seed, progress=progress))
        for stage, value in stages.items()
    }
    config: dict[str, Any] = {
        "method": {"name": name.removeprefix("here:"), **{k: v for k, v in arguments.items() if _simple(v)}},
        "data": describe(loaded),
        **named,
        "seed": seed,
    }
    if not interface.is_method:
        config["stages"] = {stage: _described_stage(value) for stage, value in stages.items()}
        config = json.loads(json.dumps(config))
        fabric = next(iter(stages.values())).trainer.fabric() if stages else None
        ws = Workspace(workspace, config, seed=seed, fabric=fabric)
        return _run_stages(ws, system, networks, {**arguments, **stages}, loaded, about, config, report)
    if trainer is None:
        raise UserError("distill needs a trainer for this method, e.g. trainer=Trainer(epochs=10)")
    trainer = replace(trainer, seed=seed, progress=progress)
    settings = dict(streams or {name: StreamSettings() for name in system.streams})
    config |= {
        "streams": {name: _described(setting) for name, setting in settings.items()},
        "trainer": asdict(trainer),
    }
    config = json.loads(json.dumps(config))
    ws = Workspace(workspace, config, seed=seed, fabric=trainer.fabric())
    return _train(ws, system, networks, arguments, loaded, settings, trainer, about, config, report)


def _train(
    ws: Workspace,
    kind: type[Method],
    networks: Mapping[str, Any],
    arguments: Mapping[str, Any],
    data: Data,
    settings: Mapping[str, StreamSettings],
    trainer: Trainer,
    task: Task,
    config: dict[str, Any],
    report: bool,
) -> Result:
    """A system of one stage."""
    try:
        method = kind(**networks, **arguments)
    except TypeError as error:
        raise UserError(f"{kind.__name__} cannot be built: {error}") from error
    streams = {}
    for name, setting in settings.items():
        samples = task.samples(data, name)
        streams[name] = setting.on(samples, task.view_field(samples))
    validation = data.validation
    method = ws.fit("student", method, streams, trainer, validation=validation, evaluator=task.evaluator(data))
    return _finish(ws, method.shipped(), method, networks, data, task, config, report)


def _run_stages(
    ws: Workspace,
    system: Any,
    networks: Mapping[str, Any],
    arguments: Mapping[str, Any],
    data: Data,
    task: Task,
    config: dict[str, Any],
    report: bool,
) -> Result:
    """A system of several stages: a function over the workspace."""
    ws.evaluator = task.evaluator(data)
    try:
        recipes.bind(system, ws, data, **networks, **arguments)
    except TypeError as error:
        raise UserError(f"{system.__name__} cannot be run: {error}") from error
    shipped = system(ws, data, **networks, **arguments)
    return _finish(ws, shipped, None, networks, data, task, config, report)


def _finish(
    ws: Workspace,
    shipped: nn.Module,
    method: Method | None,
    networks: Mapping[str, Any],
    data: Data,
    task: Task,
    config: dict[str, Any],
    report: bool,
) -> Result:
    """Measure what ships, save it, and write the report."""
    shipped = shipped.cpu().eval()
    result = Result(shipped, method, {}, {}, dict(ws.fits), data, ws.path, task, config, dict(ws.exhibits))
    result.logged = _means(result.fits)
    result.metrics = _measure(ws, shipped, data, task)
    if rank() == 0:
        save_model(shipped, ws.path / "student")
        task.save_beside(data, ws.path / "student")
        if report:
            _write_report(result, networks.get("teacher"), list(ws.measured))
    return result


def _write_report(result: Result, teacher: Any, measured_by_itself: Sequence[str]) -> None:
    """The page of one run: metrics beside the teacher's, what people look at, curves, calibration, configuration."""
    name, task = str(result.config["method"]["name"]), result.task
    arms = {name: [result.metrics]}
    if isinstance(teacher, Frozen):
        arms = {"teacher": [task.metrics(teacher.to(torch.device("cpu")).model, result.data)], **arms}
    comparison = Comparison(arms, [result.config["seed"]], data=describe(result.data))
    rows = [row for fit in result.fits.values() for row in fit.train]
    terms = list(dict.fromkeys(term for row in rows for term in row if term not in ("step", "epoch", *MACHINE)))
    validated = [row for fit in result.fits.values() for row in fit.validation]
    measured = [metric for metric in task.columns[:2] if any(metric in row for row in validated)]
    diagram = task.reliability(result.student, result.data)
    several = len(result.fits) > 1
    curves = {(stage if several else name): fit.train + fit.validation for stage, fit in result.fits.items()}
    write_report(
        result.workspace / "report.html",
        title=f"{name} on {result.data.name}",
        comparison=comparison,
        metrics=[metric for metric in (*task.columns, *measured_by_itself) if metric in comparison.metrics()],
        context=[arm for arm in arms if arm != name],
        curves=curves,
        curve_metrics=[*measured, *terms],
        reliability={name: diagram} if diagram else {},
        figures={name: result.figures()},
        configuration=yaml.safe_dump(result.config, sort_keys=False),
    )


def _measure(ws: Workspace, shipped: nn.Module, data: Data, task: Task) -> dict[str, float]:
    """Test metrics and costs, measured once for each workspace."""
    file = ws.path / "result.json"
    if file.exists():
        return json.loads(file.read_text())
    steps = sum(fit.steps for fit in ws.fits.values())
    metrics = {**task.metrics(shipped, data), **ws.measured, "seconds": sum(ws.seconds.values()), "steps": steps}
    if rank() == 0:
        write_text(file, json.dumps(metrics, indent=2) + "\n")
    return metrics


def export(
    workspace: str | Path, formats: tuple[str, ...] = ("safetensors", "torch_export", "onnx")
) -> dict[str, Path]:
    """Write the student of a finished run as files to deploy, below `<workspace>/export`.

    The ONNX file is run by onnxruntime and compared with PyTorch before this returns. A student that was trained from
    Python objects has no recipe to rebuild it from: export `result.student` by `limbeck.models.export_model`.
    """
    folder = Path(workspace)
    result = restore(folder)
    example = result.task.example(result.data, rows=min(4, len(result.data.test)))
    if example is None:
        raise UserError(
            f"what {result.config['method']['name']} ships does not run on one input; take its weights from "
            f"{folder / 'student'}"
        )
    paths = export_model(result.student, folder / "export", example, formats=formats)
    if "onnx" in paths:
        check_onnx(paths["onnx"], result.student, example)
    return paths


def restore(workspace: str | Path) -> Result:
    """A finished run, rebuilt from its own recipe."""
    file = Path(workspace) / "recipe.yaml"
    if not file.is_file():
        raise UserError(f"{workspace} is no workspace: it has no recipe.yaml; give the folder of a finished run")
    if not (Path(workspace) / "result.json").is_file():
        raise UserError(f"the run in {workspace} is not finished; run it again to go on with it")
    beside = file.resolve().parent.parent.parent / "networks"  # where a comparison keeps what its arms share
    return run(file, workspace=workspace, report=False, shared=beside if beside.is_dir() else None)


def _model(settings: Any, data: Data, task: Task, section: str, allow_imports: bool, *, trained: bool) -> nn.Module:
    """The network that a section describes; one that must be `trained` has to say where its weights are."""
    arguments = {key: value for key, value in plain(settings).items() if value is not None}
    for elsewhere in ("run", "store", "answer", "served"):
        arguments.pop(elsewhere, None)
    name = arguments.pop("name")
    prefix = name.split(":")[0]
    if ":" in name and not prefix.endswith("-config") and prefix not in PREFIXES:
        name = recipes.import_object(name, allow_imports)
        return load_model(name(**arguments.pop("config", {})), **arguments)
    pretrained = prefix in PREFIXES or Path(name).exists()
    if trained and not pretrained and "weights" not in arguments:
        raise UserError(
            f"the {section} '{name}' has no weights: give {section}.weights, a folder, a pretrained 'hf:...' model, or "
            f"{section}.run, a recipe that trains it first"
        )
    return task.load_model(name, **({} if pretrained else task.shape(data, section)), **arguments)


PREFIXES = ("hf", "package", "timm", "diffusers", "torchvision")  # of names of pretrained networks


def _means(fits: Mapping[str, Fit]) -> dict[str, float]:
    """The mean over each stage of every column of its training table, under its name if there are several."""
    columns: dict[str, list[float]] = {}
    for stage, fit in fits.items():
        prefix = f"{stage}." if len(fits) > 1 else ""
        for row in fit.train:
            for name, value in row.items():
                if name not in ("step", "epoch"):
                    columns.setdefault(prefix + name, []).append(value)
    return {name: sum(values) / len(values) for name, values in columns.items()}


def _simple(value: Any) -> bool:
    return isinstance(value, str | int | float | bool | None)


def _named(value: Any, *, weights: bool = False) -> str | None:
    """A network in words, so that a workspace knows its own: its size and, for a teacher, the sum of its weights."""
    if value is None or isinstance(value, str):
        return value
    network = value.model if isinstance(value, Frozen) else value
    if not isinstance(network, nn.Module):
        return type(value).__name__
    words = f"{type(network).__name__} with {count_parameters(network)} parameters"
    if weights:  # a student's first weights may differ from call to call, a teacher's never do
        total = sum(float(parameter.detach().double().abs().sum()) for parameter in network.parameters())
        words += f", their absolute sum {total:.9g}"
    return words


def _described(settings: StreamSettings) -> dict[str, Any]:
    return {
        **asdict(replace(settings, views={})),
        "views": {name: view if isinstance(view, str | dict) else str(view) for name, view in settings.views.items()},
    }


def _described_stage(stage: Stage) -> dict[str, Any]:
    return {
        "trainer": asdict(stage.trainer),
        "streams": {name: _described(settings) for name, settings in stage.streams.items()},
    }
