"""What pack can read: tables of images and labels, in CSV and Parquet files."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from packing import contents, image, packed, place, refused

from pseudolabel.errors import OutputExists, SourceError
from pseudolabel.pack import pack
from pseudolabel.sources import read_source
from pseudolabel.views.image import image_field

# ---------------------------------------------------------------------------------- CSV


def table(path: Path, *rows: Sequence[object], encoding: str = "utf-8", delimiter: str = ",") -> Path:
    with open(path, "w", newline="", encoding=encoding) as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    names = ("a", "b", "c", "d.e")
    place(tmp_path, {f"pictures/{name}.png": image(number) for number, name in enumerate(names)})
    return tmp_path


@pytest.mark.parametrize(
    ("values", "labels", "classes"),
    [
        (["0", "2", "0", "1"], ["0", "2", "0", "1"], ("0", "1", "2")),
        (["5", "", "0", ""], ["5", None, "0", None], ("0", "1", "2", "3", "4", "5")),
        (["dog", "cat", "été", "dog"], ["1", "0", "2", "1"], ("cat", "dog", "été")),
        (["10", "9", "x", ""], ["0", "1", "2", None], ("10", "9", "x")),
        (["", "", "", ""], [None] * 4, ()),
    ],
    ids=["numbers", "some empty", "names", "names and numbers", "all empty"],
)
def test_csv_labels(
    values: list[str], labels: list[str | None], classes: tuple[str, ...], pictures: Path, tmp_path: Path
) -> None:
    rows = [(f"pictures/{name}.png", value) for name, value in zip(("a", "b", "c", "d.e"), values, strict=True)]
    result = pack(table(pictures / "t.csv", ("path", "label"), *rows), tmp_path / "out")
    assert result.classes == classes
    found = contents([sample for samples in packed(tmp_path / "out").values() for sample in samples])
    keys = ("pictures/a", "pictures/b", "pictures/c", "pictures/d%2Ee")
    assert found == {key: (image(number), labels[number]) for number, key in enumerate(keys)}
    assert result.samples.get("unlabeled", 0) == labels.count(None)


def test_check_names_the_images_that_can_not_be_decoded(tmp_path: Path) -> None:
    place(tmp_path / "photos", {"a/good.png": image(0), "a/torn.png": image(1)[:50], "b/text.jpg": b"no image"})
    with pytest.raises(
        SourceError, match=r"^2 of 3 images can't be decoded; remove.*\n  a/torn: .*\n  b/text: these 8"
    ):
        pack(tmp_path / "photos", tmp_path / "out", check=True)
    assert not (tmp_path / "out").exists()
    assert pack(tmp_path / "photos", tmp_path / "out").samples == {"labeled": 3}


def test_numbers_as_python_writes_them_are_names(pictures: Path, tmp_path: Path) -> None:
    """1_0 was taken for class 10."""
    path = table(pictures / "t.csv", ("path", "label"), ("pictures/a.png", "1_0"), ("pictures/b.png", "2_1"))
    assert pack(path, tmp_path / "out").classes == ("1_0", "2_1")


def test_a_users_class_names_are_not_replaced(tmp_path: Path) -> None:
    place(tmp_path / "photos", {"a/x.png": image(0)})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "classes.txt").write_text("mine\n")
    with pytest.raises(OutputExists, match="holds shards already"):
        pack(tmp_path / "photos", tmp_path / "out")
    assert (tmp_path / "out" / "classes.txt").read_text() == "mine\n"


def test_killed_while_it_publishes_the_same_command_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of its shards were there, and the same command refused to touch them."""
    place(tmp_path / "photos", {f"a/{number}.png": image(number) for number in range(6)})
    rename, renamed = Path.rename, []

    def dies(self: Path, target: Path) -> Path:
        if len(renamed) == 3:
            raise KeyboardInterrupt
        renamed.append(target)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", dies)
    with pytest.raises(KeyboardInterrupt):
        pack(tmp_path / "photos", tmp_path / "out", samples_per_shard=1)
    monkeypatch.undo()
    assert len(list((tmp_path / "out" / "labeled").iterdir())) == 3
    pack(tmp_path / "photos", tmp_path / "out", samples_per_shard=1)
    assert len(list((tmp_path / "out" / "labeled").iterdir())) == 6
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"labeled", "classes.txt", "dataset.json"}
    with pytest.raises(OutputExists):
        pack(tmp_path / "photos", tmp_path / "out", samples_per_shard=1)


def test_csv_whose_labels_go_by_another_name_says_so(pictures: Path, tmp_path: Path) -> None:
    """They were packed as unlabeled without a word."""
    path = table(pictures / "t.csv", ("path", "kind"), ("pictures/a.png", "cat"), ("pictures/b.png", "dog"))
    with pytest.warns(UserWarning, match="packed without labels; if one of kind holds them, name it with --label-col"):
        assert pack(path, tmp_path / "out").samples == {"unlabeled": 2}
    assert pack(path, tmp_path / "named", label_column="kind").samples == {"labeled": 2}


def test_csv_from_a_spreadsheet(pictures: Path, tmp_path: Path) -> None:
    """A byte order mark, semicolons no, tabs yes, quoted commas, absolute paths, one file twice, other columns."""
    rows = [
        ("id", "file_name", "note", "class"),
        (1, "pictures/a.png", "with, comma", "cat"),
        (2, pictures / "pictures" / "b.png", 'with "quotes"', "dog"),
        (3, "pictures/a.png", "two\nlines", "dog"),
    ]
    for name, delimiter in (("t.csv", ","), ("t.tsv", "\t"), ("T.CSV", ",")):
        path = table(pictures / name, *rows, encoding="utf-8-sig", delimiter=delimiter)
        out = tmp_path / f"out-{name}"
        assert pack(path, out).classes == ("cat", "dog")
        found = contents(packed(out)["labeled"])
        absolute = str(pictures / "pictures" / "b").lstrip("/").replace(".", "%2E").replace("__", "_")
        assert found == {
            "pictures/a": (image(0), "0"),
            absolute: (image(1), "1"),
            "pictures/a~2": (image(0), "1"),
        }


def test_csv_columns_are_named_or_found(pictures: Path, tmp_path: Path) -> None:
    path = table(pictures / "t.csv", ("where", "path", "what", "label"), ("pictures/a.png", "absent.png", "cat", "7"))
    refused(path, "absent.png: can't be read: No such file")
    pack(path, tmp_path / "out", image_column="where", label_column="what")
    assert contents(packed(tmp_path / "out")["labeled"]) == {"pictures/a": (image(0), "0")}
    refused(path, "no column 'picture' for the image; it has where, path, what, label", image_column="picture")
    refused(path, "no column 'kind' for the label", label_column="kind")
    refused(table(pictures / "u.csv", ("where", "what"), ("pictures/a.png", "cat")), "--image-column")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("path,label\npictures/a.png,1\npictures/b.png\n", "line 3 has another number of fields than the header's 2"),
        ("path,label\npictures/a.png,1,extra\n", "line 2 has another number of fields"),
        ('path,label\n"pictures/a.png,1\n', "can't be read as CSV"),
        ("path,label\n", "has no rows"),
        ("", "--image-column"),
        ("path,label\npictures/absent.png,1\n", "pictures/absent.png: can't be read: No such file"),
        ("path,label\npictures,1\n", "'pictures' is no image file"),
        ("path,label\n,1\n", "row 0 names no image"),
        ("path,label\npictures/a.png,-1\n", "a label is -1"),
        ("path,label\npictures/a.png,1700000000\n", "are these ids"),
        ("path,label\npictures/a.png,two words \n", "won't fit on a line"),
        ('path,label\npictures/a.png,"two\nlines"\n', "won't fit on a line"),
        ("path,label\npictures/\0.png,1\n", "can't be read"),
        (f"path,label\npictures/{'x' * 300}.png,1\n", "File name too long"),
    ],
)
def test_csv_mistakes_are_named(text: str, said: str, pictures: Path) -> None:
    (pictures / "t.csv").write_text(text)
    refused(pictures / "t.csv", said)


def test_csv_of_another_encoding_is_refused(pictures: Path) -> None:
    (pictures / "t.csv").write_bytes("path,label\npictures/a.png,été\n".encode("latin-1"))
    refused(pictures / "t.csv", "can't be read as CSV: 'utf-8' codec")


# ---------------------------------------------------------------------------------- Parquet


def parquet(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return path


KINDS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}


@pytest.mark.parametrize("kind", ["binary", "large_binary", "struct", "dictionary"])
def test_parquet_of_bytes(kind: str, tmp_path: Path) -> None:
    """Bytes as they are, or in the {bytes, path} struct of Hugging Face's `Image` feature."""
    images = [image(number, name) for number, name in enumerate(KINDS)]
    columns: dict[str, Any] = {
        "binary": lambda: pa.array(images, pa.binary()),
        "large_binary": lambda: pa.array(images, pa.large_binary()),
        "struct": lambda: pa.array([{"bytes": one, "path": f"{number}.xyz"} for number, one in enumerate(images)]),
        "dictionary": lambda: pa.array(images, pa.binary()).dictionary_encode(),
    }
    path = parquet(tmp_path / "t.parquet", image=columns[kind](), label=pa.array([2, 0, None, 1, 2, 0], pa.int64()))
    result = pack(path, tmp_path / "out", samples_per_shard=2)
    assert (result.samples, result.shards, result.classes) == ({"labeled": 5, "unlabeled": 1}, 4, ("0", "1", "2"))
    found = packed(tmp_path / "out")
    labels = ["2", "0", None, "1", "2", "0"]
    assert contents([*found["labeled"], *found["unlabeled"]]) == {
        f"row-{number:09d}": (one, labels[number]) for number, one in enumerate(images)
    }
    fields = {one.key: image_field(one.fields) for samples in found.values() for one in samples}
    assert [fields[f"row-{number:09d}"] for number in range(6)] == list(KINDS.values())


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), "struct"], ids=str)
def test_parquet_of_paths(kind: Any, pictures: Path, tmp_path: Path) -> None:
    paths = [f"pictures/{name}.png" for name in ("a", "b", "c", "d.e")]
    column = pa.array(
        [{"bytes": None, "path": one} for one in paths] if kind == "struct" else paths,
        None if kind == "struct" else kind,
    )
    pack(parquet(pictures / "t.parquet", image=column, label=["b", "a", None, "b"]), tmp_path / "out")
    found = packed(tmp_path / "out")
    images = [(image(0), "1"), (image(1), "0"), (image(2), None), (image(3), "1")]
    assert sorted(contents([*found["labeled"], *found["unlabeled"]]).values(), key=str) == sorted(images, key=str)
    if kind != "struct":
        assert {one.key for one in found["labeled"]} == {"pictures/a", "pictures/b", "pictures/d%2Ee"}


def test_parquet_labels_of_other_types(tmp_path: Path) -> None:
    """Whole floats are numbers, NaN is no label, booleans and categories are labels."""
    images = pa.array([image(0), image(1), image(2)])
    for column, labels, classes in (
        (pa.array([1.0, float("nan"), 0.0]), ["1", None, "0"], ("0", "1")),
        (pa.array([True, False, None]), ["1", "0", None], ("0", "1")),
        (pa.array(["b", None, "a"]).dictionary_encode(), ["1", None, "0"], ("a", "b")),
        (pa.array([3, 3, 1], pa.uint8()), ["3", "3", "1"], ("0", "1", "2", "3")),
        (pa.array([None, None, None], pa.int64()), [None] * 3, ()),
    ):
        source = read_source(parquet(tmp_path / "t.parquet", image=images, label=column))
        assert [None if item.label is None else str(item.label) for item in source.items] == labels
        assert source.classes == classes
    refused(
        parquet(tmp_path / "t.parquet", image=images, label=pa.array([[1], [2], [3]])), "neither a number nor a name"
    )
    ids = parquet(tmp_path / "t.parquet", image=images, label=pa.array([1, 2, 10**12]))
    refused(ids, "a label is 1000000000000: are these ids")


def test_parquet_mistakes_are_named(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    refused(parquet(path, image=pa.array([b"no image at all"])), "row 0: these 15 bytes are no JPEG, PNG")
    refused(parquet(path, image=pa.array([image(0), b""])), "row 1: these 0 bytes")
    refused(parquet(path, image=pa.array([image(0), None])), "row 1 names no image")
    refused(parquet(path, image=pa.array([{"bytes": None, "path": None}])), "row 0 names no image")
    refused(parquet(path, image=pa.array([3, 4])), "row 0 holds a int; paths or bytes are wanted")
    refused(parquet(path, image=pa.array([[1, 2], [3, 4]])), "row 0 holds a list")
    refused(parquet(path, image=pa.array([], pa.binary())), "has no rows")
    refused(parquet(path, picture=pa.array([image(0)])), "which of the columns picture")
    path.write_bytes(path.read_bytes()[:-20])
    refused(path, "can't be read as Parquet")
    path.write_bytes(b"PAR1 is not enough")
    refused(path, "can't be read as Parquet")
