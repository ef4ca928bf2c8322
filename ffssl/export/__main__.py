r"""Write a run's backbone as a file for torchvision, timm or safetensors, and a model card.

    python -m ffssl.export runs/efficient --to torchvision --output resnet50.pth
    python -m ffssl.export runs/efficient --to safetensors --output resnet50.safetensors \
        --network teacher

The card, FILE.md, says how to load the file. It also says how the network was trained and what it
scored, as far as the run recorded that. The file holds no classifier: torchvision's networks load
it once their `fc` is an Identity.

torchvision takes ResNet-18 to -101. timm takes these and its own networks. Neither has the CIFAR
stem or resnet-small: for these choose safetensors, which FFSSL loads.
"""

import io
import sys
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from ffssl.backbones import RESNETS, TimmModel
from ffssl.config.command_line import NETWORKS, Parser, exit_status
from ffssl.config.options import ModelOptions
from ffssl.errors import UserError
from ffssl.export.model_card import model_card
from ffssl.files import replacing
from ffssl.load import backbone_of, checkpoint_path, load_run

FORMATS = ("torchvision", "timm", "safetensors")


def main() -> None:
    parser = Parser("ffssl.export", description=__doc__)
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="a run's folder, or a checkpoint file"
    )
    parser.add_argument("--to", required=True, choices=FORMATS, help="who is to load it")
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FILE", help="replaced if it is there"
    )
    parser.add_argument(
        "--network",
        default="student",
        choices=NETWORKS,
        help="whose backbone (default: %(default)s)",
    )
    arguments = parser.parse_args()
    export(arguments.run, arguments.to, arguments.output, arguments.network)
    print(f"{arguments.output}; {card_path(arguments.output)} says how to load it")


def export(run: Path, to: str, output: Path, network: str = "student") -> None:
    """Write the weights and their card. to: one of FORMATS. network: "student" or "teacher".

    Raise UserError if the run can't be loaded, the format has no such network, or the output can't
    be written.
    """
    # By which timm tells how to read a file.
    if (to == "safetensors") != (output.suffix == ".safetensors"):
        raise UserError(
            f"--output: {output}: a file for {to} must "
            f"{'' if to == 'safetensors' else 'not '}end in .safetensors"
        )
    loaded = load_run(run)
    backbone = backbone_of(loaded.method, network)
    check_fit(loaded.options.model, to)
    card = model_card(
        loaded,
        backbone,
        folder=checkpoint_path(run).parent,
        network=network,
        to=to,
        file=output.name,
    )
    for path, content in (
        (output, serialised(native_weights(backbone), to)),
        (card_path(output), card.encode("utf-8", "backslashreplace")),
    ):
        try:
            with replacing(path) as partial:
                partial.write_bytes(content)
        except OSError as error:
            raise UserError(f"--output: {path} can't be written: {error.strerror}") from error


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


def native_weights(backbone: nn.Module) -> dict[str, Tensor]:
    """Return a backbone's state under the names of its library.

    torchvision and timm use the same names for ResNets.
    """
    network = backbone.network if isinstance(backbone, TimmModel) else backbone
    return {name: tensor.contiguous() for name, tensor in network.state_dict().items()}


def serialised(weights: dict[str, Tensor], to: str) -> bytes:
    """Return the weights as a file of format `to`."""
    if to == "safetensors":
        return safetensors.torch.save(weights, {"format": "pt"})
    file = io.BytesIO()
    torch.save(weights, file)
    return file.getvalue()


def card_path(output: Path) -> Path:
    return output.with_name(output.name + ".md")


if __name__ == "__main__":
    sys.exit(exit_status(main))
