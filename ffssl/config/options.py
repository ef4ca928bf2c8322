"""Every option of a run, declared once.

A field's metadata holds its check, its help and its role. They determine fastargs' sections, the
help, what a resumed run may change, what a study compares and what a model card publishes.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from fastargs.validation import Checker

from ffssl.config.checks import Choice, Files, Stages, Switch, Text, integer, number
from ffssl.config.method_options import MethodOption, method_options
from ffssl.schedules import LEARNING_RATE_SCHEDULES, RESOLUTION_SCHEDULES


class Role(Enum):
    """What an option is about."""

    EXPERIMENT = "what is computed: a run that is continued must keep it"
    DATA = "which files are read: told apart by their content"
    EVALUATION = "how a run is evaluated"
    RUNNING = "how and where it runs, without an effect on the result"


def option(
    default: Any,
    check: Checker,
    help: str,
    role: Role = Role.EXPERIMENT,
    *,
    required: bool = False,
    of_a_rank: bool = False,
) -> Any:
    """Declare a field of an options class.

    of_a_rank: each rank of a run may have its own value.
    """
    metadata = {"check": check, "help": help, "role": role}
    metadata |= {"required": required, "of_a_rank": of_a_rank}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class DataOptions:
    """Where the images come from."""

    train: str = option(
        "",
        Files(),
        "beton file to train on, or several as one set, as 'train-*.beton'",
        Role.DATA,
        required=True,
        of_a_rank=True,
    )
    validation: str | None = option(
        None,
        Files(),
        "beton file with labels for the online evaluations; none: no evaluation",
        Role.DATA,
        of_a_rank=True,
    )
    label_field: str | None = option(
        None,
        Text(),
        "field of the files that holds the labels, integers or whole numbers; default: label, or "
        "else the only such field",
        Role.EVALUATION,
    )
    workers: int = option(
        0, integer(0), "threads that render views; 0: one per core", Role.RUNNING, of_a_rank=True
    )
    batches_ahead: int = option(
        3,
        integer(1),
        "batches in memory: the one trained on, and those rendered meanwhile",
        Role.RUNNING,
        of_a_rank=True,
    )
    broken: str = option(
        "stop",
        Choice("stop", "replace"),
        "stop: an image that does not decode ends the run; replace: another one takes its place, "
        "and the log counts it",
        Role.RUNNING,
    )
    scaled_decoding: bool = option(
        True,
        Switch(),
        "decode JPEGs that are large beside their views at 1/2, 1/4 or 1/8 of their size",
    )


@dataclass(frozen=True)
class AugmentOptions:
    """How views of an image are drawn."""

    views: int = option(2, integer(2), "views of each image; more than 2 need hard_augment")
    policy: str | None = option(
        None,
        Text(),
        "view policy (simsiam, simclr, byol, randaugment); default: the method's own",
    )
    jitter_form: str = option(
        "torchvision",
        Choice("torchvision", "affine"),
        "colour jitter: torchvision's steps, or one cheaper colour matrix",
    )
    interpolation: str = option(
        "bilinear",
        Choice("bilinear", "bicubic"),
        "filter that resizes crops, antialiased; bicubic: as the authors of SimCLR, BYOL, DINO, "
        "Barlow Twins and VICReg",
    )
    local_views: int = option(
        0,
        integer(0),
        "multi-crop: small local views of each image besides, which predict the global ones; "
        "hard_augment chooses among the global views alone",
    )
    local_share: float = option(
        0.43,
        number(0.01, 1),
        "side of the local views, as a share of the epoch's resolution; rounded to a multiple of "
        "resolution.step",
    )
    local_crop_scale_max: float = option(
        0.14,
        number(0.001, 1),
        "largest crop of the local views, as a share of the area; the smallest is 0.05",
    )
    crop_scale_min: float | None = option(
        None, number(0.001, 1), "smallest crop, as a share of the area; default: the policy's"
    )
    blur: float | None = option(None, number(0, 1), "probability of blur; default: the policy's")
    blur_scale: str = option(
        "fixed",
        Choice("fixed", "proportional"),
        "sigma of the blur in pixels; fixed: the same at every side; proportional: smaller with "
        "the side, from the policy's at resolution.max",
    )
    magnitude_min: float = option(
        5.0,
        number(0),
        "strength of colour jitter in the first epoch; 5 is the standard; of RandAugment: 0 to 30",
    )
    magnitude_max: float = option(
        5.0, number(0), "strength of colour jitter or of RandAugment in the last epoch"
    )


@dataclass(frozen=True)
class ResolutionOptions:
    """Side of the views, by epoch."""

    schedule: str = option(
        "constant",
        Choice(*RESOLUTION_SCHEDULES),
        "spl: max during warm-up, then min to max; progressive: min to max; stages: those of "
        "resolution.stages; constant: max",
    )
    max: int = option(224, integer(1), "largest side in pixels")
    min: int = option(96, integer(1), "smallest side in pixels")
    step: int = option(32, integer(1), "sides are multiples of this; the backbone's stride")
    stages: str | None = option(
        None, Stages(), "sides in pixels, and the share of the epochs of each, in order"
    )


@dataclass(frozen=True)
class HardAugmentOptions:
    """Which pair of an image's views is trained on."""

    select: str = option(
        "off",
        Choice("off", "hard", "random"),
        "hard: the pair with the largest loss; random: for comparison",
    )
    resolution: int = option(64, integer(1), "side in pixels of the views in the selection pass")
    loss: str | None = option(
        None,
        Choice("method", "student", "cosine"),
        "what pairs are compared by; method: the loss that is trained; student: the same with the "
        "student in its teacher's place; cosine: the negative cosine of the projections; default: "
        "method; student for byol and mocov2plus; cosine for simclr, which trains on projections, "
        "and for barlow_twins, whose loss is none of single images",
    )
    start_epoch: int | None = option(
        None,
        integer(0),
        "first epoch in which pairs are chosen, counted from 0; before it two views are rendered; "
        "default: after the warm-up; for dino and barlow_twins in the middle of the run, if that "
        "is later",
    )
    share_min: float | None = option(
        None,
        number(0, 1),
        "share of the images that get their hardest pair, when that starts; the others get a "
        "random one; default: 1; 0 for simsiam",
    )
    share_max: float = option(
        1.0, number(0, 1), "share of the images that get their hardest pair in the last epoch"
    )
    across_policies: bool | None = option(
        None,
        Switch(),
        "compare only views of different view policies; default: true where the views have two",
    )
    extra_targets: bool = option(
        False,
        Switch(),
        "also compare the pair with the views not chosen, at the resolution of the selection",
    )


@dataclass(frozen=True)
class ModelOptions:
    """The encoder."""

    backbone: str = option(
        "resnet50",
        Text(),
        "resnet18, -34, -50 or -101, resnet-small for CPUs, or a name of timm, as "
        "vit_small_patch16_224",
    )
    stem: str = option(
        "imagenet",
        Choice("imagenet", "cifar"),
        "cifar: 3x3, stride 1 and no pooling, for 64 px and below (resnet18 to 101)",
    )
    drop_path: float = option(
        0.0,
        number(0, 0.99),
        "rate of stochastic depth in the last block, from 0 in the first (networks of timm)",
    )
    patch_drop: float = option(
        0.0,
        number(0, 0.99),
        "share of an image's patches that the student drops in training, at random; teacher, "
        "selection and evaluations see them all (vision transformers)",
    )
    zero_init_residual: bool = option(
        False,
        Switch(),
        "start each residual block as the identity (resnet18 to 101; timm's start as timm has "
        "them)",
    )
    weights: str | None = option(
        None,
        Text(),
        "file of weights to start from: an export, or a state dict of torchvision or timm (.pth, "
        ".safetensors); without a file they are random, and zero_init_residual counts",
    )
    weights_partial: bool = option(
        False, Switch(), "take from the file of weights what fits, and leave the rest at random"
    )


@dataclass(frozen=True)
class MethodOptions:
    """The self-supervised method; options left out are its authors'.

    settings: the other options of the section, which the methods' classes declare; None for those
        that are left out.
    """

    name: str = "simsiam"
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingOptions:
    """The optimisation."""

    epochs: int = option(200, integer(1), "passes over the training file")
    batch_size: int = option(512, integer(2), "images in an optimiser step, of all ranks")
    optimizer: str = option(
        "sgd",
        Choice("sgd", "lars", "adamw"),
        "sgd and lars with momentum; the momentum of adamw is its beta1",
    )
    schedule: str = option(
        "cosine", Choice(*LEARNING_RATE_SCHEDULES), "schedule of the learning rate"
    )
    learning_rate: float = option(0.1, number(0), "peak learning rate")
    warmup_epochs: float = option(
        0.0,
        number(0),
        "length of the warm-up, of the learning rate's and of spl's; not for 1-clr",
    )
    warmup_share: float = option(
        0.3, number(0, 1), "length of the warm-up of 1-clr, as a share of the training"
    )
    momentum: float = option(0.9, number(0, 0.9999), "momentum under the cosine schedules")
    momentum_low: float = option(
        0.85,
        number(0, 0.9999),
        "momentum under the one-cycle schedules at the peak of the learning rate",
    )
    momentum_high: float = option(
        0.95, number(0, 0.9999), "momentum under the one-cycle schedules at their ends"
    )
    weight_decay: float = option(1e-4, number(0), "L2 penalty; of adamw, decoupled")
    weight_decay_end: float | None = option(
        None,
        number(0),
        "weight_decay in the last step, where a half cosine leads; default: weight_decay",
    )
    clip_gradient: float = option(
        0.0,
        number(0),
        "largest norm of a parameter's gradient, of each parameter alone; 0: no limit",
    )
    decay_norm_and_bias: bool | None = option(
        None,
        Switch(),
        "decay biases and the parameters of normalisation too; default: the method's own",
    )
    accumulate: int = option(
        1,
        integer(1),
        "parts of a batch that are computed one after the other, to save memory; BatchNorm and "
        "loss see one at a time, and after each move the queue (mocov2plus) and the centre (dino)",
    )
    joint_views: bool | None = option(
        None,
        Switch(),
        "pass both views as one batch, which BatchNorm normalises together; default: as the "
        "method's authors do",
    )
    compile: str = option(
        "auto",
        Choice("auto", "off", "default", "reduce-overhead", "max-autotune"),
        "mode of torch.compile; auto: off on a CPU, default on GPUs, reduce-overhead (CUDA graphs) "
        "where one GPU's steps are small",
        Role.RUNNING,
    )
    amp: str = option(
        "auto",
        Choice("auto", "bf16", "fp16", "off"),
        "mixed precision; auto: bf16 where the GPU has it, else fp16, off on a CPU, where the "
        "start says if bf16 is faster",
    )


@dataclass(frozen=True)
class EvaluateOptions:
    """Online kNN on frozen features, and an online linear classifier."""

    every: int = option(
        0,
        integer(0),
        "epochs between evaluations; 0: only before and after training",
        Role.EVALUATION,
    )
    k: int = option(200, integer(1), "neighbours that vote", Role.EVALUATION)
    temperature: float = option(
        0.1, number(1e-6), "temperature of the neighbours' votes", Role.EVALUATION
    )
    bank_samples: int = option(
        100_000,
        integer(1),
        "training images in the bank at most, chosen at random",
        Role.EVALUATION,
    )
    linear_learning_rate: float = option(
        0.1,
        # So that its weights stay finite, whatever the features.
        number(0, 100),
        "learning rate of the linear classifier that is trained beside the method, for a batch of "
        "256; 0: none",
        Role.EVALUATION,
    )


@dataclass(frozen=True)
class RunOptions:
    """The run's folder, device, seed and logs."""

    folder: str = option(
        "",
        Text(),
        "where log and checkpoint go; a run that is there already is continued",
        Role.RUNNING,
        required=True,
    )
    resume: str = option(
        "auto",
        Choice("auto", "never"),
        "auto: continue the folder's run; never: refuse a folder that holds one",
        Role.RUNNING,
    )
    checkpoint_minutes: float = option(
        10.0,
        number(0),
        "time between checkpoints within an epoch; 0: only after every epoch",
        Role.RUNNING,
    )
    keep: int = option(
        2,
        integer(1),
        "checkpoints to keep: checkpoint.pt is the latest, checkpoint.1.pt the one before",
        Role.RUNNING,
    )
    device: str = option(
        "auto",
        Text(),
        "cuda, cuda:N or cpu; auto: a GPU where there is one",
        Role.RUNNING,
        of_a_rank=True,
    )
    seed: int = option(0, integer(0), "seed of the initial weights, the order and the views")
    tensorboard: bool = option(
        True, Switch(), "write TensorBoard files beside the log", Role.RUNNING
    )
    wandb: str | None = option(
        None,
        Text(),
        "Weights & Biases project to log to as well; needs pip install 'ffssl[wandb]'",
        Role.RUNNING,
    )


@dataclass(frozen=True)
class Options:
    """The options of a run, by section."""

    data: DataOptions = DataOptions()
    augment: AugmentOptions = AugmentOptions()
    resolution: ResolutionOptions = ResolutionOptions()
    hard_augment: HardAugmentOptions = HardAugmentOptions()
    model: ModelOptions = ModelOptions()
    method: MethodOptions = MethodOptions()
    training: TrainingOptions = TrainingOptions()
    evaluate: EvaluateOptions = EvaluateOptions()
    run: RunOptions = RunOptions()

    def changed(self, **sections: Mapping[str, Any]) -> "Options":
        """Return a copy with other values of some options, by section."""
        new = {
            name: dataclasses.replace(getattr(self, name), **values)
            for name, values in sections.items()
        }
        return dataclasses.replace(self, **new)

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Return plain sections of keys, for a log or a checkpoint."""
        sections = {
            section.name: dict(vars(getattr(self, section.name)))
            for section in dataclasses.fields(self)
        }
        settings = sections["method"].pop("settings")
        sections["method"] |= settings
        return sections

    def of_role(self, *roles: Role) -> dict[str, dict[str, Any]]:
        """Return the plain sections with only the options of these roles."""
        kept = {declared.path for declared in declarations() if declared.role in roles}
        return {
            section: {key: value for key, value in values.items() if (section, key) in kept}
            for section, values in self.as_dict().items()
        }


def dotted(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return plain sections of options by the names that users write, as "data.train"."""
    return {
        f"{section}.{name}": value
        for section, values in sections.items()
        for name, value in values.items()
    }


@dataclass(frozen=True)
class Declaration:
    """The declaration of an option."""

    path: tuple[str, str]  # section, name
    default: Any
    check: Checker
    help: str
    role: Role = Role.EXPERIMENT
    required: bool = False
    of_a_rank: bool = False

    @property
    def name(self) -> str:
        """The name as a user writes it: section.name."""
        return ".".join(self.path)


def declarations() -> Iterator[Declaration]:
    """Yield all options in the order of their sections, including those of the methods."""
    defaults = Options()
    for section in dataclasses.fields(Options):
        if section.name == "method":
            yield from _method_declarations(method_options())
            continue
        for one in dataclasses.fields(getattr(defaults, section.name)):
            default = None if one.metadata["required"] else one.default
            yield Declaration((section.name, one.name), default, **one.metadata)


def section_titles() -> dict[str, str]:
    """Return the title of each section, by its name."""
    docs = {s.name: s.type.__doc__ or s.name for s in dataclasses.fields(Options)}
    return {name: doc.splitlines()[0].rstrip(".") for name, doc in docs.items()}


def _method_declarations(found: dict[str, list[MethodOption]]) -> Iterator[Declaration]:
    """Yield the options of the methods. An option of several methods is one option."""
    help = f"the method: one of {', '.join(found)}"
    yield Declaration(("method", "name"), MethodOptions.name, Text(), help)
    by_name: dict[str, dict[str, MethodOption]] = {}
    for method, options in found.items():
        for one in options:
            by_name.setdefault(one.name, {})[method] = one
    for name, of_methods in by_name.items():
        first = next(iter(of_methods.values()))
        whose = "" if len(of_methods) == len(found) else f" ({', '.join(of_methods)})"
        yield Declaration(("method", name), None, first.check, f"{first.help}{whose}")
