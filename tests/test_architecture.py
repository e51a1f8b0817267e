"""The import graph is a DAG: values ← interfaces ← {implementations, verbs} ← rounds ← cli."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "pseudolabel"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}
IMPLEMENTATIONS = {name for name in MODULES if name.startswith(("teachers.", "engines.", "trackers."))}
VERBS = {
    "pack",
    "annotate",
    "train",
    "evaluate",
    "labels.verify",
    "labels.summary",
    "labels.query",
    "labels.histograms",
    "labeling.reannotate",
}
VERBS |= {"calibration.calibrate", "selection.select", "leaks"}
VERBS |= {name for name in MODULES if name.split(".")[0] == "plan"}
OUTER = {"rounds", "demo", "display", "charts", "__main__"} | {name for name in MODULES if name.split(".")[0] == "cli"}


def imports_of(name: str) -> set[str]:
    """The modules of ours that a module imports, wherever in the file; TYPE_CHECKING blocks don't count."""
    tree = ast.parse(MODULES[name].read_text())
    typing_only = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    hidden = {id(inner) for block in typing_only for inner in ast.walk(block)}
    found = set()
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.ImportFrom)
            and id(node) not in hidden
            and (node.module or "").startswith("pseudolabel")
        ):
            module = (node.module or "").removeprefix("pseudolabel").lstrip(".")
            inner = {f"{module}.{alias.name}".lstrip(".") for alias in node.names} & MODULES.keys()
            found |= inner or {module}
    return found - {""}


GRAPH = {name: imports_of(name) for name in MODULES}


def test_there_is_no_cycle() -> None:
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " → ".join((*trail, name))
        if name not in done:
            for imported in GRAPH[name]:
                visit(imported, (*trail, name))
            done.add(name)

    for name in GRAPH:
        visit(name, ())


def test_verbs_see_no_implementation() -> None:
    assert {(verb, name) for verb in VERBS for name in GRAPH[verb] if name in IMPLEMENTATIONS} == set()


def test_implementations_see_neither_verbs_nor_each_other() -> None:
    assert {(one, name) for one in IMPLEMENTATIONS for name in GRAPH[one] if name in IMPLEMENTATIONS | VERBS} == set()


def test_only_the_outside_imports_the_outside() -> None:
    allowed = OUTER | {"report"}
    assert {(one, name) for one in MODULES.keys() - allowed for name in GRAPH[one] if name in OUTER} == set()


@pytest.mark.parametrize(
    ("package", "home"),
    [
        ("webdataset", {"shards"}),
        ("duckdb", {"database"}),
        ("plotly", {"report"}),
        ("imagehash", {"duplicates.look"}),
        ("torchmetrics", {"evaluate"}),
        ("timm", {"teachers.timm"}),
        ("transformers", {"teachers.huggingface"}),
        ("open_clip", {"teachers.open_clip"}),
        ("onnx", {"teachers.onnx"}),
        ("onnxruntime", {"teachers.onnx"}),
        ("tensorboard", {"trackers.tensorboard"}),
        ("wandb", {"trackers.wandb"}),
        ("mlflow", {"trackers.mlflow"}),
        ("trackio", {"trackers.trackio"}),
    ],
)
def test_a_package_has_one_importer(package: str, home: set[str]) -> None:
    importers = set()
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            modules = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            importers |= {name for module in modules if module.split(".")[0] == package}
    assert importers == home


def test_nothing_of_ours_unpickles() -> None:
    """torch.load stands in one place, with weights_only."""
    for path in MODULES.values():
        text = path.read_text()
        for danger in ("pickle.load", "weights_only=False", "yaml.load(", "shell=True", "os.system", "eval("):
            assert danger not in text.replace(".eval()", ""), (path, danger)
        assert text.count("torch.load(") <= text.count("weights_only=True"), path
