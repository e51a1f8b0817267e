"""The files of a selection: plain parquet, the same at a URL, sealed, and never written over what is no selection."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from object_stores import Bucket
from selecting import store_to_select_from  # noqa: F401 (a fixture)

from pseudolabel import storage
from pseudolabel.calibration import read_calibration
from pseudolabel.calibration.calibrate import calibrate
from pseudolabel.errors import OutputExists, SelectionError
from pseudolabel.labels.store import Store
from pseudolabel.selection import Selection, open_selection
from pseudolabel.selection.select import select
from pseudolabel.settings import SelectSettings


def test_the_manifest_is_plain_parquet(store: Store, tmp_path: Path) -> None:
    select(store, tmp_path / "s", SelectSettings(min_confidence=0.9))
    table = pq.read_table(tmp_path / "s" / "parts" / "u-0.parquet")
    assert {field.name: str(field.type) for field in table.schema} == {
        "index": "int32",
        "view": "int16",
        "weight": "float",
    }
    assert table["index"].to_pylist() == sorted(table["index"].to_pylist())
    assert isinstance(open_selection(tmp_path / "s"), Selection)


def test_at_a_url_it_is_the_same(store: Store, tmp_path: Path, bucket: Bucket) -> None:
    """Store, calibration and selection in an object storage give the bytes that they give on a disk."""
    for path in (tmp_path / "store").rglob("*.*"):
        place = storage.location(f"{bucket.url}/store/{path.relative_to(tmp_path / 'store')}")
        storage.write_atomic(place, path.read_bytes())
    for root in (str(tmp_path), bucket.url):
        calibrate(f"{root}/store", f"{root}/c.json")
        rules = SelectSettings(top_per_class=9)
        select(f"{root}/store", f"{root}/s", rules, calibration=read_calibration(f"{root}/c.json"))
        with pytest.raises(OutputExists, match="--overwrite"):
            select(f"{root}/store", f"{root}/s")
        with pytest.raises(OutputExists, match="which is not of a selection"):
            select(f"{root}/store", f"{root}/store", overwrite=True)
    for name in ("c.json", "s/selection.json", "s/parts/u-0.parquet", "s/parts/val.parquet"):
        assert storage.location(f"{bucket.url}/{name}").read_bytes() == (tmp_path / name).read_bytes()


def test_a_selection_is_not_overwritten_and_another_one_leaves_no_trace(store: Store, tmp_path: Path) -> None:
    select(store, tmp_path / "s")
    with pytest.raises(OutputExists, match="--overwrite"):
        select(store, tmp_path / "s")
    (tmp_path / "store" / "parts" / "u-1.parquet").unlink()
    select(store, tmp_path / "s", overwrite=True)
    assert sorted(path.name for path in (tmp_path / "s" / "parts").iterdir()) == ["u-0.parquet", "val.parquet"]


def test_what_is_no_selection_is_never_written_over(store: Store, tmp_path: Path) -> None:
    """The parts of a store have the names that a selection's would have: `--out store` lost all labels."""
    before = {path: path.read_bytes() for path in (tmp_path / "store").rglob("*.*")}
    for overwrite in (False, True):
        with pytest.raises(OutputExists, match=r"store: holds '.*', which is not of a selection"):
            select(store, tmp_path / "store", overwrite=overwrite)
    assert {path: path.read_bytes() for path in (tmp_path / "store").rglob("*.*")} == before
    (tmp_path / "mine" / "parts").mkdir(parents=True)
    (tmp_path / "mine" / "parts" / "u-9.parquet").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("mine", "file"):
        with pytest.raises(OutputExists):
            select(store, tmp_path / name, overwrite=True)
    assert (tmp_path / "mine" / "parts" / "u-9.parquet").read_text() == "mine"


def test_a_selection_that_was_killed_is_made_again(store: Store, tmp_path: Path) -> None:
    select(store, tmp_path / "whole", SelectSettings(min_confidence=0.8))
    select(store, tmp_path / "s")
    (tmp_path / "s" / "begun.json").write_text("{}")
    (tmp_path / "s" / "parts" / "mine.parquet").write_text("mine")
    (tmp_path / "s" / "selection.json").unlink()  # as killed while it was being replaced
    with pytest.raises(SelectionError, match="no selection here"):
        open_selection(tmp_path / "s")
    select(store, tmp_path / "s", SelectSettings(min_confidence=0.8))
    for path in (tmp_path / "whole").rglob("*.*"):
        assert (tmp_path / "s" / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes()
    assert not (tmp_path / "s" / "begun.json").exists()
    assert (tmp_path / "s" / "parts" / "mine.parquet").read_text() == "mine"


def test_what_a_killed_one_left_half_written_is_removed(store: Store, tmp_path: Path) -> None:
    select(store, tmp_path / "s")
    for name in (".begun.json.tmp-0123456789ab", "parts/.u-0.parquet.tmp-0123456789ab"):
        (tmp_path / "s" / name).write_text("half")
    select(store, tmp_path / "s", overwrite=True)
    assert not list((tmp_path / "s").rglob(".*"))


def test_of_two_at_once_one_wins_and_the_other_says_so(store: Store, tmp_path: Path) -> None:
    """Both found the place empty; the second one's parts took the place of the first one's, which nobody told."""
    from pseudolabel.selection import write_selection

    sha256 = {name: store.info(name).sha256 for name in store.part_names()}
    refused = []

    def parts() -> Iterator[tuple[str, pa.Table]]:
        for overwrite in (False, True):
            with pytest.raises(OutputExists, match=r"s: another process is at work in it; wait for it") as caught:
                select(store, tmp_path / "s", SelectSettings(min_confidence=0.9), overwrite=overwrite)
            refused.append(caught)
        yield from ()

    write_selection(tmp_path / "s", {"store": store.fingerprint, "shards": {}}, parts(), sha256, overwrite=False)
    assert len(refused) == 2
    with pytest.raises(OutputExists, match="holds a selection; add --overwrite"):  # it was written meanwhile
        write_selection(tmp_path / "s", {}, iter(()), sha256, overwrite=False)
    assert open_selection(tmp_path / "s").facts["store"] == store.fingerprint


def test_an_edited_or_foreign_selection_is_refused(store: Store, tmp_path: Path) -> None:
    select(store, tmp_path / "s")
    select(store, tmp_path / "t", SelectSettings(min_confidence=0.9))
    opened = open_selection(tmp_path / "s")
    with pytest.raises(SelectionError, match="was replaced since this was selected"):
        opened.read("u-0", "0" * 64)
    shutil.copy(tmp_path / "t" / "parts" / "u-0.parquet", tmp_path / "s" / "parts" / "u-0.parquet")
    with pytest.raises(SelectionError, match="isn't of this selection"):
        opened.read("u-0", store.info("u-0").sha256)
    path = tmp_path / "s" / "selection.json"
    path.write_text(path.read_text().replace('"selected": 500', '"selected": 501'))
    with pytest.raises(SelectionError, match="was edited"):
        open_selection(tmp_path / "s")
    with pytest.raises(SelectionError, match="no selection here"):
        open_selection(tmp_path / "nowhere")
