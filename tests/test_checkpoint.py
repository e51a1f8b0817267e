"""Models as directories: what they are doesn't depend on where they lie, and damage is seen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from small_models import CPU, named_model

from pseudolabel.checkpoint import ModelCard, load_model, save_model
from pseudolabel.errors import DamagedModel
from pseudolabel.labeling.work import identify
from pseudolabel.settings import AnnotateSettings
from pseudolabel.teachers import parse_teacher
from pseudolabel.views.image import square

Damage = Callable[[Path], None]


def test_a_checkpoints_identity_is_its_content_not_its_path(tmp_path: Path, teacher_dir: Path) -> None:
    moved = shutil.copytree(teacher_dir, tmp_path / "moved")
    loaded, again = (parse_teacher(f"checkpoint:{path}").load(CPU) for path in (teacher_dir, moved))
    settings = AnnotateSettings(precision="fp32")
    assert loaded.identity == again.identity
    assert identify(loaded, settings).fingerprint == identify(again, settings).fingerprint
    other = parse_teacher(f"checkpoint:{make_model(tmp_path / 'other', seed=1)}").load(CPU)
    renamed = parse_teacher(named_model(tmp_path / "renamed", ("a", "b", "c", "d"))).load(CPU)
    fingerprints = {identify(one, settings).fingerprint for one in (loaded, other, renamed)}
    assert len(fingerprints) == 3
    assert loaded.identity["weights_sha256"] == renamed.identity["weights_sha256"] != other.identity["weights_sha256"]


def test_a_model_reads_back_as_it_was_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    card = ModelCard("small:resnet14?width=4&stem_stride=2", ("cat", "d\u00f6g"), square(16, 3))
    body = card.build()
    save_model(tmp_path / "m", card, body)
    loaded = load_model(tmp_path / "m", CPU)
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    with torch.inference_mode():
        wanted = body.eval()((pixels.float() / 255 - 0.5) / 0.5)
    torch.testing.assert_close(loaded.logits((pixels,)), wanted)
    assert (loaded.classes, loaded.preprocessing) == (card.classes, card.preprocessing)
    assert not loaded.model.training


def _cut(name: str, keep: float) -> Damage:
    def damage(directory: Path) -> None:
        content = (directory / name).read_bytes()
        (directory / name).write_bytes(content[: int(keep * len(content))])

    return damage


def _edit(**changes: Any) -> Damage:
    """Change fields of model.json, and leave all else as it is; None removes a field."""

    def damage(directory: Path) -> None:
        data = json.loads((directory / "model.json").read_text()) | changes
        data = {name: value for name, value in data.items() if value is not None}
        (directory / "model.json").write_text(json.dumps(data, indent=1))

    return damage


def _swap_weights(directory: Path) -> None:
    other = make_model(directory.parent / "other", seed=5)
    shutil.copyfile(other / "model.safetensors", directory / "model.safetensors")


DAMAGES: dict[str, Damage] = {
    "no card": lambda directory: (directory / "model.json").unlink(),
    "no weights": lambda directory: (directory / "model.safetensors").unlink(),
    "nothing at all": shutil.rmtree,
    **{f"weights cut to {keep}": _cut("model.safetensors", keep) for keep in (0, 0.001, 0.2, 0.99)},
    **{f"card cut to {keep}": _cut("model.json", keep) for keep in (0, 0.5, 0.99)},
    "card is a list": lambda directory: (directory / "model.json").write_text("[]") and None,
    "card is no text": lambda directory: (directory / "model.json").write_bytes(b"\xff\xfe\0") and None,
    "weights of another model": _swap_weights,
    "width edited": _edit(student="small:resnet8?width=8"),
    "depth edited": _edit(student="small:resnet9?width=4"),
    "class renamed": _edit(classes=["class 0", "class 1", "class 2", "class three"]),
    "classes swapped": _edit(classes=["class 1", "class 0", "class 2", "class 3"]),
    "class dropped": _edit(classes=["class 0", "class 1", "class 2"]),
    "mean edited": _edit(preprocessing={**square(12, 1).to_json(), "mean": [0.25]}),
    "size edited": _edit(preprocessing={**square(12, 1).to_json(), "crop": 10}),
    "no preprocessing": _edit(preprocessing=None),
    "hash edited": _edit(weights_sha256="0" * 64),
    "version edited": _edit(format_version=2),
    "field added": _edit(note="mine"),
    "field removed": _edit(parameters=None),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_model_is_refused_by_name(teacher_dir: Path, damage: Damage) -> None:
    """A class renamed or a mean changed by hand leaves the weights whole: the card has a hash of its own."""
    damage(teacher_dir)
    with pytest.raises(DamagedModel) as caught:
        parse_teacher(f"checkpoint:{teacher_dir}").load(CPU)
    message = str(caught.value)
    assert str(teacher_dir) in message
    assert len(message.splitlines()) <= 5
    assert any(word in message for word in ("train again", "restore", "pseudolabel train"))


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
def test_no_flipped_bit_goes_unseen(tmp_path: Path, name: str) -> None:
    """Any byte, one bit: refused as damage, or without any effect (a space that became a tab)."""
    directory = make_model(tmp_path / "model", student="small:resnet8?width=1")
    whole = load_model(directory, CPU)
    content = (directory / name).read_bytes()
    generator = torch.Generator().manual_seed(0)
    header = 8 + int.from_bytes(content[:8], "little") if name == "model.safetensors" else len(content)
    places = [
        *range(0, header, 1 + header // 150),
        *torch.randint(0, len(content), (30,), generator=generator).tolist(),
    ]
    refused = 0
    for place, bit in zip(places, torch.randint(0, 8, (len(places),), generator=generator).tolist(), strict=True):
        flipped = bytearray(content)
        flipped[place] ^= 1 << bit
        (directory / name).write_bytes(flipped)
        try:
            found = load_model(directory, CPU)
        except DamagedModel:
            refused += 1
        else:
            assert (found.identity, found.classes) == (whole.identity, whole.classes), (place, bit)
    assert refused > 0.9 * len(places)


def test_a_card_without_its_hash_is_refused(tmp_path: Path) -> None:
    model = make_model(tmp_path / "teacher")
    card = json.loads((model / "model.json").read_text())
    del card["card_sha256"]
    (model / "model.json").write_text(json.dumps(card))
    with pytest.raises(DamagedModel, match="card_sha256"):
        load_model(model, torch.device("cpu"))


def test_a_module_that_goes_by_two_names_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors takes no tensors that share memory: a training ended so after its last step."""
    (tmp_path / "twice_named.py").write_text(
        "from torch import nn\n\nclass Twice(nn.Module):\n"
        "    def __init__(self, num_classes, in_channels):\n"
        "        super().__init__()\n"
        "        self.head = nn.Linear(64 * in_channels, num_classes)\n"
        "        self.body = nn.Sequential(nn.Flatten(), self.head)\n\n"
        "    def forward(self, x):\n        return self.body(x)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    card = ModelCard("python:twice_named:Twice", ("a", "b"), square(8, 1))
    body = card.build()
    save_model(tmp_path / "m", card, body)
    loaded = load_model(tmp_path / "m", CPU, trust_code=True)
    pixels = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8)
    torch.testing.assert_close(loaded.logits((pixels,)), body.eval()((pixels.float() / 255 - 0.5) / 0.5))
