"""Every way to name shards, and what is wrong with a name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from tars import ours

from pseudolabel.errors import ShardListError, StorageError
from pseudolabel.shard_lists import Shard, list_shards, slice_shards
from pseudolabel.shards import write_shard

# ---------------------------------------------------------------------------------- an opened shard


def test_listings_without_end_are_refused(tmp_path: Path) -> None:
    (tmp_path / "self.txt").write_text(f"@{tmp_path / 'self.txt'}\n")
    with pytest.raises(ShardListError, match="lists in lists without end"):
        list_shards(f"@{tmp_path / 'self.txt'}")
    with pytest.raises(ShardListError, match="its braces name more than"):
        list_shards(str(tmp_path / "x-{1..999999999}.tar"))


# ---------------------------------------------------------------------------------- listing


@pytest.fixture
def places(tmp_path: Path) -> Path:
    for name in ("x-000002", "x-000000", "x-000001", "y"):
        write_shard(tmp_path / "d" / f"{name}.tar", [("k", {"txt": name.encode()})])
    (tmp_path / "d" / "notes.txt").write_text("no shard")
    (tmp_path / "d" / ".y.tar.tmp-0").write_bytes(b"")
    (tmp_path / "d" / ".hidden.tar").write_bytes(b"")
    return tmp_path / "d"


def names(spec: Any) -> list[str]:
    return [shard.name for shard in list_shards(spec)]


def test_a_name_that_a_store_would_hide_is_refused(places: Path) -> None:
    with pytest.raises(ShardListError, match="must not begin with a dot"):
        names(places / ".hidden.tar")


def test_every_way_to_name_shards_gives_them_sorted(places: Path, tmp_path: Path) -> None:
    numbered = ["x-000000", "x-000001", "x-000002"]
    assert names(places) == names(str(places)) == names(f"{places}/") == [*numbered, "y"]
    assert names(f"file://{places}") == [*numbered, "y"]
    assert names(f"{places}/x-*.tar") == names(f"{tmp_path}/**/x-*.tar") == numbered
    assert names(f"{places}/x-{{000002..000000}}.tar") == names(f"{places}/x-{{000000..000002}}.tar") == numbered
    assert names(f"{places}/{{y,x-*}}.tar") == [*numbered, "y"]
    assert names(places / "y.tar") == ["y"]
    assert names([f"{places}/y.tar", f"{places}/x-000001.tar"]) == ["x-000001", "y"]
    assert list_shards(places)[0].path == str(places / "x-000000.tar")


def test_a_brace_range_may_name_directories(places: Path, tmp_path: Path) -> None:
    write_shard(tmp_path / "e" / "z.tar", [("k", {"txt": b"z"})])
    assert names(f"{tmp_path}/{{d,e}}") == ["x-000000", "x-000001", "x-000002", "y", "z"]


def test_a_name_with_braces_or_stars_is_a_name_first(tmp_path: Path) -> None:
    for name in ("a{b", "c{0..3}", "d[1]", "e*"):
        write_shard(tmp_path / f"{name}.tar", [("k", {"txt": b""})])
        assert names(tmp_path / f"{name}.tar") == [name]


def test_a_list_names_one_place_a_line(places: Path, tmp_path: Path) -> None:
    listing = tmp_path / "list.txt"
    listing.write_text(f"# comment\n\n  {places}/y.tar  \n{places}/x-{{000000..000001}}.tar\n{places}/y.tar\n")
    assert names(f"@{listing}") == ["x-000000", "x-000001", "y"]
    for empty in ("", "\n# nothing\n\n"):
        listing.write_text(empty)
        with pytest.raises(ShardListError, match="lists no shards"):
            list_shards(f"@{listing}")
    listing.write_bytes(b"\xff\xfe")
    for unreadable in (listing, tmp_path / "absent.txt", tmp_path):
        with pytest.raises(ShardListError, match="can't read this list"):
            list_shards(f"@{unreadable}")


def test_what_is_missing_is_an_error(places: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for spec, said in (
        (tmp_path / "empty", "no \\*.tar in this directory"),
        (tmp_path / "absent", "no such shard"),
        (f"{places}/z*.tar", "nothing matches it as a glob"),
        (f"{places}/x-{{000000..000005}}.tar", r"3 of 6 shards are missing, the first is .*x-000003\.tar"),
        (f"{places}/x-{{000000..000005.tar", "braces don't match up"),
        ([], "no shards given"),
        ("", "an empty text"),
        ([str(places), ""], "an empty text"),
    ):
        with pytest.raises(ShardListError, match=said):
            list_shards(spec)
    with pytest.raises(StorageError, match="no storage of this kind"):
        list_shards("ftp://host/x-{000000..000001}.tar")


def test_a_link_to_nothing_is_not_passed_over(places: Path) -> None:
    """Under a glob a dangling link used to be no shard at all."""
    (places / "x-000003.tar").symlink_to(places / "gone.tar")
    assert "x-000003" in names(f"{places}/x-*.tar")
    assert "x-000003" in names(places)
    with pytest.raises(StorageError, match="No such file"):
        ours(places / "x-000003.tar")


def test_one_file_named_twice_is_one_shard(places: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "y.tar").symlink_to(places / "y.tar")
    assert names([places / "y.tar", f"{places}/y*.tar", f"{places}/../d/y.tar", other / "y.tar"]) == ["y"]


def test_a_file_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    """It ended in a traceback when its part was to be named."""
    shard_file = os.path.join(os.fsencode(tmp_path), b"caf\xe9.tar")
    with open(shard_file, "wb") as file:
        file.write(bytes(1024))
    with pytest.raises(ShardListError, match=r"caf\\xe9\.tar'?: this file name is not UTF-8"):
        list_shards(tmp_path)


def test_two_shards_of_one_name_are_refused(places: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "y.tar"
    write_shard(other, [("k", {"txt": b""})])
    with pytest.raises(ShardListError, match="two shards are named 'y'") as caught:
        list_shards([places, other])
    assert str(other) in str(caught.value)
    assert str(places / "y.tar") in str(caught.value)


def test_slices_are_disjoint_and_complete() -> None:
    shards = [Shard(f"s{index:02d}", f"/s{index:02d}.tar") for index in range(11)]
    assert slice_shards(shards, None) == shards
    assert slice_shards(shards, "0/1") == shards
    for count in range(1, 12):
        parts = [slice_shards(shards, f"{index}/{count}") for index in range(count)]
        assert sorted((shard for part in parts for shard in part), key=lambda shard: shard.name) == shards
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for wrong in ("1", "1/", "/2", "2/2", "-1/2", "0/0", "a/b", "1/2/3", "", " 0/2", "0.5/2"):
        with pytest.raises(ShardListError, match="write i/n"):
            slice_shards(shards, wrong)
    with pytest.raises(ShardListError, match="there are only 11 shards"):
        slice_shards(shards, "11/12")
