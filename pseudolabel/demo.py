"""The demo: the whole loop on the bundled Fashion-MNIST, from images to a table and a page.

The images are packed into shards, then `pipelines/fashion_mnist.toml` runs on them as any recipe would.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

from pseudolabel import storage
from pseudolabel.errors import OutputExists, RecipeError, StorageError
from pseudolabel.pack import pack
from pseudolabel.place import Place, Watcher
from pseudolabel.recipe import Recipe, load_recipe
from pseudolabel.rounds import run
from pseudolabel.run_result import RunResult
from pseudolabel.specs import Spec, nearest

_PACKAGE = Path(__file__).parent
_VAL_FRACTION = 1000 / 13500
RECIPES = ("fashion_mnist", "from_labels_alone")


def demo(
    out: str | Path, place: Place, watcher: Watcher, *, recipe: str = "fashion_mnist", overrides: tuple[str, ...] = ()
) -> RunResult:
    """Run the bundled `recipe` in `out`; goes on where it stopped.

    Raises:
        OutputExists: `out` holds something else.
    """
    directory = storage.local_path(out)
    loaded = load_demo_recipe(directory, recipe, overrides)
    watcher.stage(f"packing the bundled Fashion-MNIST into {directory / 'shards'}")
    pack_bundled(directory / "shards")
    return run(loaded, directory / "run", place, watcher)


def load_demo_recipe(directory: Path, recipe: str, overrides: tuple[str, ...] = ()) -> Recipe:
    """The bundled recipe with its paths set to the demo's."""
    shards, data = directory / "shards", bundled("data/fashion-mnist")
    if recipe not in RECIPES:
        raise RecipeError(
            f"{recipe!r} is no recipe of the demo{nearest(recipe, RECIPES)}; known are {', '.join(RECIPES)}"
        )
    paths = [f"data.{split}={json.dumps(str(shards / split))}" for split in ("labeled", "unlabeled", "val", "test")]
    paths.append(f"data.classes={json.dumps(str(data / 'classes.txt'))}")
    if recipe == "fashion_mnist":
        paths.append(f"teacher.specs={json.dumps([str(Spec('checkpoint', str(data / 'teacher')))])}")
    return load_recipe(bundled(f"pipelines/{recipe}.toml"), [*paths, *overrides])


def pack_bundled(shards: Path) -> None:
    """500 labeled, 12,000 unlabeled, 1,000 validation and 3,500 test images, the same bytes every time."""
    if shards.exists():
        marker = shards / "dataset.json"
        if not marker.exists() or "bundled" not in json.loads(marker.read_text(encoding="utf-8")):
            raise OutputExists(f"{shards}: holds something else; choose another --out")
        return
    data, scratch = bundled("data/fashion-mnist"), shards.with_name(".shards.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    train = pack(data / "train-images-idx3-ubyte.gz", scratch, labels_per_class=50, val_fraction=_VAL_FRACTION)
    test = pack(data / "test-images-idx3-ubyte.gz", scratch / "second", test_fraction=1.0)
    (scratch / "second" / "test").rename(scratch / "test")
    shutil.rmtree(scratch / "second")
    content = {
        **dataclasses.asdict(train),
        "out": None,
        "bundled": "fashion-mnist",
        "samples": {**train.samples, **test.samples},
    }
    storage.write_atomic(scratch / "dataset.json", json.dumps(content, indent=1) + "\n")
    scratch.rename(shards)


def bundled(relative: str) -> Path:
    """A file that comes with pseudolabel: inside the installed package, or in the source tree. Raises
    `StorageError`.
    """
    for root in (_PACKAGE / "bundled", _PACKAGE.parent):
        if (root / relative).exists():
            return root / relative
    raise StorageError(
        f"{relative}: not found beside the package; install pseudolabel from a complete source tree or wheel"
    )
