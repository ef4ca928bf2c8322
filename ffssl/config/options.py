"""Every option of a training run, declared once, and how options are read.

Options come from a YAML file (`--config FILE`) of sections and keys, and from the command line (`--section.option=value`), which
wins. A file may name another as its `base`, relative to itself, or a list of files, of which later ones win, and override it key by key.
"""

import difflib
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import yaml
from fastargs import Param, Section
from fastargs.config import Config
from fastargs.exceptions import MissingValueError, ValidationError
from fastargs.validation import Checker

from ffssl.config.command_line import exit_status
from ffssl.errors import UserError
from ffssl.schedules import LEARNING_RATE_SCHEDULES, RESOLUTION_SCHEDULES

class Number(Checker):
    """A number of `kind` between two bounds. Unlike fastargs' own it takes neither 1.5 nor true for an integer."""

    def __init__(self, kind: type, low: float, high: float = float("inf")):
        self.kind, self.low, self.high = kind, low, high

    def check(self, value):
        number = self.kind(value)
        if isinstance(value, bool) or not self.low <= number <= self.high or (self.kind is int and number != float(value)):
            raise ValueError
        return number

    def help(self):
        bounds = f"of {self.low:g} or more" if self.high == float("inf") else f"from {self.low:g} to {self.high:g}"
        return f"{'an integer' if self.kind is int else 'a number'} {bounds}"


class Switch(Checker):
    """true or false. fastargs' own takes the word "false" for true."""

    def check(self, value):
        return {"true": True, "false": False}[str(value).lower()]

    def help(self):
        return "true or false"


class Choice(Checker):
    """One of the given words, listed in their order."""

    def __init__(self, *words: str):
        self.words = words

    def check(self, value):
        if value not in self.words:
            raise ValueError
        return value

    def help(self):
        return f"one of {', '.join(self.words)}"


def _integer(low: int) -> Number:
    return Number(int, low)


def _number(low: float, high: float = float("inf")) -> Number:
    return Number(float, low, high)


def declare() -> Config:
    """All options, with their checks, defaults and help."""
    config = Config()

    def section(name: str, about: str, /, **params: Param) -> None:
        Section(name, about, config_descriptor=config).params(**params)

    section(
        "data", "Where the images come from",
        train=Param(str, "beton file to train on", required=True),
        validation=Param(str, "beton file with labels for the online kNN; none: no evaluation"),
        label_field=Param(str, "field of the files that holds the labels, integers or whole numbers; default: label, or else the only such field"),
        workers=Param(_integer(0), "threads that render views; 0: one per core", 0),
        batches_ahead=Param(_integer(1), "batches in memory: the one trained on, and those rendered meanwhile", 3),
        broken=Param(Choice("stop", "replace"), "what an image that does not decode does: stop the run, or be replaced by another, and counted in the log", "stop"),
        scaled_decoding=Param(Switch(), "decode JPEGs that are large beside their views at 1/2, 1/4 or 1/8 of their size", True),
    )  # fmt: skip
    section(
        "augment", "Which views are drawn of an image",
        views=Param(_integer(2), "views of each image; more than 2 need hard_augment", 2),
        policy=Param(str, "view policy (simsiam, simclr, byol, randaugment); default: the method's own"),
        jitter_form=Param(Choice("torchvision", "affine"), "colour jitter: torchvision's steps, or one cheaper colour matrix", "torchvision"),
        crop_scale_min=Param(_number(0.001, 1), "smallest crop, as a share of the area; default: the policy's"),
        blur=Param(_number(0, 1), "probability of blur; default: the policy's"),
        magnitude_min=Param(_number(0), "strength of colour jitter in the first epoch; 5 is the standard; of RandAugment: 0 to 30", 5.0),
        magnitude_max=Param(_number(0), "strength of colour jitter or of RandAugment in the last epoch", 5.0),
    )  # fmt: skip
    section(
        "resolution", "Side of the views, by epoch",
        schedule=Param(Choice(*RESOLUTION_SCHEDULES), "spl: max during warm-up, then min to max; progressive: min to max; constant: max", "constant"),
        max=Param(_integer(1), "largest side in pixels", 224),
        min=Param(_integer(1), "smallest side in pixels", 96),
        step=Param(_integer(1), "sides are multiples of this; the backbone's stride", 32),
    )  # fmt: skip
    section(
        "hard_augment", "Which pair of an image's views is trained on",
        select=Param(Choice("off", "hard", "random"), "hard: the pair with the largest loss; random: for comparison", "off"),
        resolution=Param(_integer(1), "side in pixels of the views in the selection pass", 64),
        loss=Param(
            Choice("method", "cosine"), "what pairs are compared by; method: the loss that is trained; cosine: the negative cosine of the "
            "projections; default: method, or cosine where it ranks pairs alike (simclr, mocov2plus) or has to (barlow_twins)",
        ),
        start_epoch=Param(_integer(0), "first epoch in which pairs are chosen, counted from 0; before it two views are rendered; default: after the warm-up"),
        share_min=Param(_number(0, 1), "share of the images that get their hardest pair, when that starts; the others get a random one", 1.0),
        share_max=Param(_number(0, 1), "share of the images that get their hardest pair in the last epoch", 1.0),
        across_policies=Param(Switch(), "compare only views of different view policies; default: true where the views have two"),
        extra_targets=Param(Switch(), "also compare the pair with the views not chosen, at this resolution", False),
    )  # fmt: skip
    section(
        "model", "The encoder",
        backbone=Param(str, "resnet18, -34, -50 or -101, resnet-small for CPUs, or a name of timm, as vit_small_patch16_224", "resnet50"),
        stem=Param(Choice("imagenet", "cifar"), "cifar: 3x3, stride 1 and no pooling, for 64 px and below (resnet18 to 101)", "imagenet"),
        zero_init_residual=Param(Switch(), "start each residual block as the identity (resnet18 to 101; timm's start as timm has them)", False),
    )  # fmt: skip
    section(
        "method", "The self-supervised method; options left out are its authors'",
        name=Param(str, "simsiam, byol, simclr, mocov2plus, dino, barlow_twins or vicreg", "simsiam"),
        hidden=Param(_integer(1), "width of the projector's hidden layers"),
        projection=Param(_integer(1), "length of the projections"),
        predictor=Param(_integer(1), "width of the predictor's hidden layer (simsiam, byol)"),
        constant_predictor_lr=Param(Switch(), "keep the predictor's learning rate at its peak (simsiam)"),
        temperature=Param(_number(1e-6), "temperature of the softmax (simclr, mocov2plus, dino)"),
        teacher_momentum=Param(_number(0, 1), "momentum of the teacher's average, in the first step (byol, mocov2plus, dino)"),
        teacher_momentum_end=Param(_number(0, 1), "and in the last, by a cosine (byol, mocov2plus, dino)"),
        queue=Param(_integer(1), "keys of past views; a multiple of the batch size (mocov2plus)"),
        prototypes=Param(_integer(1), "outputs of the last layer (dino)"),
        head_norm=Param(Switch(), "BatchNorm in the projector's hidden layers (dino)"),
        norm_last_layer=Param(Switch(), "keep the prototypes at length 1 (dino)"),
        frozen_epochs=Param(_integer(0), "first epochs, in which the last layer is not trained (dino)"),
        teacher_temperature=Param(_number(1e-6), "temperature of the teacher's softmax (dino)"),
        teacher_temperature_epochs=Param(_integer(0), "epochs over which it goes there from 0.04 (dino)"),
        redundancy=Param(_number(0), "weight of the correlations of different dimensions (barlow_twins)"),
        invariance=Param(_number(0), "weight of the invariance term (vicreg)"),
        variance=Param(_number(0), "weight of the variance term (vicreg)"),
        covariance=Param(_number(0), "weight of the covariance term (vicreg)"),
    )  # fmt: skip
    section(
        "training", "The optimisation",
        epochs=Param(_integer(1), "passes over the training file", 200),
        batch_size=Param(_integer(2), "images in an optimiser step", 512),
        optimizer=Param(Choice("sgd", "lars", "adamw"), "sgd and lars with momentum; the momentum of adamw is its beta1", "sgd"),
        schedule=Param(Choice(*LEARNING_RATE_SCHEDULES), "of the learning rate", "cosine"),
        learning_rate=Param(_number(0), "its peak", 0.1),
        warmup_epochs=Param(_number(0), "length of the warm-up, of the learning rate's and of spl's; not for 1-clr", 0.0),
        warmup_share=Param(_number(0, 1), "the same for 1-clr, as a share of the training", 0.3),
        momentum=Param(_number(0, 0.9999), "of the cosine schedules", 0.9),
        momentum_low=Param(_number(0, 0.9999), "of the one-cycle schedules, at the peak of the learning rate", 0.85),
        momentum_high=Param(_number(0, 0.9999), "of the one-cycle schedules, at their ends", 0.95),
        weight_decay=Param(_number(0), "L2 penalty; of adamw, decoupled", 1e-4),
        decay_norm_and_bias=Param(Switch(), "decay biases and the parameters of normalisation too; default: the method's own"),
        accumulate=Param(
            _integer(1), "parts of a batch that are computed one after the other, to save memory; BatchNorm and loss see one at a time, and "
            "after each move the queue (mocov2plus) and the centre (dino)", 1,
        ),
        joint_views=Param(Switch(), "pass both views as one batch, which BatchNorm normalises together; default: as the method's authors do"),
        compile=Param(Choice("auto", "off", "default", "reduce-overhead", "max-autotune"), "torch.compile's mode; auto: default on a GPU, off on CPU and where GPUs share BatchNorm", "auto"),
        amp=Param(Choice("auto", "bf16", "fp16", "off"), "mixed precision; auto: bf16 where the GPU has it, else fp16, off on CPU", "auto"),
    )  # fmt: skip
    section(
        "evaluate", "Online kNN on frozen features",
        every=Param(_integer(0), "epochs between evaluations; 0: only before and after training", 0),
        k=Param(_integer(1), "neighbours", 200),
        temperature=Param(_number(1e-6), "of the votes", 0.1),
        bank_samples=Param(_integer(1), "training images in the bank at most, chosen at random", 100_000),
    )  # fmt: skip
    section(
        "run", "This run",
        folder=Param(str, "where log and checkpoint go; a run that is there already is continued", required=True),
        resume=Param(Choice("auto", "never"), "auto: continue the folder's run; never: refuse a folder that holds one", "auto"),
        checkpoint_minutes=Param(_number(0), "time between checkpoints within an epoch; 0: only after every epoch", 10.0),
        keep=Param(_integer(1), "checkpoints to keep: checkpoint.pt is the latest, checkpoint.1.pt the one before", 2),
        device=Param(str, "cuda, cuda:N or cpu; auto: a GPU where there is one", "auto"),
        seed=Param(_integer(0), "of the initial weights, the order and the views", 0),
        tensorboard=Param(Switch(), "write TensorBoard files beside the log", True),
        wandb=Param(str, "Weights & Biases project to log to as well; needs pip install 'ffssl[wandb]'"),
    )  # fmt: skip
    return config


def read_options(arguments: list[str], defaults: Mapping[str, object] = MappingProxyType({})) -> SimpleNamespace:
    """The options of a run, a namespace of sections, from command-line arguments.

    defaults: by dotted name, for a program that can do without an option that training requires.
    Raises UserError, naming the option: unknown (with the nearest known one), of a wrong type, missing, or at odds with another.
    """
    config = declare()
    settings: dict[str, object] = {**defaults}
    overrides: dict[str, object] = {}
    words = iter(arguments)
    for word in words:
        if not word.startswith("--"):
            raise UserError(f"{word!r}: expected --config FILE or --section.option=value")
        name, equals, value = word[2:].partition("=")
        if not equals:
            value = next(words, None)
            if value is None or value.startswith("--"):
                raise UserError(f"--{name}: a value is missing, as in --{name}=value")
        if name in ("config", "config-file"):
            settings |= _read_file(Path(value), config)
        else:
            _check_name(name, f"--{name}", config)
            overrides[name] = value
    options = _validated(config, settings | overrides)
    _check_together(options)
    return options


def command_line_options(usage: str | None) -> SimpleNamespace:
    """The options of this process's command line. Prints the help, or what is wrong in one line, and leaves with status 0 or 2."""
    arguments, found = sys.argv[1:], []
    if {"-h", "--help"} & set(arguments):
        sys.exit(exit_status(lambda: print(help_text(usage)), interrupted=""))
    if status := exit_status(lambda: found.append(read_options(arguments))):
        sys.exit(status)
    return found[0]


def as_dict(options: SimpleNamespace) -> dict[str, dict]:
    """The options as plain sections of keys, for a log or a checkpoint."""
    return {section: dict(vars(values)) for section, values in vars(options).items()}


def shared_options(options: SimpleNamespace) -> dict[str, object]:
    """By their names on the command line, the options that all ranks of a run must have alike; the others are where a rank runs."""
    local = ("data.train", "data.validation", "data.workers", "data.batches_ahead", "run.device")
    names = {f"{section}.{name}": value for section, values in as_dict(options).items() for name, value in values.items()}
    shared = {f"--{name}": value for name, value in names.items() if name not in local}
    return shared | {"--data.validation": "given" if options.data.validation else "left out"}  # all wait where one evaluates


def from_dict(sections: dict[str, dict]) -> SimpleNamespace:
    """The options that `as_dict` made plain; those that are not among them have their defaults. Raises UserError as `read_options` does."""
    config = declare()
    settings = {f"{section}.{name}": value for section, values in sections.items() for name, value in values.items() if value is not None}
    for name in settings:
        _check_name(name, name, config)
    return _validated(config, settings)


def help_text(usage: str | None) -> str:
    """The program's usage, which python -OO takes away, then each option with its check, default and meaning, by section."""
    config = declare()
    lines = [(usage or "usage: --config FILE --section.option=value ...").strip(), ""]
    for path, entries in config.sections_to_entries.items():
        lines.append(f"{config.sections[path].desc}:")
        for entry in entries:
            param = config.entries[entry]
            default = "required" if param.required else "" if param.default is None else f"default {param.default}"
            note = "; ".join(filter(None, [param.checker.help() if param.checker.help() != "a string" else "", default]))
            lines.append(f"  --{'.'.join(entry):<36} {param.desc}{f' ({note})' if note else ''}")
        lines.append("")
    return "\n".join(lines)


def _names(config: Config) -> list[str]:
    return [".".join(path) for path in config.entries]


def _check_name(name: str, where: str, config: Config) -> None:
    if name not in _names(config):
        nearest = difflib.get_close_matches(name, [*_names(config), "config"], n=1, cutoff=0.5)
        raise UserError(f"{where}: unknown option{f'; did you mean {nearest[0]}?' if nearest else ''}")


def _read_file(path: Path, config: Config, built_on_it: tuple[Path, ...] = ()) -> dict[str, object]:
    """A YAML file's options by dotted name, on top of its bases'."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: the config can't be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: a config holds sections of options, as in training: {{epochs: 100}}")
    bases = content.pop("base", [])
    bases = bases if isinstance(bases, list) else [bases]
    built_on_it = (*built_on_it, path.resolve())
    settings = {}
    for base in bases:
        if not isinstance(base, str):
            raise UserError(f"{path}: base must name a file or a list of files, got {base!r}")
        if (path.parent / base).resolve() in built_on_it:
            raise UserError(f"{path}: its base {base} is built on it in turn")
        settings |= _read_file(path.parent / base, config, built_on_it)
    for section, values in content.items():
        if (section,) not in config.sections:
            nearest = difflib.get_close_matches(str(section), [s[0] for s in config.sections], n=1)
            raise UserError(f"{path}: unknown section {section!r}{f'; did you mean {nearest[0]}?' if nearest else ''}")
        if not isinstance(values, dict):
            raise UserError(f"{path}: section {section} must hold options, one a line")
        for key, value in values.items():
            _check_name(f"{section}.{key}", f"{path}: {section}.{key}", config)
            settings[f"{section}.{key}"] = value
    return settings


def _validated(config: Config, settings: dict[str, object]) -> SimpleNamespace:
    config.collect({name: "off" if value is False and name in _WORDS_LIKE_FALSE else value for name, value in settings.items()})
    sections: dict[str, SimpleNamespace] = {}
    for path, param in config.entries.items():
        name = ".".join(path)
        try:
            value = config[path]
        except MissingValueError:
            raise UserError(f"--{name}: required ({param.desc})") from None
        except ValidationError:
            raise UserError(f"--{name}: expected {param.checker.help()}, got {settings[name]!r}") from None
        setattr(sections.setdefault(path[0], SimpleNamespace()), path[1], value)
    return SimpleNamespace(**sections)


_WORDS_LIKE_FALSE = ("training.amp", "training.compile", "hard_augment.select")  # YAML reads a bare off as false


def _check_together(options: SimpleNamespace) -> None:
    """What single options can't show: contradictions between them."""
    resolution, training, augment = options.resolution, options.training, options.augment
    for name in ("max", "min") if resolution.schedule != "constant" else ("max",):
        if getattr(resolution, name) % resolution.step:
            raise UserError(
                f"--resolution.{name}: {getattr(resolution, name)} is no multiple of --resolution.step={resolution.step}"
            )
    if resolution.schedule != "constant" and resolution.min > resolution.max:
        raise UserError(f"--resolution.min: {resolution.min} is larger than --resolution.max={resolution.max}")
    if training.schedule == "1-clr":
        if training.warmup_share == 1:
            raise UserError("--training.warmup_share: 1 leaves no training after the warm-up; give less")
    elif training.warmup_epochs >= training.epochs:
        raise UserError(f"--training.warmup_epochs: {training.warmup_epochs:g} of {training.epochs} epochs leave none after the warm-up")
    part, rest = divmod(training.batch_size, training.accumulate)
    if rest or part < 2:
        raise UserError(f"--training.accumulate: {training.accumulate} equal parts of 2 images or more can't be made of --training.batch_size={training.batch_size}")
    if training.momentum_low > training.momentum_high:
        raise UserError(f"--training.momentum_low: {training.momentum_low} is larger than --training.momentum_high={training.momentum_high}")
    if options.hard_augment.select == "off" and augment.views > 2:
        raise UserError(f"--augment.views: {augment.views} views, of which only 2 would be used; set --hard_augment.select=hard")
    if options.hard_augment.select != "off" and augment.views < 3:
        raise UserError(f"--augment.views: {augment.views} views leave no pair to choose; hard_augment needs 3 or more")
    hard_augment = options.hard_augment
    if hard_augment.loss is not None and hard_augment.select != "hard":
        raise UserError("--hard_augment.loss: pairs are compared to find the hardest alone; set --hard_augment.select=hard, or leave this out")
    if hard_augment.start_epoch is not None:
        if hard_augment.select == "off":
            raise UserError("--hard_augment.start_epoch: no pairs are chosen; set --hard_augment.select=hard, or leave this out")
        if hard_augment.start_epoch >= training.epochs:
            raise UserError(f"--hard_augment.start_epoch: {hard_augment.start_epoch} is past the last epoch, {training.epochs - 1}; epochs count from 0")
    if hard_augment.share_min > hard_augment.share_max:
        raise UserError(f"--hard_augment.share_min: {hard_augment.share_min} is larger than --hard_augment.share_max={hard_augment.share_max}")
    if (hard_augment.share_min, hard_augment.share_max) != (1, 1) and hard_augment.select != "hard":
        raise UserError("--hard_augment.share_min: only hard pairs have a share; set --hard_augment.select=hard, or leave this out")
    if options.hard_augment.extra_targets and options.hard_augment.select == "off":
        raise UserError("--hard_augment.extra_targets: they are the views not chosen; set --hard_augment.select=hard or random, and 3 views or more")
