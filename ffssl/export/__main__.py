r"""Write a run's backbone for torchvision, timm, safetensors or Hugging Face, and a model card.

    ffssl export runs/efficient --to torchvision --output resnet50.pth
    ffssl export runs/efficient --to safetensors --output resnet50.safetensors \
        --network teacher
    ffssl export runs/efficient --to huggingface --output resnet50/

The card, FILE.md, says how to load the file. It also says how the network was trained and what it
scored, as far as the run recorded that. The file holds no classifier: torchvision's networks load
it once their `fc` is an Identity.

For huggingface the output is a folder: model.safetensors, config.json, and the card as README.md.
timm.create_model("local-dir:FOLDER", pretrained=True) loads it offline (timm 1.0.16 and later), and
"hf-hub:NAME" once it is uploaded.

torchvision takes ResNet-18 to -101. timm and huggingface take these and timm's own networks. None
has the CIFAR stem or resnet-small: for these choose safetensors, which FFSSL loads.
"""

import io
import json
import sys
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from ffssl.backbones import RESNETS
from ffssl.config.command_line import Parser, add_network, exit_status
from ffssl.config.options import ModelOptions
from ffssl.errors import UserError
from ffssl.export import hugging_face
from ffssl.export.model_card import card_path, model_card
from ffssl.files import make_folder, replacing
from ffssl.load import backbone_of, checkpoint_path, load_run
from ffssl.weights import native_network

FORMATS = ("torchvision", "timm", "safetensors", "huggingface")


def main() -> None:
    parser = Parser("export", description=__doc__)
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="a run's folder, or a checkpoint file"
    )
    parser.add_argument("--to", required=True, choices=FORMATS, help="who is to load it")
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="FILE",
        help="replaced if it is there; a folder for huggingface",
    )
    add_network(parser)
    parser.add_argument(
        "--licence",
        metavar="ID",
        help="of the weights, as apache-2.0, for the card of huggingface (default: not stated)",
    )
    arguments = parser.parse_args()
    export(
        arguments.run, arguments.to, arguments.output, arguments.network, licence=arguments.licence
    )
    card = card_path(arguments.output, arguments.to)
    print(f"{arguments.output}; {card} says how to load it")


def export(
    run: Path, to: str, output: Path, network: str = "student", *, licence: str | None = None
) -> None:
    """Write the weights and their card.

    to: one of FORMATS. output: a file, or for "huggingface" a folder. network: "student" or
    "teacher". licence: of the weights, for the card of "huggingface".

    Raise UserError if the run can't be loaded, the format has no such network, or the output can't
    be written.
    """
    check_output(output, to)
    if licence and to != "huggingface":
        raise UserError(f"--licence: only the card for huggingface states it, not that for {to}")
    loaded = load_run(run)
    model = loaded.options.model
    backbone = backbone_of(loaded.method, network)
    check_fit(model, to)
    card = model_card(
        loaded,
        backbone,
        folder=checkpoint_path(run).parent,
        network=network,
        to=to,
        file=output.resolve().name,
        licence=licence,
    )
    weights = native_network(backbone).state_dict()
    files = {
        weights_path(output, to): serialised(weights, to),
        card_path(output, to): card.encode("utf-8", "backslashreplace"),
    }
    if to == "huggingface":
        config = hugging_face.timm_config(model.backbone, backbone, loaded.options.resolution.max)
        files[output / hugging_face.CONFIG] = json.dumps(config, indent=2).encode()
        make_folder(output, "--output")
    for path, content in files.items():
        try:
            with replacing(path) as partial:
                partial.write_bytes(content)
        except OSError as error:
            raise UserError(f"--output: {path} can't be written: {error.strerror}") from error


def check_output(output: Path, to: str) -> None:
    """Raise UserError for an output that `to` can't be written to."""
    # By which timm tells how to read a file.
    if to != "huggingface" and (to == "safetensors") != (output.suffix == ".safetensors"):
        raise UserError(
            f"--output: {output}: a file for {to} must "
            f"{'' if to == 'safetensors' else 'not '}end in .safetensors"
        )
    if to == "huggingface" and output.exists() and not output.is_dir():
        raise UserError(f"--output: {output}: is a file; for huggingface name a folder")


def check_fit(model: ModelOptions, to: str) -> None:
    """Raise UserError if torchvision or timm have no such network.

    model: the options of the section model.
    """
    name = model.backbone
    if to == "safetensors":
        return
    if model.stem != "imagenet":
        raise UserError(
            f"--to: {to}'s {name} has no {model.stem} stem (3x3, no pooling); choose "
            "safetensors, which FFSSL loads"
        )
    if name == "resnet-small":
        raise UserError(f"--to: {to} has no {name}; choose safetensors, which FFSSL loads")
    if to == "torchvision" and name not in RESNETS:
        raise UserError(
            f"--to: FFSSL has {name} from timm, not from torchvision; choose timm or safetensors"
        )


def serialised(weights: dict[str, Tensor], to: str) -> bytes:
    """Return the weights as a file of format `to`."""
    weights = {name: tensor.contiguous() for name, tensor in weights.items()}
    if to in ("safetensors", "huggingface"):
        return safetensors.torch.save(weights, {"format": "pt"})
    file = io.BytesIO()
    torch.save(weights, file)
    return file.getvalue()


def weights_path(output: Path, to: str) -> Path:
    return output / hugging_face.WEIGHTS if to == "huggingface" else output


if __name__ == "__main__":
    sys.exit(exit_status(main))
