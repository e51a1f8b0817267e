"""Packing: every image of every kind of source arrives once, byte for byte, with its label where it keeps one."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import struct
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from pseudolabel.errors import OutputExists, SourceError, StorageError
from pseudolabel.pack import PackResult, pack, split_items
from pseudolabel.shard_lists import list_shards
from pseudolabel.shards import Sample, read_samples
from pseudolabel.sources import Item, read_source
from pseudolabel.views.image import decode, image_field


def image(number: int, kind: str = "PNG") -> bytes:
    """A small image that no other number has."""
    buffer = io.BytesIO()
    pixels = np.array([[number % 256, number // 256], [7, 9]], dtype=np.uint8)
    Image.fromarray(pixels).resize((8, 8), Image.Resampling.NEAREST).save(buffer, kind)
    return buffer.getvalue()


def place(root: Path, files: Mapping[str, bytes]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def packed(out: Path) -> dict[str, list[Sample]]:
    """Every split's samples, read back strictly; keys are unique over all of them."""
    found = {
        part.name: [sample for shard in list_shards(part) for sample in read_samples(shard)]
        for part in sorted(out.iterdir())
        if part.is_dir()
    }
    keys = [sample.key for samples in found.values() for sample in samples]
    assert len(set(keys)) == len(keys)
    return found


def contents(samples: Sequence[Sample]) -> dict[str, tuple[bytes, str | None]]:
    """Key → image bytes and label."""
    return {
        one.key: (one.fields[image_field(one.fields)], one.fields["cls"].decode() if "cls" in one.fields else None)
        for one in samples
    }


def tree(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def refused(source: Path, said: str, out: Path | None = None, **options: Any) -> None:
    """Packing fails with `SourceError`, and leaves no shard behind."""
    out = out or source.parent / "refused"
    with pytest.raises(SourceError, match=said) as caught:
        pack(source, out, **options)
    assert 1 <= len(str(caught.value).splitlines()) <= 5
    assert not list(out.rglob("*.tar"))


# ---------------------------------------------------------------------------------- image folders

FOLDER = {
    "cat/one.png": image(0),
    "cat/two.JPG": image(1, "JPEG"),
    "cat/x.jpg": image(2, "JPEG"),
    "cat/x.png": image(3),
    "cat/deeper/still/three.webp": image(4, "WEBP"),
    "a dog.v2/four.five.png": image(5),
    "a dog.v2/with space.png": image(6),
    "été/鍵.png": image(7),
    "été/__six__.png": image(8),
    "__meta__/seven.png": image(9),
    "____meta____/eight.png": image(10),
    "png/jpg.bmp": image(11, "BMP"),
}
NO_IMAGES = {
    "cat/notes.txt": b"text",
    "cat/png": b"a name, no extension",
    "cat/.hidden.png": b"hidden",
    ".thumbnails/one.png": b"a hidden folder",
    "cat/.cache/one.png": b"a hidden folder",
    "README": b"text",
}


def test_a_folder_a_class(tmp_path: Path) -> None:
    source = place(tmp_path / "source", FOLDER | NO_IMAGES)
    result = pack(source, tmp_path / "out")
    classes = ("____meta____", "__meta__", "a dog.v2", "cat", "png", "été")
    assert result == PackResult(str(tmp_path / "out"), {"labeled": 12}, 1, classes)
    assert (tmp_path / "out" / "classes.txt").read_text() == "".join(f"{one}\n" for one in classes)
    found = packed(tmp_path / "out")
    assert list(found) == ["labeled"]
    wanted = Counter((data, str(classes.index(name.split("/")[0]))) for name, data in FOLDER.items())
    assert Counter(contents(found["labeled"]).values()) == wanted
    keys = {sample.key: set(sample.fields) for sample in found["labeled"]}
    assert keys["cat/x"] == {"jpg", "cls"}
    assert keys["cat/x~2"] == {"png", "cls"}
    assert keys["cat/two"] == {"jpg", "cls"}
    assert keys["a dog%2Ev2/four%2Efive"] == {"png", "cls"}
    assert keys["cat/deeper/still/three"] == {"webp", "cls"}
    assert "été/鍵" in keys
    assert all(decode(data).ndim == 3 for data, _ in contents(found["labeled"]).values())


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    files = {"b.png": image(0), "a.jpg": image(1, "JPEG"), "a.png": image(2), "A.png": image(3)}
    result = pack(place(tmp_path / "source", files), tmp_path / "out")
    assert (result.samples, result.classes) == ({"unlabeled": 4}, ())
    assert contents(packed(tmp_path / "out")["unlabeled"]) == {
        "b": (image(0), None),
        "a": (image(1, "JPEG"), None),
        "a~2": (image(2), None),
        "A": (image(3), None),
    }
    assert (tmp_path / "out" / "classes.txt").read_text() == ""
    refused(tmp_path / "source", "has no labels", labels_per_class=1)
    refused(tmp_path / "source", "has no labels", val_fraction=0.5)


def test_a_second_name_is_nobody_elses(tmp_path: Path) -> None:
    """`x~2` used to be given to the second `x` though a file had that name: a shard that can't be read."""
    files = {name: image(number) for number, name in enumerate(("x.gif", "x.jpg", "x.png", "x~2.png", "x~3~2.png"))}
    files |= {"x~2.jpg": image(9), "x_.png": image(10), "x__.png": image(11), "x___.png": image(12)}
    pack(place(tmp_path / "source", files), tmp_path / "out")
    found = contents(packed(tmp_path / "out")["unlabeled"])
    assert sorted(data for data, _ in found.values()) == sorted(files.values())
    assert {"x", "x~2", "x~3", "x~4", "x~3~2", "x_", "x_~2", "x_~3"} < set(found)


def test_linked_folders_are_followed_and_loops_refused(tmp_path: Path) -> None:
    """A class that is a link to a folder used to be left out in silence."""
    elsewhere = place(tmp_path / "elsewhere", {"one.png": image(1)})
    source = place(tmp_path / "source", {"cat/zero.png": image(0)})
    (source / "dog").symlink_to(elsewhere, target_is_directory=True)
    (source / "cat" / "two.png").symlink_to(place(tmp_path / "files", {"two": image(2)}) / "two")
    assert pack(source, tmp_path / "out").classes == ("cat", "dog")
    assert contents(packed(tmp_path / "out")["labeled"]) == {
        "cat/zero": (image(0), "0"),
        "cat/two": (image(2), "0"),
        "dog/one": (image(1), "1"),
    }
    (elsewhere / "back").symlink_to(source, target_is_directory=True)
    refused(source, "leads back to a folder above it")


def test_what_can_not_be_read_is_an_error_not_a_smaller_data_set(tmp_path: Path) -> None:
    source = place(tmp_path / "source", {"cat/zero.png": image(0)})
    (source / "cat" / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    refused(source, "dangling.png: can't be read: No such file")
    (source / "cat" / "dangling.png").unlink()
    if os.getuid() != 0:  # root may read everything
        (source / "cat").chmod(0)
        refused(source, "this folder can't be read")
        (source / "cat").chmod(0o755)
    Path(os.fsdecode(os.fsencode(source) + b"/cat/caf\xe9.png")).write_bytes(image(1))
    refused(source, r"caf\\xe9.*not UTF-8")


def test_folders_that_are_no_data_set(tmp_path: Path) -> None:
    mixed = place(tmp_path / "mixed", {"loose.png": image(0), "cat/one.png": image(1)})
    refused(mixed, r"class folders and loose images \(loose\.png")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no images")
    refused(place(tmp_path / "texts", {"a/b.txt": b"text", "jpg": b"text"}), "no images")
    refused(tmp_path / "absent", "no such file or directory")
    refused(place(tmp_path / "notes", {"notes.txt": b""}) / "notes.txt", "not an image folder")
    refused(place(tmp_path / "lines", {"two\nlines/a.png": image(0)}), "won't fit on a line of classes.txt")
    refused(place(tmp_path / "spaces", {" padded /a.png": image(0)}), "won't fit on a line of classes.txt")
    with pytest.raises(StorageError, match="only local paths"):
        pack("s3://bucket/images", tmp_path / "out")


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


# ---------------------------------------------------------------------------------- IDX


def idx(path: Path, values: NDArray[np.uint8], kind: int = 8) -> Path:
    header = struct.pack(">HBB", 0, kind, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
    data = header + values.tobytes()
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return path


PIXELS = np.random.default_rng(0).integers(0, 256, (7, 5, 6), dtype=np.uint8)
LABELS = np.array([0, 3, 1, 1, 0, 3, 9], dtype=np.uint8)


@pytest.mark.parametrize("end", ["-ubyte", "-ubyte.gz"])
@pytest.mark.parametrize("by_folder", [True, False])
def test_idx_with_labels(end: str, by_folder: bool, tmp_path: Path) -> None:
    images = idx(tmp_path / "mnist" / f"train-images-idx3{end}", PIXELS)
    idx(tmp_path / "mnist" / f"train-labels-idx1{end}", LABELS)
    result = pack(tmp_path / "mnist" if by_folder else images, tmp_path / "out")
    assert (result.samples, result.classes) == ({"labeled": 7}, tuple("0123456789"))
    found = contents(packed(tmp_path / "out")["labeled"])
    for number in range(7):
        data, label = found[f"{number:07d}"]
        assert label == str(LABELS[number])
        assert np.array_equal(decode(data)[0].numpy(), PIXELS[number])


def test_idx_without_labels(tmp_path: Path) -> None:
    result = pack(idx(tmp_path / "mnist" / "images.idx3-ubyte", PIXELS), tmp_path / "out")
    assert (result.samples, result.classes) == ({"unlabeled": 7}, ())
    assert {label for _, label in contents(packed(tmp_path / "out")["unlabeled"]).values()} == {None}


def test_idx_mistakes_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "mnist"
    images, labels = folder / "train-images-idx3-ubyte.gz", folder / "train-labels-idx1-ubyte.gz"
    idx(images, PIXELS)
    refused(idx(labels, LABELS), "not an IDX file of unsigned bytes with 3 dimensions")
    idx(labels, LABELS[:5])
    refused(images, "5 labels for 7 images")
    idx(labels, PIXELS)
    refused(images, "with 1 dimensions")
    idx(labels, LABELS)
    idx(folder / "test-images-idx3-ubyte", PIXELS)
    refused(folder, r"several IDX image files \(test-images-idx3-ubyte, train-images-idx3-ubyte.gz\)")
    plain = folder / "test-images-idx3-ubyte"
    for empty in (PIXELS[:0], PIXELS[:, :0], PIXELS[:, :, :0]):
        refused(idx(plain, empty), "is empty")
    refused(idx(plain, PIXELS, kind=0x0D), "not an IDX file")
    plain.write_bytes(b"\x89PNG" + bytes(100))
    refused(plain, "not an IDX file")
    plain.write_bytes(struct.pack(">HBB", 0, 8, 3) + b"\xff" * 12)
    refused(plain, r"0 bytes for a shape of \(4294967295, 4294967295, 4294967295\)")


@pytest.mark.parametrize("end", ["-ubyte", "-ubyte.gz"])
def test_a_cut_or_spoiled_idx_is_refused(end: str, tmp_path: Path) -> None:
    path = idx(tmp_path / "mnist" / f"train-images-idx3{end}", PIXELS)
    data = path.read_bytes()
    for length in range(0, len(data), 3):
        path.write_bytes(data[:length])
        with pytest.raises(SourceError):
            read_source(path)
    path.write_bytes(data + b"more")
    with pytest.raises(SourceError):
        read_source(path)
    if end.endswith(".gz"):  # a flipped bit in deflated data is zlib's own kind of error
        for place in range(10, len(data), 7):
            path.write_bytes(data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :])
            with pytest.raises(SourceError):
                read_source(path)


# ---------------------------------------------------------------------------------- the split


def items(*counts: int, unlabeled: int = 0) -> list[Item]:
    labels = [label for label, count in enumerate(counts) for _ in range(count)] + [None] * unlabeled
    return [Item(f"{number}", label, lambda: ("png", b"")) for number, label in enumerate(labels)]


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=5),
    st.integers(0, 5),
    st.sampled_from([0.0, 0.1, 0.25, 0.5]),
    st.sampled_from([0.0, 0.2, 0.5]),
    st.sampled_from([None, 0, 1, 2]),
    st.integers(0, 3),
)
def test_splits_are_stratified_disjoint_and_complete(
    counts: list[int], unlabeled: int, val: float, test: float, kept: int | None, seed: int
) -> None:
    source = items(*counts, unlabeled=unlabeled)
    in_val = [round(count * val) for count in counts]
    in_test = [min(round(count * test), count - part) for count, part in zip(counts, in_val, strict=True)]
    left = [count - one - other for count, one, other in zip(counts, in_val, in_test, strict=True)]
    if kept is not None and min(left) < kept:
        with pytest.raises(SourceError, match=f"fewer than --labels-per-class {kept}"):
            split_items(source, kept, val, test, seed)
        return
    split = split_items(source, kept, val, test, seed)
    assert sorted(int(item.key) for part in split.values() for item in part) == list(range(len(source)))
    assert all(split.values())

    def by_class(part: str) -> list[int]:
        found = Counter(item.label for item in split.get(part, []))
        return [found[label] for label in range(len(counts))]

    assert by_class("val") == in_val
    assert by_class("test") == in_test
    assert by_class("labeled") == (left if kept is None else [kept] * len(counts))
    assert sum(by_class("unlabeled")) + unlabeled == len(split.get("unlabeled", []))


def test_the_seed_decides_the_split_and_the_order() -> None:
    source = items(30, 30)
    first = split_items(source, 5, 0.2, 0.1, 1)
    assert split_items(source, 5, 0.2, 0.1, 1) == first
    other = split_items(source, 5, 0.2, 0.1, 2)
    for part, chosen in first.items():
        assert {item.key for item in chosen} != {item.key for item in other[part]}
        assert [item.key for item in chosen] != sorted((item.key for item in chosen), key=int)  # shuffled
    assert {item.label for item in first["labeled"][:5]} == {0, 1}  # classes don't lie one after the other


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"val_fraction": -0.1}, "each must lie in"),
        ({"test_fraction": 1.1}, "each must lie in"),
        ({"val_fraction": 0.6, "test_fraction": 0.6}, "each must lie in"),
        ({"val_fraction": float("nan")}, "each must lie in"),
        ({"test_fraction": float("inf")}, "each must lie in"),
        ({"labels_per_class": -1}, "can't be below 0"),
        ({"labels_per_class": 7}, "class a has 6 images after val and test, fewer than --labels-per-class 7"),
        ({"labels_per_class": 6, "val_fraction": 0.5}, "class a has 3 images after val and test"),
        ({"samples_per_shard": 0}, "samples per shard is 0"),
        ({"samples_per_shard": -5}, "samples per shard is -5"),
        ({"name": "a/b"}, "can't begin a shard's name"),
        ({"name": ".hidden"}, "can't begin a shard's name"),
    ],
    ids=str,
)
def test_nonsense_is_refused_before_anything_is_written(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    source = place(
        tmp_path / "source", {f"{label}/{number}.png": image(number) for label in "ab" for number in range(6)}
    )
    refused(source, said, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def two_classes(tmp_path: Path) -> Path:
    files = {
        f"{name}/{number}.png": image(100 * place + number) for place, name in enumerate("ab") for number in range(20)
    }
    return place(tmp_path / "source", files)


def test_what_is_packed_and_under_which_names(two_classes: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options: dict[str, Any] = {"labels_per_class": 3, "val_fraction": 0.2, "test_fraction": 0.1, "seed": 7}
    result = pack(two_classes, out, **options, samples_per_shard=4, name="pets")
    assert result.samples == {"labeled": 6, "unlabeled": 22, "val": 8, "test": 4}
    assert result.shards == 2 + 6 + 2 + 1
    assert sorted(tree(out)) == sorted(
        [f"labeled/pets-labeled-{number:06d}.tar" for number in range(2)]
        + [f"unlabeled/pets-unlabeled-{number:06d}.tar" for number in range(6)]
        + [f"val/pets-val-{number:06d}.tar" for number in range(2)]
        + ["test/pets-test-000000.tar", "classes.txt", "dataset.json"]
    )
    sizes = [len(list(read_samples(shard))) for shard in list_shards(out / "unlabeled")]
    assert sizes == [4, 4, 4, 4, 4, 2]
    found = packed(out)
    assert all("cls" not in sample.fields for sample in found["unlabeled"])
    for part in ("labeled", "val", "test"):
        for key, (data, label) in contents(found[part]).items():
            folder, number = key.split("/")
            assert label == str("ab".index(folder))
            assert data == image(100 * "ab".index(folder) + int(number))
    every = {key for samples in found.values() for key in contents(samples)}
    assert every == {f"{name}/{number}" for name in "ab" for number in range(20)}
    described = json.loads((out / "dataset.json").read_text())
    assert described["samples"] == dict(result.samples)
    assert described["classes"] == ["a", "b"]
    assert {name: described[name] for name in options} == options
    assert str(tmp_path) not in json.dumps(described)


def test_equal_seeds_give_equal_bytes(two_classes: Path, tmp_path: Path) -> None:
    def made(name: str, seed: int) -> dict[str, bytes]:
        pack(two_classes, tmp_path / name, labels_per_class=5, val_fraction=0.1, seed=seed, samples_per_shard=7)
        return tree(tmp_path / name)

    first = made("first", 3)
    assert made("again", 3) == first
    other = made("other", 4)
    assert other.keys() == first.keys()
    assert all(other[name] != first[name] for name in first if name != "classes.txt")
    assert other["classes.txt"] == first["classes.txt"] == b"a\nb\n"


# ---------------------------------------------------------------------------------- what was there before


def test_a_data_set_is_replaced_only_when_asked(two_classes: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(two_classes, out, samples_per_shard=3)
    before = tree(out)
    with pytest.raises(OutputExists, match="--overwrite"):
        pack(two_classes, out)
    assert tree(out) == before
    place(out, {"notes.txt": b"mine", "labeled/mine.txt": b"mine"})
    pack(two_classes, out, val_fraction=0.5, overwrite=True)
    assert sorted(tree(out)) == [
        "classes.txt",
        "dataset.json",
        "labeled/labeled-000000.tar",
        "labeled/mine.txt",
        "notes.txt",
        "val/val-000000.tar",
    ]
    assert sum(map(len, packed_splits(out).values())) == 40
    for marker in ("dataset.json", "labeled/labeled-000000.tar"):
        half = place(tmp_path / marker.replace("/", "-"), {marker: b""})
        with pytest.raises(OutputExists):
            pack(two_classes, half)


def packed_splits(out: Path) -> dict[str, list[Sample]]:
    return {name: samples for name, samples in packed(out).items() if samples}


def test_an_overwrite_that_fails_loses_nothing(two_classes: Path, tmp_path: Path) -> None:
    """The old shards used to be deleted before the first new image was read."""
    out = tmp_path / "out"
    pack(two_classes, out)
    before = tree(out)
    (two_classes / "b" / "9.png").unlink()
    (two_classes / "b" / "9.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(SourceError, match=r"9\.png: can't be read"):
        pack(two_classes, out, samples_per_shard=2, overwrite=True)
    assert tree(out) == before
    with pytest.raises(SourceError, match="fewer than"):
        pack(two_classes, out, labels_per_class=1000, overwrite=True)
    assert tree(out) == before


def test_a_failed_or_killed_pack_does_not_block_the_next(two_classes: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (two_classes / "b" / "torn.png").symlink_to(tmp_path / "nowhere")
    refused(two_classes, r"torn\.png", out)
    assert tree(out) == {}
    (two_classes / "b" / "torn.png").unlink()
    place(out, {".packing/labeled/labeled-000007.tar": b"of a killed process"})
    pack(two_classes, out)
    assert sorted(tree(out)) == ["classes.txt", "dataset.json", "labeled/labeled-000000.tar"]


def test_a_place_that_can_not_be_written_is_a_storage_error(two_classes: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="failed"):
        pack(two_classes, tmp_path / "file" / "out")


def test_items_are_read_late(two_classes: Path) -> None:
    """Listing a source opens no image, so a corpus needs no memory."""
    source = read_source(two_classes)
    (two_classes / "a" / "0.png").write_bytes(b"changed since")
    read: Callable[[], tuple[str, bytes]] = next(item.read for item in source.items if item.key == "a/0")
    assert read() == ("png", b"changed since")
