"""The model card of an exported backbone: how to load it, how it was trained, what it scored.

It holds only what the run recorded.
"""

from pathlib import Path

import yaml
from torch import nn

from ffssl.backbones import RESNETS, ResizableViT, TimmModel
from ffssl.config import Options, Role
from ffssl.config.options import ModelOptions
from ffssl.data.beton.description import description_or_empty
from ffssl.data.beton.files import file_names
from ffssl.data.normalise import MEAN, STD
from ffssl.evaluate.results import markdown_table, read_results
from ffssl.export.hugging_face import CARD, front_matter
from ffssl.load import LoadedRun, fingerprint
from ffssl.run_folder.log import read_log


def card_path(output: Path, to: str) -> Path:
    """Return where the card of an export lies. output, to: as the export was given them."""
    return output / CARD if to == "huggingface" else output.with_name(output.name + ".md")


def model_card(
    run: LoadedRun,
    backbone: nn.Module,
    *,
    folder: Path,
    network: str,
    to: str,
    file: str,
    licence: str | None = None,
) -> str:
    """Return the card as Markdown.

    folder: where log.jsonl and evaluation.json lie. network: "student" or "teacher", whose
    `backbone` it is. to, file: format and name of the file. licence: of the weights, for the front
    matter of a card for Hugging Face.
    """
    options, epoch = run.options, run.state["epoch"]
    weights = fingerprint(backbone)
    title = f"{options.model.backbone}, pre-trained without labels by {options.method.name}"
    scores = online_scores(options, folder, epoch) if network == "student" and not run.steps else []
    records = [record for record in read_results(folder) if record["weights"] == weights]
    front = front_matter(options, records, licence) if to == "huggingface" else []
    return "\n".join(
        [
            *front,
            f"# {title}",
            "",
            (
                f"The {network}'s backbone: from images (N, 3, R, R) to pooled features (N, "
                f"{backbone.features}), without a classifier. Weights {weights}."
            ),
            "",
            "## Load it",
            "",
            "```python",
            loading_code(options.model, backbone, to, file),
            "```",
            "",
            (
                f"Images are RGB in 0..1, normalised by the mean {MEAN} and the standard "
                f"deviation {STD}."
            ),
            "",
            "## How it was trained",
            "",
            *[f"- {line}" for line in training(run)],
            "",
            "Its options:",
            "",
            "```yaml",
            published_options(options).rstrip(),
            "```",
            "",
            "## What it scored",
            "",
            *(scores or ([] if records else ["Nothing was recorded of these weights."])),
            *(["", markdown_table((file, record) for record in records)] if records else []),
            "",
        ]
    )


def loading_code(model: ModelOptions, backbone: nn.Module, to: str, file: str) -> str:
    """Return Python code that loads the file. FFSSL's own networks need FFSSL."""
    name = model.backbone
    if to == "torchvision":
        return (
            "import torch, torchvision\n\n"
            f"backbone = torchvision.models.{name}()\n"
            "backbone.fc = torch.nn.Identity()\n"
            f'backbone.load_state_dict(torch.load("{file}", weights_only=True))'
        )
    if to == "huggingface":
        return f'import timm\n\nbackbone = timm.create_model("local-dir:{file}", pretrained=True)'
    if isinstance(backbone, TimmModel) or (name in RESNETS and model.stem == "imagenet"):
        sizes = "dynamic_img_size=True, " if isinstance(backbone, ResizableViT) else ""
        return (
            "import timm\n\n"
            f'backbone = timm.create_model("{name}", num_classes=0, '
            f'{sizes}checkpoint_path="{file}")'
        )
    return (
        "from safetensors.torch import load_file\n\n"
        "from ffssl.backbones import build_backbone\n\n"
        f'backbone = build_backbone("{name}", stem="{model.stem}")\n'
        f'backbone.load_state_dict(load_file("{file}"))'
    )


def training(run: LoadedRun) -> list[str]:
    """Return the facts of a run's training, a line each."""
    options, state = run.options, run.state
    epochs, epoch = options.training.epochs, state["epoch"]
    sides = options.resolution
    resolution = (
        f"{sides.max} px"
        if sides.schedule == "constant"
        else f"{sides.min} to {sides.max} px ({sides.schedule})"
    )
    steps = f" and {run.steps} steps of the next" if run.steps else ""
    lines = [
        f"{epoch} epochs"
        if epoch == epochs
        else f"{epoch} of {epochs} epochs{steps}: the run had not finished",
        f"images: {describe_images(options.data.train)}",
        f"{options.training.optimizer} by the schedule {options.training.schedule}, "
        f"views of {resolution}",
        f"{state['spent']['flops']:.4g} FLOPs (a backward pass counted as two forward passes), "
        f"{state['spent']['seconds']:.0f} s of training"
        + (f", in the {epoch} epochs" if steps else ""),
        f"seed {options.run.seed}",
        *starting_weights(state.get("weights") or {}),
    ]
    return lines + (
        [f"last checkpoint written on {state['written_on']}"] if "written_on" in state else []
    )


def starting_weights(weights: dict) -> list[str]:
    """Return a line on the file of weights that a run started from, or nothing.

    weights: see `ffssl.training.build.first_backbone`.
    """
    if not weights:
        return []
    parts = [
        f"{what}: {', '.join(weights[key])}"
        for key, what in (
            ("interpolated", "interpolated"),
            ("classifier", "a classifier's, ignored"),
            ("ignored", "ignored"),
            ("left_at_random", "left at random"),
        )
        if weights[key]
    ]
    told = "; ".join([f"{weights['loaded']} tensors", *parts])
    return [f"started from the weights of {weights['file']} (sha256 {weights['sha256']}): {told}"]


def describe_images(files: str) -> str:
    """Return the names of beton files, and what their converter noted of them."""
    description, names = description_or_empty(files), file_names(files)
    if not description:
        return names
    classes = f" of {len(description['class_names'])} classes" if description["class_names"] else ""
    return (
        f"{names}, {description['samples']}{classes}, "
        f"source {description['source']['kind']}, sha256 {description['sha256']}"
    )


def published_options(options: Options) -> str:
    """Return the options that decide the weights, as YAML.

    Files and folders of the machine that trained them are left out.
    """
    sections = {
        name: {key: value for key, value in values.items() if value is not None}
        for name, values in options.of_role(Role.EXPERIMENT).items()
        if name != "run"
    }
    if "weights" in sections["model"]:
        sections["model"]["weights"] = Path(sections["model"]["weights"]).name
    return yaml.safe_dump({n: v for n, v in sections.items() if v}, sort_keys=False)


def online_scores(options: Options, folder: Path, epoch: int) -> list[str]:
    """Return lines with the accuracies that the log has of the epoch, or nothing."""
    e, lines = options.evaluate, []
    crops = f"centre crops of {options.resolution.max} px of"
    for row in read_log(folder):
        if row["epoch"] == epoch and "knn" in row:
            images = f"{crops} {file_names(options.data.validation)}"
            lines.append(
                f"Online kNN after epoch {epoch}: {row['knn']:.2%} (k = {e.k}, "
                f"T = {e.temperature:g}, at most {e.bank_samples} training images; {images})"
            )
            if "linear_top1" in row:
                top5 = f", top-5 {row['linear_top5']:.2%}" if "linear_top5" in row else ""
                lines += [
                    "",
                    f"Online linear classifier: top-1 {row['linear_top1']:.2%}{top5} (trained "
                    "beside the method on its views, with learning rate "
                    f"{e.linear_learning_rate:g} for a batch of 256; {images})",
                ]
    return lines
