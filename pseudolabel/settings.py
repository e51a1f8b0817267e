"""What decides a result, as validated values: the same fields serve flags, recipes and fingerprints. Needs no torch.

Where and how fast (device, workers, engine) is not here: it doesn't change the result. Messages name a setting in
backticks: `recipe.validate` tells it as a flag where it came as one.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]


def _number(value: object) -> object:
    """As a flag's text gives it."""
    return int(value) if isinstance(value, str) and value.isascii() and value.isdecimal() else value


def _check_batch_size(value: object) -> object:
    number = _number(value)
    if number not in (None, "auto") and (type(number) is not int or number < 1):
        raise ValueError("must be a whole number from 1, or auto")
    return number


def _check_replay(value: object) -> object:
    number = _number(value)
    if number not in (None, "all") and (type(number) is not int or number < 1):
        raise ValueError("must be a number of views from 1, or all")
    return number


def _check_balance(value: object) -> object:
    number = _number(value)
    if number not in (None, "mean") and (type(number) is not int or not 1 <= number < 1 << 62):
        raise ValueError("must be a number of rows from 1, or mean")
    return number


_NUMBERS = (int, float, int | None, float | None, Literal[1, 3])


class Settings(BaseModel):
    """Frozen; an unknown field is an error, and so are infinity and NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: object, info: ValidationInfo) -> object:
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation in _NUMBERS:
            raise ValueError("must be a number, not true or false")
        return value


class AnnotateSettings(Settings):
    """Beside shard and teacher, what decides a part's bytes. `batch_size` may change the last bit of a logit, no
    more.

    Of the view settings, `view_seed`, `view_policy` and `crop_scale` decide nothing while `views` is 1.
    """

    encoding: str = Field(
        "dense",
        description="how logits are stored: dense, dense8, topk:K, sampled:N, or auto:EPS, the smallest topk:K that "
        "loses at most EPS nats on average",
    )
    batch_size: Annotated[int | Literal["auto"] | None, BeforeValidator(_check_batch_size)] = Field(
        None, description="images per forward pass, or auto: probed; if not given 256, on a CPU 32 to 256 by their size"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="fp32, or autocast to bf16 or fp16; auto: bf16 where the device has it"
    )
    compile: bool = Field(False, description="compile the teacher with torch.compile, for batches of one shape")
    fast_jpeg: bool = Field(False, description="decode large JPEGs at a fraction of their size; other pixels, cheaper")
    keep_members: bool = Field(False, description="keep the logits of an ensemble's members beside their mean")
    views: int = Field(1, ge=1, le=1024, description="views a sample: the clean one, the others augmented")
    view_seed: int = Field(0, ge=0, lt=1 << 63, description="decides crops, flips and colours of augmented views")
    view_policy: str = Field(
        "color", description="colours of augmented views: none, color or randaugment:N, and +erase if you like"
    )
    crop_scale: tuple[Fraction, Fraction] = Field((0.25, 1.0), description="least and largest share of the area kept")
    tta: Literal["none", "flip"] = Field(
        "none", description="flip: view 0 is the mean over the image and its mirror image"
    )

    @model_validator(mode="after")
    def _some_area(self) -> AnnotateSettings:
        if not 0 < self.crop_scale[0] <= self.crop_scale[1]:
            raise ValueError("`crop_scale` must be two shares of the area, the smaller first and above 0")
        return self

    @property
    def samples_per_batch(self) -> int:
        """How many samples a forward pass holds, all views of each."""
        assert isinstance(self.batch_size, int), "settled for a device first"
        return max(self.batch_size // self.views, 1)


class CalibrateSettings(Settings):
    """How the teacher's confidence is mapped to probabilities that fit the labels."""

    method: Literal["temperature", "vector"] = Field(
        "temperature", description="temperature: one number; vector: a weight and a bias a class"
    )
    prior: Literal["none", "labels", "uniform"] = Field(
        "none", description="also align the unlabeled rows' classes with the labels' shares, or with even ones"
    )


class SelectSettings(Settings):
    """Which soft labels count, and how much. Filters come first, then the target precision, then top-K and balance."""

    min_confidence: Fraction | None = Field(None, description="least confidence")
    min_margin: Fraction | None = Field(None, description="least distance of the two largest probabilities")
    max_entropy: float | None = Field(None, ge=0, description="largest entropy, in nats")
    max_disagreement: float | None = Field(
        None, ge=0, description="largest disagreement of an ensemble's members, in nats (annotate --keep-members)"
    )
    target_precision: float | None = Field(
        None, gt=0, lt=1, description="lowest confidence from which on so large a share of the labels is right"
    )
    certainty: float = Field(0.95, gt=0, lt=1, description="how certain the target precision is to be reached")
    per_class: bool = Field(False, description="a threshold for each predicted class instead of one for all")
    top_per_class: int | None = Field(
        None, ge=1, lt=1 << 62, description="the K most confident of each predicted class"
    )
    balance: Annotated[int | Literal["mean"] | None, BeforeValidator(_check_balance)] = Field(
        None, description="rows a class counts for: more are cut to the most confident, fewer weigh more; or mean"
    )
    max_weight: float = Field(10.0, ge=1, description="largest weight that balancing gives a row")
    weight: Literal["none", "confidence", "entropy"] = Field(
        "none", description="weigh rows by their confidence, or by 1 - entropy / log(classes)"
    )
    align_prior: bool = Field(False, description="apply the calibration's prior correction")
    include_labeled: bool = Field(False, description="rows that carry a label may be selected, too")

    @model_validator(mode="after")
    def _fitting(self) -> SelectSettings:
        if self.per_class and self.target_precision is None:
            raise ValueError("`per_class` is about `target_precision`, which isn't given")
        return self


class AugmentSettings(Settings):
    """How the student sees its training images."""

    crop: Literal["pad", "resized", "none"] = Field(
        "pad", description="pad: shift by up to an eighth; resized: random area; none"
    )
    flip: bool = Field(True, description="flip half of the images left to right")
    randaugment: int = Field(0, ge=0, le=30, description="RandAugment magnitude, 0 is off")
    erasing: Fraction = Field(0.0, description="share of images with a random rectangle erased")


_OF_SGD = {"lr": 0.1, "weight_decay": 5e-4}


class TrainSettings(Settings):
    """A student, its loss and its schedule."""

    student: str = Field(
        "small:resnet8?width=16",
        description="student spec: small:resnet8|14|20, torchvision:NAME, timm:NAME, hf:NAME_OR_DIR or "
        "python:MODULE:FUNCTION; ?weights=NAME (torchvision), ?pretrained=true (timm, hf) or ?weights_file=FILE starts "
        "from weights",
    )
    image_size: int | None = Field(
        None, ge=8, description="side of the student's input in pixels; 32 for small: students, 224 for others"
    )
    channels: Literal[1, 3] = Field(3, description="1 for grey, 3 for RGB")
    steps: int | None = Field(
        None, ge=1, lt=1 << 62, description="optimizer steps; 1000 if neither steps nor epochs is given"
    )
    epochs: float | None = Field(
        None, gt=0, le=1e6, description="passes over the pseudo-labeled rows (the labeled, if there are no others)"
    )
    batch_size: int = Field(256, ge=2, description="rows per step, labeled and pseudo-labeled together")
    labeled_fraction: Fraction = Field(0.125, description="share of labeled rows in a batch")
    label_sampling: Literal["natural", "balanced"] = Field(
        "natural", description="balanced: every class comes up equally often among the labeled rows"
    )
    accumulate: int = Field(1, ge=1, description="parts in which a batch is computed, where it doesn't fit at once")
    loss: str = Field(
        "kd",
        description="loss of the soft labels: kd, hard, dkd, nkd, dist, wttm, jsd or mse, with parameters as in "
        "hard?threshold=0.9",
    )
    alpha: Fraction = Field(0.9, description="weight of the soft labels against the labels")
    temperature: float = Field(2.0, ge=0.01, le=1000.0, description="temperature of the soft labels")
    standardize: bool = Field(False, description="compare the z-scores of both sides' logits, with kd, dkd or jsd")
    tail: Literal["bucket", "uniform"] = Field(
        "bucket",
        description="of labels that leave classes out: these as one outcome, or each with an even part of what is left",
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of a label spread evenly over all classes")
    class_weights: str = Field(
        "none", description="weights of the labels' classes: none, balanced, effective:0.999, or a number for each"
    )
    logit_adjustment: float = Field(
        0.0, ge=0, le=10, description="times the log of the labels' class shares, added to the logits of labeled rows"
    )
    replay: Annotated[int | Literal["all"] | None, BeforeValidator(_check_replay)] = Field(
        None,
        description="train on the first N augmented views of the store, or all, as the teacher saw them; if not given, "
        "on the clean one with the student's own augmentation",
    )
    mixup: float = Field(0.0, ge=0, le=10, description="blend images in pairs, shares from Beta(a, a); 0 is off")
    cutmix: float = Field(0.0, ge=0, le=10, description="paste a box of another image, area by Beta(a, a); 0 is off")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="adamw, or sgd with Nesterov momentum 0.9")
    lr: Positive = Field(2e-3, description="peak learning rate; of sgd 0.1 if not given")
    weight_decay: float = Field(
        0.05, ge=0, description="decoupled for adamw; of sgd 0.0005 if not given; not applied to norms and biases"
    )
    warmup_fraction: Fraction = Field(0.05, description="share of the steps with linear warm-up; then cosine to 0")
    clip_norm: float = Field(5.0, ge=0, description="gradient norm limit, 0 is off")
    ema: float = Field(0.99, ge=0, lt=1, description="decay of the averaged weights that are kept, 0 is off")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "fp32", description="fp32, or autocast to bf16 or fp16; auto: bf16 where the device has it"
    )
    compile: bool = Field(False, description="compile the student with torch.compile")
    augment: AugmentSettings = AugmentSettings()
    eval_every: int | None = Field(
        None, ge=1, description="steps between validations; a tenth of the steps if not given"
    )
    seed: int = Field(0, ge=0, lt=1 << 63, description="decides initial weights, order and augmentation")

    @model_validator(mode="before")
    @classmethod
    def _as_usual_for_sgd(cls, given: Any) -> Any:
        """AdamW's rate would hardly move SGD, and its weight decay, not decoupled, would shrink all weights to 0."""
        return {**_OF_SGD, **given} if isinstance(given, dict) and given.get("optimizer") == "sgd" else given

    @model_validator(mode="after")
    def _one_length(self) -> TrainSettings:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give `steps` or `epochs`, not both")
        return self

    @model_validator(mode="after")
    def _evened_once(self) -> TrainSettings:
        if self.label_sampling == "balanced":
            again = ["class_weights"] if self.class_weights.partition(":")[0] in ("balanced", "effective") else []
            again += ["logit_adjustment"] if self.logit_adjustment else []
            if again:
                raise ValueError(f"`label_sampling` balanced evens the classes already; leave `{again[0]}` out")
        return self

    @property
    def input_size(self) -> int:
        """`image_size`, or the usual one for the student's kind."""
        return self.image_size or (32 if self.student.startswith("small:") else 224)
