"""What pack can read: image folders, IDX files. Nothing is left out without a word."""

from __future__ import annotations

import gzip
import os
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from packing import contents, image, packed, place, refused

from pseudolabel.errors import SourceError, StorageError
from pseudolabel.pack import PackResult, pack
from pseudolabel.sources import read_source
from pseudolabel.views.image import decode

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
    with pytest.raises(StorageError, match="must be a path on this machine"):
        pack("s3://bucket/images", tmp_path / "out")


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
