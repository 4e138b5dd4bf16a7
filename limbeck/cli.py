"""The command line: one thin function a command; each only calls a public function."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from limbeck import catalog
from limbeck.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, or 2 after one sentence on what is wrong with the input."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser, commands = _parser()
    known, rest = parser.parse_known_args(arguments)
    if rest and known.command not in ("run", "compare", "label"):
        commands[known.command].error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return known.function(known, rest) or 0
    except UserError as error:
        print(f"limbeck: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("limbeck: stopped; run the same command again to go on from the last checkpoint", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `limbeck methods | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def demo(known: argparse.Namespace, rest: list[str]) -> None:
    from limbeck.recipes import demo as run_demo

    comparison = run_demo(known.workspace, seeds=known.seeds, say=_say)
    _print_table(comparison, "kd", "Digits, test data: mean ± deviation", context=["teacher"])
    _say(f"report: {known.workspace}/report.html")


def methods(known: argparse.Namespace, rest: list[str]) -> None:
    found = catalog.find(known.words, task=known.task, labels=known.labels, teacher=known.teacher)
    if not found:
        raise UserError(f"no system matches '{' '.join(known.words)}'; try fewer words, or `limbeck methods` for all")
    width = max(len(system.slug) for system in found)
    for system in found:
        print(f"{system.slug:<{width}}  {system.family:<14}  labels: {system.labels:<5}  {system.summary}")


def show(known: argparse.Namespace, rest: list[str]) -> None:
    print(catalog.card(known.slug), end="")


def run(known: argparse.Namespace, rest: list[str]) -> None:
    from limbeck.recipes import run as run_recipe

    result = run_recipe(
        known.recipe,
        _settings(rest),
        workspace=known.workspace,
        allow_imports=known.allow_imports,
        progress=sys.stderr.isatty() or known.progress,
    )
    costs = ("parameters", "flops", "latency_ms", "weight_bytes", "seconds", "steps")
    shown = [name for name in (*result.task.columns, *result.metrics) if name in result.metrics and name not in costs]
    for name in dict.fromkeys(shown):
        _say(f"test {name:<20} {result.metrics[name]:.4f}")
    latency = f", {result.metrics['latency_ms']:.2f} ms a sample" if "latency_ms" in result.metrics else ""
    _say(f"{result.metrics['parameters']:,.0f} parameters{latency}, {result.metrics['seconds']:.0f} s of training")
    _say(f"student: {result.workspace}/student   report: {result.workspace}/report.html")


def compare(known: argparse.Namespace, rest: list[str]) -> None:
    from limbeck.recipes import columns_of
    from limbeck.recipes import compare as run_compare
    from limbeck.report import column_of

    comparison = run_compare(
        known.recipes,
        seeds=known.seeds,
        settings=_settings(rest),
        workspace=known.workspace,
        allow_imports=known.allow_imports,
        say=_say,
    )
    _print_table(comparison, known.recipes[0], "Test data: mean ± deviation")
    first, *others = comparison.arms
    main = column_of(columns_of(known.recipes[0])[0])
    unit = " points" if main.unit == "%" else f" {main.unit}".rstrip()
    digits = 4 if main.digits is None else main.digits

    def shown(difference: float) -> str:
        return f"{main.scale * difference:+.{digits}f}"

    for arm in others:
        paired = comparison.paired(arm, first, main.metric)
        line = f"{arm} against {first}: {main.title.lower()} {shown(paired.difference)}{unit}"
        if paired.p is not None and paired.low is not None and paired.high is not None:
            interval = f"{shown(paired.low)} to {shown(paired.high)}"
            line += f" (95 % interval {interval}, paired t-test p = {paired.p:.2g})"
        _say(line)
    _say(f"report: {known.workspace}/report.html")


def prove(known: argparse.Namespace, rest: list[str]) -> None:
    from limbeck.recipes import prove as run_prove

    comparison = run_prove(known.slug, seeds=known.seeds, workspace=known.workspace, results=known.results, say=_say)
    _print_table(comparison, known.slug, f"{known.slug}: mean ± deviation over {len(comparison.seeds)} seeds")
    for verdict in comparison.verdicts():
        p = "" if verdict.p is None else f", p = {verdict.p:.2g}"
        holds = "holds" if verdict.holds else "does NOT hold"
        _say(
            f"{holds}: {verdict.expectation} (difference {verdict.difference:+.4g}, "
            f"{verdict.seeds_holding} of {verdict.seeds} seeds{p})"
        )
    _say(f"result: {known.results}/{known.slug}.json")


def label(known: argparse.Namespace, rest: list[str]) -> None:
    import yaml

    from limbeck.recipes import label as run_label
    from limbeck.teachers import Store

    if known.recipe is None:
        if not (known.verify and known.store):
            raise UserError("give a recipe to label by, or --verify --store <folder> to look a store over")
    else:
        views = None if known.views is None else yaml.safe_load(known.views)
        made = run_label(
            known.recipe,
            _settings(rest),
            store=known.store,
            section=known.section,
            streams=known.streams,
            views=views.split(",") if isinstance(views, str) else views,
            keep=known.keep,
            features=known.features,
            top_k=known.top_k,
            values=known.values,
            dtype=known.dtype,
            versions=known.versions,
            batch_size=known.batch_size,
            share=None if known.share is None else _share(known.share),
            workers=known.workers,
            ray=known.ray,
            address=known.address,
            allow_imports=known.allow_imports,
            progress=sys.stderr.isatty() or known.progress,
            say=_say,
        )
        if made is None:
            _say("parts of other processes are missing; the last one to finish completes the store")
            return
        known.store = made.path
    store = Store(known.store, verify=not known.verify)
    if known.verify:
        store.verify()
    size = sum(shard["bytes"] for shard in store.manifest.shards)
    checked = "every shard is as it was written, every row there once" if known.verify else "shards verified"
    _say(f"store: {known.store}   {len(store):,} rows, {size / max(len(store), 1):,.1f} bytes a row; {checked}")


def export(known: argparse.Namespace, rest: list[str]) -> None:
    from limbeck.recipes import export as run_export

    for name, path in run_export(known.workspace, tuple(known.formats)).items():
        _say(f"{name:<13} {path}")


def _print_table(comparison: Any, recipe: str, title: str, context: Sequence[str] = ()) -> None:
    """The comparison with the columns of the recipe's task."""
    from rich.console import Console

    from limbeck.recipes import columns_of
    from limbeck.report import comparison_table, rich_table

    wanted = [name for name in columns_of(recipe) if name in comparison.metrics()]
    Console(width=None if sys.stdout.isatty() else 140).print(
        rich_table(comparison_table(comparison, wanted, context), title)
    )


def _settings(rest: Sequence[str]) -> dict[str, str]:
    """`--trainer.epochs 3` and `--trainer.epochs=3` as dotted keys."""
    settings: dict[str, str] = {}
    words = list(rest)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise UserError(f"'{word}' stands alone; settings are given as --key value, such as --trainer.epochs 3")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not words:
                raise UserError(f"--{key} has no value; settings are given as --key value, such as --trainer.epochs 3")
            value = words.pop(0)
        settings[key] = value
    return settings


def _share(text: str) -> tuple[int, int]:
    """`1/4` as (1, 4)."""
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and int(number) < int(count)):
        raise UserError(f"--share is '{text}'; give i/n with i from 0 to n - 1, such as 0/4")
    return int(number), int(count)


def _say(line: str) -> None:
    from limbeck.distributed import rank

    if rank() == 0:
        print(line, flush=True)


class _RunHelp(argparse.Action):
    """`limbeck run --help` in general, `limbeck run kd --help` with every key of that recipe."""

    def __init__(self, option_strings: Sequence[str], dest: str, **_: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, help="this help; after a recipe: all of its keys")

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: Any) -> None:
        parser.print_help()
        if getattr(namespace, "recipe", None):
            from limbeck.recipes.recipe import method_class, parser_of, read, task_of

            try:
                content = read(namespace.recipe)
                name = content["method"]["name"]
                print(f"\nkeys of a recipe for {name}, each also a setting (--key value):\n")
                parser_of(method_class(name), task_of(content, name)).print_help()
            except UserError as error:
                parser.exit(2, f"limbeck: {error}\n")
        parser.exit()


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    parser = argparse.ArgumentParser(
        prog="limbeck",
        description="Turn big models and unlabelled data into small models that ship.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    made: dict[str, argparse.ArgumentParser] = {}

    def add(name: str, function: Callable[..., None], help: str, add_help: bool = True) -> argparse.ArgumentParser:
        made[name] = commands.add_parser(name, help=help, description=help, allow_abbrev=False, add_help=add_help)
        made[name].set_defaults(function=function)
        return made[name]

    one = add("demo", demo, "teacher, baseline and distilled students on embedded data: a table and a report")
    one.add_argument("--workspace", default="runs/demo", help="folder for runs and report (default %(default)s)")
    one.add_argument("--seeds", type=int, default=3, help="seeds of every arm (default %(default)s)")

    one = add("methods", methods, "find a system by words and by what you have")
    one.add_argument("words", nargs="*", help="words of its name, paper or purpose")
    one.add_argument("--task", help="such as classification, detection, language-modelling")
    one.add_argument("--labels", help="full, few or none")
    one.add_argument("--teacher", help="such as frozen, ema, self, none")

    one = add("show", show, "print a system's card")
    one.add_argument("slug")

    one = add(
        "run", run, "train a student by a recipe; further --key value pairs set keys of the recipe", add_help=False
    )
    one.add_argument("recipe", help="slug of a system, or a YAML file")
    one.add_argument("--workspace", help="folder of the run (default runs/<recipe>); a broken run goes on there")
    one.add_argument("--allow-imports", action="store_true", help="let the recipe name code from outside Limbeck")
    one.add_argument("--progress", action="store_true", help="show progress although this is no terminal")
    one.add_argument("--help", "-h", action=_RunHelp)

    one = add("compare", compare, "run several recipes over the same seeds; --key value pairs set keys of all")
    one.add_argument("recipes", nargs="+", help="slugs or YAML files")
    one.add_argument("--seeds", type=int, default=3, help="seeds of every recipe (default %(default)s)")
    one.add_argument("--workspace", default="runs/compare", help="folder (default %(default)s)")
    one.add_argument("--allow-imports", action="store_true", help="let recipes name code from outside Limbeck")

    one = add("prove", prove, "measure a system's claim and write results/<slug>.json")
    one.add_argument("slug")
    one.add_argument("--seeds", type=int, help="instead of the claim's own number")
    one.add_argument("--workspace", help="folder of the runs (default runs/prove-<slug>)")
    one.add_argument("--results", default="results", help="folder of the result files (default %(default)s)")

    one = add("label", label, "let a recipe's teacher answer for its samples once, into a store to train from")
    one.add_argument("recipe", nargs="?", help="slug or YAML file; further --key value pairs set keys of it")
    one.add_argument("--store", help="folder of the answers (default: the recipe's teacher.store)")
    one.add_argument("--verify", action="store_true", help="read everything in the end; alone: look a store over")
    one.add_argument("--section", default="teacher", help="the recipe's teacher that answers (default %(default)s)")
    one.add_argument("--streams", nargs="+", help="streams or splits to label (default: those that the system reads)")
    one.add_argument(
        "--views",
        help="views to label: names, YAML such as '{crop: {name: multi_crop, crops: 1}}', or [] for inputs as they are",
    )
    one.add_argument(
        "--keep", nargs="+", default=["logits"], choices=["logits", "embedding"], help="which outputs (default logits)"
    )
    one.add_argument("--features", nargs="+", default=[], metavar="MODULE", help="inner outputs, such as layer2 layer3")
    one.add_argument("--top-k", type=int, help="keep the K likeliest classes and the mass that is left")
    one.add_argument("--values", choices=["logits", "log_probabilities"], help="how logits are kept (default logits)")
    one.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16", "int8"])
    one.add_argument("--versions", type=int, default=1, help="draws of each random view (default %(default)s)")
    one.add_argument("--batch-size", type=int, help="samples in a forward pass (default: the recipe's)")
    one.add_argument("--share", help="i/n: take every n-th block from the i-th, beside other processes")
    one.add_argument("--workers", type=int, default=0, help="processes that decode pictures (default %(default)s)")
    one.add_argument("--ray", type=int, metavar="N", help="label by N Ray workers (pip install limbeck[cluster])")
    one.add_argument("--address", help="of the Ray cluster (default: this machine)")
    one.add_argument("--allow-imports", action="store_true", help="let the recipe name code from outside Limbeck")
    one.add_argument("--progress", action="store_true", help="show progress although this is no terminal")

    one = add("export", export, "write the student of a finished run as files to deploy")
    one.add_argument("workspace", help="folder of the run")
    one.add_argument(
        "--formats",
        nargs="+",
        default=["safetensors", "torch_export", "onnx"],
        choices=["safetensors", "torch_export", "onnx"],
        help="which files (default all)",
    )
    return parser, made


if __name__ == "__main__":
    sys.exit(main())
