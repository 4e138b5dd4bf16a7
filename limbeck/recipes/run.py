"""From a recipe or from objects to a trained student: the one path that Python, command line and YAML share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from limbeck import catalog
from limbeck.data import Data, Stream
from limbeck.data.views import make_view
from limbeck.distributed import rank
from limbeck.errors import UserError
from limbeck.evaluate import ClassificationEvaluator, Comparison, Reliability, predict, reliability
from limbeck.files import write_text
from limbeck.models import check_onnx, count_parameters, export_model, load_model, measure_cost, save_model
from limbeck.recipes import recipe as recipes
from limbeck.recipes.data import as_data, describe, example_of, input_field, prepare_data, stream_samples
from limbeck.recipes.recipe import StreamSettings
from limbeck.report import write_report
from limbeck.teachers import Frozen, Teacher
from limbeck.train import Fit, Method, Trainer, Workspace
from limbeck.train.checkpoint import seed_everything

COLUMNS = ("accuracy", "nll", "ece", "parameters", "latency_ms", "seconds")  # of tables and reports


@dataclass
class Result:
    """What a run leaves behind.

    `metrics` are those of the shipped student on the test data, together with its parameters, floating-point
    operations, latency in milliseconds (one sample), bytes of weights, and the seconds of training. `logged` holds the
    run's mean of everything that the method logged.
    """

    student: nn.Module
    method: Method
    metrics: dict[str, float]
    logged: dict[str, float]
    fit: Fit
    data: Data
    workspace: Path
    config: dict[str, Any] = field(default_factory=dict)


def run(
    recipe: str | Path | Mapping[str, Any],
    settings: Mapping[str, Any] | None = None,
    *,
    workspace: str | Path | None = None,
    allow_imports: bool = False,
    progress: bool = False,
    report: bool = True,
) -> Result:
    """Train what a recipe describes, evaluate it on the test data, and write the student and a report.

    Args:
        recipe: a slug, a YAML file, or the mapping that such a file holds.
        settings: dotted keys to set, e.g. `{"trainer.epochs": 3}`.
        workspace: folder of the run; by default `runs/<recipe>`. A run that was broken off goes on there.
        allow_imports: let the recipe name code from outside Limbeck.

    Raises:
        UserError: the recipe does not fit, names what is not there, or the workspace belongs to another one.
    """
    content = recipes.override(recipes.read(recipe), settings or {})
    content.pop("claim", None)
    content.setdefault("seed", 0)
    method, parsed = recipes.parse(content, allow_imports)
    name = recipe if isinstance(recipe, str | Path) else content["method"]["name"]
    trainer = replace(parsed.trainer, seed=parsed.seed, progress=progress)
    fabric = trainer.fabric()
    ws = _workspace(workspace or Path("runs") / Path(name).stem, content, parsed.seed, fabric)
    data = prepare_data(_plain(parsed.data), parsed.seed)
    arguments = {key: value for key, value in _plain(parsed.method).items() if key != "name"}
    teacher = None
    if "teacher" in parsed:
        teacher = Frozen(_model(parsed.teacher, data, allow_imports, teacher=True))
    seed_everything(parsed.seed, "student")
    student = _model(parsed.student, data, allow_imports, teacher=False)
    streams = vars(parsed.streams)
    return _train(ws, method, arguments, data, student, teacher, streams, trainer, content, report)


def distill(
    method: str | type[Method],
    *,
    data: Any,
    student: str | nn.Module,
    trainer: Trainer,
    teacher: str | nn.Module | Teacher | None = None,
    streams: Mapping[str, StreamSettings] | None = None,
    workspace: str | Path,
    seed: int = 0,
    progress: bool = False,
    report: bool = True,
    **arguments: Any,
) -> Result:
    """Train a student of your own with one of the systems.

    Args:
        method: slug or class.
        data: `Data`, or what `load_data` takes. For methods that need unlabelled samples `data.unlabelled` holds them.
        student, teacher: networks, or what `load_model` takes; the teacher may be any `Teacher`.
        streams: batch size and views of each stream; by default batches of 64 without augmentation.
        arguments: of the method's constructor.

    Raises:
        UserError: the parts do not fit each other, said in one sentence.
    """
    kind = catalog.load(method) if isinstance(method, str) else method
    seed_everything(seed, "student")
    loaded = as_data(data, seed)
    network = load_model(student, **_shape(loaded)) if isinstance(student, str) else student
    if isinstance(teacher, str):
        teacher = load_model(teacher, **_shape(loaded))
    if isinstance(teacher, nn.Module):
        teacher = Frozen(teacher)
    trainer = replace(trainer, seed=seed, progress=progress)
    settings = dict(streams or {name: StreamSettings() for name in kind.streams})
    config = {
        "method": {"name": getattr(method, "__name__", method), **{k: v for k, v in arguments.items() if _simple(v)}},
        "data": describe(loaded),
        "student": _named(student),
        "teacher": _named(teacher, weights=True),
        "streams": {name: _described(setting) for name, setting in settings.items()},
        "trainer": asdict(trainer),
        "seed": seed,
    }
    config = json.loads(json.dumps(config))
    ws = _workspace(workspace, config, seed, trainer.fabric())
    return _train(ws, kind, arguments, loaded, network, teacher, settings, trainer, config, report)


def _train(
    ws: Workspace,
    kind: type[Method],
    arguments: Mapping[str, Any],
    data: Data,
    student: nn.Module,
    teacher: Teacher | None,
    settings: Mapping[str, StreamSettings],
    trainer: Trainer,
    config: dict[str, Any],
    report: bool,
) -> Result:
    given = {"teacher": teacher} if teacher is not None else {}
    try:
        method = kind(student, **given, **arguments)  # type: ignore[call-arg]
    except TypeError as error:
        raise UserError(f"{kind.__name__} cannot be built: {error}") from error
    streams = {name: _stream(data, name, setting) for name, setting in settings.items()}
    evaluator = ClassificationEvaluator(field=input_field(data.test))
    method = ws.fit("student", method, streams, trainer, validation=data.validation, evaluator=evaluator)
    shipped = method.shipped().cpu().eval()
    result = Result(shipped, method, {}, {}, ws.fits["student"], data, ws.path, config)
    result.logged = _means(result.fit)
    result.metrics = _measure(ws, shipped, data, result.fit, evaluator)
    if rank() == 0:
        save_model(shipped, ws.path / "student")
        if report:
            _write_report(result, teacher, evaluator)
    return result


def _write_report(result: Result, teacher: Teacher | None, evaluator: ClassificationEvaluator) -> None:
    """The page of one run: metrics beside the teacher's, curves, calibration, size and latency, configuration."""
    name = str(result.config["method"]["name"])
    arms = {name: [result.metrics]}
    if isinstance(teacher, Frozen):
        arms = {"teacher": [_test_metrics(teacher.to(torch.device("cpu")).model, result.data, evaluator)], **arms}
    comparison = Comparison(arms, [result.config["seed"]], data=describe(result.data))
    terms = [term for term in result.logged if term not in ("learning_rate", "samples_per_second")]
    measured = [metric for metric in ("accuracy", "nll") if result.fit.validation]
    write_report(
        result.workspace / "report.html",
        title=f"{name} on {result.data.name}",
        comparison=comparison,
        metrics=[metric for metric in COLUMNS if metric in comparison.metrics()],
        context=[arm for arm in arms if arm != name],
        curves={name: result.fit.train + result.fit.validation},
        curve_metrics=[*measured, *terms],
        reliability={name: calibration(result)},
        configuration=yaml.safe_dump(result.config, sort_keys=False),
    )


def calibration(result: Result) -> Reliability:
    """The reliability diagram of a run's student on the test data."""
    test = result.data.test
    return reliability(*predict(result.student, test, field=input_field(test)))


def _measure(
    ws: Workspace, shipped: nn.Module, data: Data, fit: Fit, evaluator: ClassificationEvaluator
) -> dict[str, float]:
    """Test metrics and costs, measured once for each workspace."""
    file = ws.path / "result.json"
    if file.exists():
        return json.loads(file.read_text())
    metrics = {**_test_metrics(shipped, data, evaluator), "seconds": fit.seconds, "steps": fit.steps}
    if rank() == 0:
        write_text(file, json.dumps(metrics, indent=2) + "\n")
    return metrics


def _test_metrics(model: nn.Module, data: Data, evaluator: ClassificationEvaluator) -> dict[str, float]:
    """Quality on the test data and cost of one sample."""
    cost = measure_cost(model, example_of(data.test))
    return {
        **evaluator(model, data.test),
        "parameters": cost.parameters,
        "flops": cost.flops,
        "latency_ms": cost.latency_ms,
        "weight_bytes": cost.weight_bytes,
    }


def export(
    workspace: str | Path, formats: tuple[str, ...] = ("safetensors", "torch_export", "onnx")
) -> dict[str, Path]:
    """Write the student of a finished run as files to deploy, below `<workspace>/export`.

    The ONNX file is run by onnxruntime and compared with PyTorch before this returns. A student that was trained from
    Python objects has no recipe to rebuild it from: export `result.student` by `limbeck.models.export_model`.
    """
    folder = Path(workspace)
    student, data = restore(folder)
    example = example_of(data.test, rows=min(4, len(data.test)))
    paths = export_model(student, folder / "export", example, formats=formats)
    if "onnx" in paths:
        check_onnx(paths["onnx"], student, example)
    return paths


def restore(workspace: str | Path) -> tuple[nn.Module, Data]:
    """The shipped student of a finished run and its data, rebuilt from the run's own recipe."""
    file = Path(workspace) / "recipe.yaml"
    if not file.is_file():
        raise UserError(f"{workspace} is no workspace: it has no recipe.yaml; give the folder of a finished run")
    if not (Path(workspace) / "result.json").is_file():
        raise UserError(f"the run in {workspace} is not finished; run it again to go on with it")
    result = run(file, workspace=workspace, report=False)
    return result.student, result.data


def _workspace(path: str | Path, config: dict[str, Any], seed: int, fabric: Any) -> Workspace:
    return Workspace(path, config, seed=seed, fabric=fabric)


def _stream(data: Data, name: str, settings: StreamSettings) -> Stream:
    samples, views = stream_samples(data, name), {}
    for view, spec in settings.views.items():
        arguments = {"name": spec} if isinstance(spec, str) else dict(spec)
        views[view] = make_view(arguments.pop("name"), **arguments)
    return Stream(
        samples,
        settings.batch_size,
        views,
        cycle=settings.cycle,
        workers=settings.workers,
        view_field=input_field(samples),
    )


def _model(settings: Any, data: Data, allow_imports: bool, *, teacher: bool) -> nn.Module:
    arguments = {key: value for key, value in _plain(settings).items() if value is not None}
    name = arguments.pop("name")
    if ":" in name and not name.startswith(("hf:", "hf-config:", "timm:", "timm-config:")):
        name = recipes.import_object(name, allow_imports)
        return load_model(name(**arguments.pop("config", {})), **arguments)
    pretrained = name.startswith(("hf:", "timm:")) or Path(name).exists()
    if teacher and not pretrained and "weights" not in arguments:
        raise UserError(
            f"the teacher '{name}' has no weights: give teacher.weights, a folder, or a pretrained 'hf:...' model; "
            "`limbeck run supervised` trains one, and its folder <workspace>/student can stand as teacher.name"
        )
    return load_model(name, **({} if pretrained else _shape(data)), **arguments)


def _shape(data: Data) -> dict[str, Any]:
    """What a network must know of the data, as arguments of `load_model`."""
    example = example_of(data.test)
    shape = {"num_classes": data.num_classes}
    if not isinstance(example, Tensor):
        return shape
    return {**shape, "in_channels": example.shape[1], "image_size": example.shape[-1] if example.ndim == 4 else 1}


def _plain(namespace: Any) -> dict[str, Any]:
    return namespace.as_dict() if hasattr(namespace, "as_dict") else dict(namespace)


def _means(fit: Fit) -> dict[str, float]:
    """The mean over the run of every column of its training table."""
    columns: dict[str, list[float]] = {}
    for row in fit.train:
        for name, value in row.items():
            if name not in ("step", "epoch"):
                columns.setdefault(name, []).append(value)
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
