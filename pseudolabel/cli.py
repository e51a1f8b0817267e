"""The command line: each command parses, calls one function, prints. torch is imported only by commands that need it.

Exit codes: 0 done; 1 a known error (one to five lines: what, where, remedy); 2 usage; 130 interrupted, resumable.
With `--json` stdout carries one JSON object and nothing else; what people read goes to stderr.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import signal
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from pseudolabel.allocator import keep_freed_memory
from pseudolabel.display import Display, print_confusion, print_pairs, print_plan, print_rounds
from pseudolabel.errors import PseudolabelError, RecipeError
from pseudolabel.forkserver import fork_server
from pseudolabel.settings import AnnotateSettings, AugmentSettings, TrainSettings

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Annotate unlabeled shards once with a big teacher, then train small students offline from its soft labels.",
    epilog="SHARDS is a directory, a glob, a brace range such as x-{000..099}.tar, or @list.txt.",
)

Shards = Annotated[list[str], typer.Argument(metavar="SHARDS...", help="directory, glob, brace range or @list.txt")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout, all else on stderr")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace what is there")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="CPU threads that train; by default the cores that load nothing")
]
LoaderWorkers = Annotated[int | None, typer.Option(min=0, help="loader processes; by default 1, up to 8 beside a GPU")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="override a value of the recipe; may be repeated")
]


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(version("pseudolabel"))
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="print the version")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point: usage errors become JSON, too, if `--json` is given. A scheduler's SIGTERM ends as Ctrl-C does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    keep_freed_memory()
    warnings.showwarning = _show_warning
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal of another encoding must not cost the result
    if "--json" not in sys.argv:
        app()
        return
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except Exception as error:
        if not hasattr(error, "format_message"):  # a usage error of typer's, whichever click it brings
            raise
        _print_error("UsageError", error.format_message())
        sys.exit(2)


def _print_error(kind: str, message: str) -> None:
    print(json.dumps({"error": {"kind": kind, "message": message}}))


def _command(function: Callable[..., Mapping[str, Any] | None]) -> Callable[..., None]:
    """Register a command. What it returns is printed by `--json`; known errors end with exit code 1, Ctrl-C with
    130.
    """

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        as_json = bool(kwargs.get("as_json"))
        try:
            # a library or a user's own teacher may print, too
            with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
                result = function(*args, **kwargs)
        except PseudolabelError as error:
            if as_json:
                _print_error(error.kind, str(error))
            else:
                print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(1) from None
        except (SystemExit, OSError, MemoryError) as error:  # a user's code, or the machine
            if isinstance(error, BrokenPipeError):
                raise
            message = _outside(error)
            if as_json:
                _print_error(type(error).__name__, message)
            else:
                print(f"error: {message}", file=sys.stderr)
            raise typer.Exit(1) from None
        except Exception as error:  # not ours: the traceback is wanted, and with --json an object all the same
            if as_json:
                _print_error(type(error).__name__, str(error))
            raise
        except KeyboardInterrupt:
            message = "interrupted; the same command goes on from here"
            print(message, file=sys.stderr)
            if as_json:
                _print_error("Interrupted", message)
            raise typer.Exit(130) from None
        failed = bool(result and result.get("ok") is False)
        if as_json and result is not None:
            print(json.dumps(result))
        if failed:
            raise typer.Exit(1)

    app.command(function.__name__.rstrip("_"))(wrapped)
    return wrapped


def _outside(error: BaseException) -> str:
    """One line for what neither we nor our input did wrong in a way of its own."""
    if isinstance(error, SystemExit):
        return f"code that was called ended the program (SystemExit {error.code}); a teacher or student must not"
    if isinstance(error, MemoryError):
        return "out of memory; use smaller batches, fewer classes or fewer --workers"
    assert isinstance(error, OSError)
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}; check the path, its permissions and the disk"


def _out(as_json: bool) -> Any:
    return sys.stderr if as_json else sys.stdout


def _settings_help(kind: type[AnnotateSettings | AugmentSettings | TrainSettings], name: str, *, note: str = "") -> str:
    field = kind.model_fields[name]
    default = "" if field.default is None or isinstance(field.default, bool) else f" [{field.default}]"
    return f"{field.description}{note}{default}"


def _annotate_option(name: str) -> Any:
    return typer.Option(help=_settings_help(AnnotateSettings, name), show_default=False)


def _batch_size(text: str) -> str:
    if text != "auto" and not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise typer.BadParameter(f"{text!r} is neither a whole number from 1 nor auto")
    return text


def _train_option(name: str, kind: type[AugmentSettings | TrainSettings] = TrainSettings) -> Any:
    return typer.Option(help=_settings_help(kind, name), show_default=False)


Teachers = Annotated[
    list[str],
    typer.Option(
        "--teacher",
        help="teacher spec: torchvision:NAME, timm:NAME, hf:NAME, open_clip:ARCH/TAG, onnx:FILE, checkpoint:RUN or "
        "python:MODULE:FUNCTION; several make an ensemble, weighted as in SPEC@0.7",
    ),
]
ClassMap = Annotated[Path | None, typer.Option(help="TOML file of target classes, each made of some of the teacher's")]
Encoding = Annotated[str | None, _annotate_option("encoding")]
Views = Annotated[
    int | None, typer.Option(min=1, max=1024, help=_settings_help(AnnotateSettings, "views"), show_default=False)
]
ViewSeed = Annotated[int | None, _annotate_option("view_seed")]
ViewPolicy = Annotated[str | None, _annotate_option("view_policy")]
Tta = Annotated[str | None, _annotate_option("tta")]
FastJpeg = Annotated[bool, _annotate_option("fast_jpeg")]
KeepMembers = Annotated[bool, _annotate_option("keep_members")]
BatchSize = Annotated[
    str | None,
    typer.Option(metavar="N|auto", parser=_batch_size, help=_settings_help(AnnotateSettings, "batch_size")),
]
AnnotatePrecision = Annotated[str | None, _annotate_option("precision")]
Compile = Annotated[bool, typer.Option("--compile", help=_settings_help(AnnotateSettings, "compile"))]
AnnotateWorkers = Annotated[int | None, typer.Option(min=1, help="processes; one per GPU or CPU core if not given")]
Slice = Annotated[
    str | None, typer.Option("--slice", metavar="I/N", help="only every N-th shard, from the I-th (from 0)")
]


def _annotate_settings(flags: Mapping[str, Any]) -> AnnotateSettings:
    """The settings among a command's flags. Raises `RecipeError`."""
    from pseudolabel.recipe import validate

    names = {**dict.fromkeys(AnnotateSettings.model_fields), "compile": "compile_"}
    given = {name: flags.get(flag or name) for name, flag in names.items()}
    given = {name: value for name, value in given.items() if value is not None}
    idle = [f"--{name.replace('_', '-')}" for name in ("view_seed", "view_policy") if name in given]
    if idle and given.get("views", 1) == 1:
        print(f"note: with --views 1, {' and '.join(idle)} have no effect", file=sys.stderr)
    return validate(AnnotateSettings, given, "annotate")


@_command
def pack(
    source: Annotated[
        Path, typer.Argument(help="image folder (one folder a class), .csv/.parquet of paths or bytes, or IDX file")
    ],
    out: Annotated[Path, typer.Argument(help="directory to make: labeled/, unlabeled/, val/, test/")],
    labels_per_class: Annotated[
        int | None, typer.Option(min=0, help="keep so many labels a class, the rest becomes unlabeled")
    ] = None,
    val_fraction: Annotated[float, typer.Option(help="share of each class for val/")] = 0.0,
    test_fraction: Annotated[float, typer.Option(help="share of each class for test/")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="decides the split and the order")] = 0,
    samples_per_shard: Annotated[int, typer.Option(min=1, help="samples in a shard")] = 1000,
    name: Annotated[str, typer.Option(help="prefix of the shards' names, which must be unique in a corpus")] = "",
    image_column: Annotated[str | None, typer.Option(help="column of image paths or bytes")] = None,
    label_column: Annotated[str | None, typer.Option(help="column of labels: numbers or names")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="decode every image first; refuse the source if any can't be")
    ] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> Mapping[str, Any]:
    """Turn images into shards, split by a seed."""
    from pseudolabel.pack import pack

    result = pack(
        source,
        out,
        labels_per_class=labels_per_class,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        seed=seed,
        samples_per_shard=samples_per_shard,
        name=name,
        image_column=image_column,
        label_column=label_column,
        check=check,
        overwrite=overwrite,
    )
    print_pairs({**result.samples, "shards": result.shards, "classes": len(result.classes)}, _out(as_json))
    return dataclasses.asdict(result)


@_command
def plan(
    shards: Shards,
    teacher: Teachers,
    out: Annotated[Path | None, typer.Option(help="a store to go on with: its shards are done")] = None,
    class_map: ClassMap = None,
    encoding: Encoding = None,
    views: Views = None,
    view_seed: ViewSeed = None,
    view_policy: ViewPolicy = None,
    tta: Tta = None,
    fast_jpeg: FastJpeg = False,
    batch_size: BatchSize = None,
    precision: AnnotatePrecision = None,
    compile_: Compile = False,
    device: Device = "auto",
    workers: AnnotateWorkers = None,
    part_of: Slice = None,
    max_reject_fraction: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="say so if annotate would reject more samples than this")
    ] = 0.1,
    probe_shards: Annotated[int, typer.Option(min=2, help="shards that are opened and probed")] = 8,
    probe_samples: Annotated[int, typer.Option(min=1, help="samples that are labeled to see rejects and bytes")] = 4096,
    probe_seconds: Annotated[float, typer.Option(min=0.0, help="seconds over which the speed is measured")] = 30.0,
    label_seconds: Annotated[
        float | None, typer.Option(min=0.0, help="seconds for the labels, at most [as --probe-seconds]")
    ] = None,
    exact: Annotated[
        bool | None, typer.Option("--exact/--estimate", help="count all samples [up to 1 GiB]", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="decides which shards and samples are probed")] = 0,
    as_json: Json = False,
) -> Mapping[str, Any]:
    """Tell the bill of annotate beforehand: hours, bytes, rejects, and what each encoding costs and loses."""
    settings = _annotate_settings(locals())
    from pseudolabel.engines.local import LocalEngine, resolve_device
    from pseudolabel.plan import plan
    from pseudolabel.shards import list_shards, slice_shards
    from pseudolabel.teachers import parse_teachers

    with Display() as display:
        result = plan(
            slice_shards(list_shards(shards), part_of),
            parse_teachers(teacher, class_map),
            engine=LocalEngine(resolve_device(device), workers),
            settings=settings,
            out=out,
            probe_shards=probe_shards,
            probe_samples=probe_samples,
            probe_seconds=probe_seconds,
            label_seconds=label_seconds,
            exact=exact,
            seed=seed,
            max_reject_fraction=max_reject_fraction,
            on_stage=display.stage,
        )
    print_plan(result, _out(as_json))
    return dataclasses.asdict(result)


@_command
def annotate(
    shards: Shards,
    teacher: Teachers,
    out: Annotated[Path, typer.Option(help="the store: made, or gone on with")],
    class_map: ClassMap = None,
    encoding: Encoding = None,
    views: Views = None,
    view_seed: ViewSeed = None,
    view_policy: ViewPolicy = None,
    tta: Tta = None,
    fast_jpeg: FastJpeg = False,
    keep_members: KeepMembers = False,
    batch_size: BatchSize = None,
    precision: AnnotatePrecision = None,
    compile_: Compile = False,
    device: Device = "auto",
    workers: AnnotateWorkers = None,
    part_of: Slice = None,
    max_reject_fraction: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="more rejected samples than this are an error")
    ] = 0.1,
    as_json: Json = False,
) -> Mapping[str, Any]:
    """Run a teacher over shards and keep its soft labels. Run it again to go on where it stopped."""
    settings = _annotate_settings(locals())
    if workers != 1:
        fork_server()
    from pseudolabel.annotate import annotate
    from pseudolabel.engines.local import LocalEngine, resolve_device
    from pseudolabel.shards import list_shards, slice_shards
    from pseudolabel.teachers import parse_teachers

    listed = slice_shards(list_shards(shards), part_of)
    engine = LocalEngine(resolve_device(device), workers)
    with Display() as display:
        display.begin_annotating(listed)
        result = annotate(
            listed,
            parse_teachers(teacher, class_map),
            out,
            engine=engine,
            settings=settings,
            max_reject_fraction=max_reject_fraction,
            on_progress=display.annotating,
        )
    found = dataclasses.asdict(result)
    stages = ", ".join(f"{stage} {share:.0%}" for stage, share in result.stages.items())
    print_pairs({**found, "stages": stages}, _out(as_json))
    return found


@_command
def inspect(
    store: Annotated[Path, typer.Argument(help="a store")],
    rejects: Annotated[bool, typer.Option("--rejects", help="list every rejected sample with its reason")] = False,
    as_json: Json = False,
) -> Mapping[str, Any]:
    """Say what is in a store."""
    from pseudolabel.labels.store import open_store
    from pseudolabel.labels.summary import list_rejects, summarize_store

    opened = open_store(store)
    summary = dataclasses.asdict(summarize_store(opened))
    shown = {name: value for name, value in summary.items() if name not in ("fidelity", "teacher", "classes")}
    for name, by_temperature in summary["fidelity"].items():
        shown[f"KL(full || stored), {name}"] = ", ".join(f"{value:.2g} at T={t}" for t, value in by_temperature.items())
    shown["classes"] = ", ".join(summary["classes"][:20]) + (", …" if len(summary["classes"]) > 20 else "")
    shown["teacher"] = json.dumps(summary["teacher"])
    print_pairs(shown, _out(as_json))
    if rejects:
        summary["rejected"] = list(list_rejects(opened))
        for one in summary["rejected"]:
            print("{shard}: sample {key!r} ({stage}): {detail}".format(**one), file=_out(as_json))
    return summary


@_command
def verify(
    store: Annotated[Path, typer.Argument(help="a store")],
    shards: Annotated[list[str] | None, typer.Option(help="also compare with these shards: content and keys")] = None,
    as_json: Json = False,
) -> Mapping[str, Any]:
    """Read every byte of a store again: hashes, counts, order. Exit code 1 if anything is wrong."""
    from pseudolabel.labels.store import open_store
    from pseudolabel.labels.verify import verify
    from pseudolabel.shards import list_shards

    result = verify(open_store(store), list_shards(shards) if shards else ())
    for problem in result.problems:
        print(f"{problem.kind}: {problem.detail}", file=sys.stderr)
    print_pairs(
        {"ok": result.ok, "parts": result.parts, "rows": result.rows, "problems": len(result.problems)}, _out(as_json)
    )
    return dataclasses.asdict(result)


@_command
def train(
    out: Annotated[Path, typer.Option(help="run directory: made, or gone on with")],
    labeled: Annotated[list[str] | None, typer.Option(help="labeled shards; may be repeated")] = None,
    unlabeled: Annotated[
        list[str] | None, typer.Option(help="unlabeled shards, annotated in --labels; may be repeated")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="store of soft labels; without it, plain supervised training")
    ] = None,
    val: Annotated[
        list[str] | None, typer.Option(help="labeled shards that choose the best checkpoint; may be repeated")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="TOML file whose train table gives the settings; flags override it")
    ] = None,
    student: Annotated[str | None, _train_option("student")] = None,
    image_size: Annotated[int | None, _train_option("image_size")] = None,
    channels: Annotated[int | None, _train_option("channels")] = None,
    steps: Annotated[int | None, _train_option("steps")] = None,
    epochs: Annotated[float | None, _train_option("epochs")] = None,
    batch_size: Annotated[int | None, _train_option("batch_size")] = None,
    labeled_fraction: Annotated[float | None, _train_option("labeled_fraction")] = None,
    loss: Annotated[str | None, _train_option("loss")] = None,
    alpha: Annotated[float | None, _train_option("alpha")] = None,
    temperature: Annotated[float | None, _train_option("temperature")] = None,
    optimizer: Annotated[str | None, _train_option("optimizer")] = None,
    lr: Annotated[float | None, _train_option("lr")] = None,
    weight_decay: Annotated[float | None, _train_option("weight_decay")] = None,
    warmup_fraction: Annotated[float | None, _train_option("warmup_fraction")] = None,
    clip_norm: Annotated[float | None, _train_option("clip_norm")] = None,
    ema: Annotated[float | None, _train_option("ema")] = None,
    precision: Annotated[str | None, _train_option("precision")] = None,
    crop: Annotated[str | None, _train_option("crop", AugmentSettings)] = None,
    flip: Annotated[
        bool | None,
        typer.Option("--flip/--no-flip", help="flip half of the images left to right [on]", show_default=False),
    ] = None,
    randaugment: Annotated[int | None, _train_option("randaugment", AugmentSettings)] = None,
    erasing: Annotated[float | None, _train_option("erasing", AugmentSettings)] = None,
    eval_every: Annotated[int | None, _train_option("eval_every")] = None,
    seed: Annotated[int | None, _train_option("seed")] = None,
    classes: Annotated[Path | None, typer.Option(help="file of class names, one a line")] = None,
    num_classes: Annotated[
        int | None, typer.Option(min=1, help="number of classes, where neither a store nor --classes says it")
    ] = None,
    device: Device = "auto",
    workers: LoaderWorkers = None,
    threads: Threads = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> Mapping[str, Any]:
    """Train a student from cached soft labels and the labeled set. Run it again to go on where it stopped."""
    given = {name: value for name, value in locals().items() if value is not None}
    settings = _train_settings(recipe, given)
    idle = [name for name in ("loss", "alpha", "temperature", "labeled_fraction") if name in given]
    if labels is None and idle:
        print(f"note: without --labels, {', '.join(idle)} have no effect", file=sys.stderr)
    if workers != 0:
        fork_server()
    from pseudolabel.labels.store import open_store
    from pseudolabel.rounds import read_classes
    from pseudolabel.shards import list_shards
    from pseudolabel.train import train

    place = _place(device, workers, threads)
    with Display() as display:
        result = train(
            settings,
            out,
            labeled=list_shards(labeled) if labeled else (),
            unlabeled=list_shards(unlabeled) if unlabeled else (),
            store=open_store(labels) if labels is not None else None,
            val=list_shards(val) if val else (),
            classes=read_classes(classes) if classes is not None else None,
            num_classes=num_classes,
            overwrite=overwrite,
            on_progress=display.training,
            **place,
        )
    print_pairs({name: value for name, value in dataclasses.asdict(result).items() if value is not None}, _out(as_json))
    return dataclasses.asdict(result)


def _train_settings(recipe: Path | None, given: Mapping[str, Any]) -> TrainSettings:
    """A recipe's [train] table, then flags on top. Raises `RecipeError`."""
    from pseudolabel.recipe import read_tables, validate

    tables: dict[str, Any] = {}
    if recipe is not None:
        tables = read_tables(recipe).get("train", {})
        if not tables or not isinstance(tables, dict):
            raise RecipeError(f"{recipe}: has no [train] table")
    augment = tables.get("augment", {})
    if isinstance(augment, dict):
        augment = {**augment, **{name: given[name] for name in AugmentSettings.model_fields if name in given}}
    flags = {name: given[name] for name in TrainSettings.model_fields if name in given}
    if "steps" in flags or "epochs" in flags:  # one flag of the pair replaces the recipe's other
        tables = {name: value for name, value in tables.items() if name not in ("steps", "epochs")}
    return validate(
        TrainSettings, {**tables, **flags, "augment": augment}, str(recipe) if recipe is not None else "train"
    )


def _place(device: str, workers: int | None, threads: int | None) -> dict[str, Any]:
    """Where to train. On a CPU one core loads and the others train: two thread pools on the same cores can be forty
    times slower than one."""
    from pseudolabel.engines.local import available_cores, resolve_device

    resolved, cores = resolve_device(device), available_cores()
    if workers is None:
        workers = min(1 if resolved == "cpu" else 8, cores - 1)
    return {"device": resolved, "workers": workers, "threads": threads or max(1, cores - workers)}


@_command
def evaluate(
    model: Annotated[Path, typer.Argument(help="run directory")],
    shards: Shards,
    store: Annotated[
        Path | None,
        typer.Option("--labels", help="store of soft labels of these shards: how often the model agrees with it"),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="samples per forward pass")] = 256,
    trust_code: Annotated[
        bool, typer.Option("--trust-code", help="let a model with a python: student call the function it names")
    ] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> Mapping[str, Any]:
    """Measure a model on labeled shards: accuracy, top-5, NLL, ECE, per class, confusion."""
    from pseudolabel.engines.local import resolve_device
    from pseudolabel.evaluate import evaluate
    from pseudolabel.labels.store import open_store
    from pseudolabel.shards import list_shards

    opened = open_store(store) if store is not None else None
    result = dataclasses.asdict(
        evaluate(
            model,
            list_shards(shards),
            store=opened,
            device=resolve_device(device),
            batch_size=batch_size,
            trust_code=trust_code,
        )
    )
    shown = {
        name: result[name]
        for name in ("samples", "accuracy", "top5", "nll", "ece", "agreement")
        if result[name] is not None
    }
    per_class = {
        f"  {name}": value
        for name, value in zip(result["classes"], result["per_class"], strict=True)
        if value is not None
    }
    print_pairs({**shown, "per class": "", **per_class}, _out(as_json))
    print_confusion(result["classes"], result["confusion"], _out(as_json))
    return result


@_command
def run(
    recipe: Annotated[Path, typer.Argument(help="TOML file")],
    out: Annotated[Path, typer.Option(help="directory of the whole run: made, or gone on with")],
    overrides: Overrides = None,
    device: Device = "auto",
    workers: LoaderWorkers = None,
    threads: Threads = None,
    as_json: Json = False,
) -> Mapping[str, Any]:
    """Run a recipe: teacher, rounds of annotate and train, control, table. Finished stages are skipped."""
    fork_server()
    from pseudolabel.engines.local import LocalEngine
    from pseudolabel.recipe import load_recipe
    from pseudolabel.report import write_report
    from pseudolabel.rounds import Place, run, table

    loaded = load_recipe(recipe, overrides or ())
    with Display() as display:
        result = run(loaded, out, Place(LocalEngine(device), **_place(device, workers, threads)), display)
    rows = table(result)
    print_rounds(rows, _out(as_json))
    print(f"page: {write_report(out)}", file=_out(as_json))
    return {**dataclasses.asdict(result), "table": rows}


@_command
def report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="what `run` left, or a single run directory")],
    as_json: Json = False,
) -> Mapping[str, Any]:
    """Write a self-contained HTML page: table, training curves, images with their soft labels."""
    from pseudolabel.report import write_report

    page = write_report(directory)
    print(f"page: {page}", file=_out(as_json))
    return {"page": str(page)}


@_command
def demo(
    out: Annotated[Path, typer.Option(help="directory for shards, run and page")] = Path("demo"),
    recipe: Annotated[
        str, typer.Option(help="fashion_mnist, or from_labels_alone: without a pretrained teacher")
    ] = "fashion_mnist",
    overrides: Overrides = None,
    device: Device = "auto",
    workers: LoaderWorkers = None,
    threads: Threads = None,
    as_json: Json = False,
) -> Mapping[str, Any]:
    """Run the whole loop on the bundled Fashion-MNIST: about three minutes on two cores."""
    fork_server()
    from pseudolabel.demo import demo
    from pseudolabel.engines.local import LocalEngine
    from pseudolabel.report import write_report
    from pseudolabel.rounds import Place, table

    with Display() as display:
        place = Place(LocalEngine(device), **_place(device, workers, threads))
        result = demo(out, place, display, recipe=recipe, overrides=tuple(overrides or ()))
    rows = table(result)
    print_rounds(rows, _out(as_json))
    print(f"page: {write_report(out / 'run')}", file=_out(as_json))
    return {**dataclasses.asdict(result), "table": rows}
