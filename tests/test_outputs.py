"""Where a selection, a calibration and leaks may be written: never into a store, and never over another's."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import image_bytes
from object_stores import Bucket
from stores import add_part, known, write_store

from pseudolabel import storage
from pseudolabel.calibration import read_calibration
from pseudolabel.calibration.calibrate import calibrate
from pseudolabel.engines.local import LocalEngine
from pseudolabel.errors import CalibrationError, OutputExists
from pseudolabel.labels.store import Store
from pseudolabel.labels.verify import verify
from pseudolabel.leaks import find_leaks
from pseudolabel.selection.select import select
from pseudolabel.settings import CalibrateSettings
from pseudolabel.shards import write_shard


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = write_store(tmp_path / "store", {"u": (known(60, 4, 0)[0], [None] * 60)})
    add_part(made, "val", *known(60, 4, 1))
    return made


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A shard to look for leaks in."""
    write_shard(tmp_path / "a.tar", [("a", {"png": image_bytes(0)})])
    return tmp_path / "a.tar"


@pytest.mark.parametrize("place", ["mine", "parts/mine.parquet", "log/a/mine"])
def test_nothing_is_written_into_a_store(store: Store, tmp_path: Path, images: Path, place: str) -> None:
    """In parts/ a file of leaks made all that read the store fail, and `verify --repair` would have deleted it."""
    out = tmp_path / "store" / place
    for overwrite in (False, True):
        refused = pytest.raises(
            OutputExists, match=r"lies in the store .*store, which holds nothing but its own labels"
        )
        with refused:
            select(store, out, overwrite=overwrite)
        with refused:
            calibrate(store, out, overwrite=overwrite)
        with refused:
            find_leaks(images, images, out, engine=LocalEngine("cpu", 1), overwrite=overwrite)
    assert not out.exists()
    assert verify(store).ok


def test_nor_into_one_at_a_url(store: Store, bucket: Bucket) -> None:
    for path in (store.root / "parts").iterdir():
        storage.write_atomic(storage.location(f"{bucket.url}/store/parts/{path.name}"), path.read_bytes())
    storage.write_atomic(storage.location(f"{bucket.url}/store/store.json"), (store.root / "store.json").read_bytes())
    for place in ("mine", "parts/mine.json"):
        with pytest.raises(OutputExists, match="lies in the store s3://"):
            calibrate(store, f"{bucket.url}/store/{place}")
    calibrate(store, f"{bucket.url}/mine.json")
    assert read_calibration(f"{bucket.url}/mine.json").store == store.fingerprint


def test_what_a_killed_command_left_half_written_is_removed(store: Store, tmp_path: Path, images: Path) -> None:
    others = tmp_path / ".other.json.tmp-0123456789ab"
    for path in (tmp_path / ".c.json.tmp-0123456789ab", tmp_path / ".l[1].parquet.tmp-0123456789ab", others):
        path.write_text("half")
    calibrate(store, tmp_path / "c.json")
    find_leaks(images, images, tmp_path / "l[1].parquet", engine=LocalEngine("cpu", 1))
    assert list(tmp_path.glob(".*")) == [others]


def test_what_another_process_wrote_meanwhile_stays(tmp_path: Path, images: Path) -> None:
    """Looking for leaks may take hours: whoever came second took the place of whoever was quicker."""
    engine, out = LocalEngine("cpu", 1), tmp_path / "l.parquet"

    def quicker(_: object) -> None:
        if not out.exists():
            find_leaks(images, images, out, engine=engine, distance=0)

    with pytest.raises(OutputExists, match="is there already"):
        find_leaks(images, images, out, engine=engine, on_progress=quicker)


def test_a_prior_that_would_be_endless_is_refused(tmp_path: Path) -> None:
    """The file held Infinity: it was written, and nothing could read it again, not even to write over it."""
    logits = known(60, 3, 0)[0]
    logits[:, 1] = -5000.0
    made = write_store(tmp_path / "store", {"u": (logits, [None] * 60)})
    add_part(made, "val", *known(60, 3, 1))
    with pytest.raises(CalibrationError, match="give the class 'class 1' no probability at all"):
        calibrate(made, tmp_path / "c.json", CalibrateSettings(prior="labels"))
    assert not (tmp_path / "c.json").exists()
    calibrate(made, tmp_path / "c.json")
    assert read_calibration(tmp_path / "c.json").shift is None
