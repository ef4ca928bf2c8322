"""Write a run's backbone as a file that torchvision, timm or safetensors take, with a model card beside it.

    python -m ffssl.export runs/efficient --to torchvision --output resnet50.pth
    python -m ffssl.export runs/efficient --to safetensors --output resnet50.safetensors --network teacher

The card, FILE.md, says how to load the file, and, as far as the run recorded it, how it was trained and what it scored. There is no
classifier in the file. torchvision takes ResNet-18 to -101, timm these and its own networks; neither has the CIFAR stem or resnet-small,
which safetensors keeps for FFSSL.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from ffssl.command_line import Parser, exit_status
from ffssl.errors import UserError

FORMATS = ("torchvision", "timm", "safetensors")


def main() -> None:
    parser = Parser(prog="python -m ffssl.export", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, or a checkpoint file")
    parser.add_argument("--to", required=True, choices=FORMATS, help="who is to load it")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="replaced if it is there")
    parser.add_argument("--network", default="student", choices=("student", "teacher"), help="whose backbone (default: %(default)s)")
    arguments = parser.parse_args()
    export(arguments.run, arguments.to, arguments.output, arguments.network)
    print(f"{arguments.output}, {card_path(arguments.output)}")


def export(run: Path, to: str, output: Path, network: str = "student") -> None:
    """Write the weights and their card. Raises UserError for a run that can't be loaded, a network that does not fit and a bad output."""
    import torch  # seconds, as the next: not for --help and a mistyped option
    from safetensors.torch import save_file

    from ffssl.model_card import model_card
    from ffssl.runs import backbone_of, checkpoint_path, load_run

    if (to == "safetensors") != (output.suffix == ".safetensors"):
        raise UserError(f"--output: {output}: a file {'must' if to == 'safetensors' else 'for ' + to + ' must not'} end in .safetensors")
    loaded = load_run(run)
    backbone = backbone_of(loaded.method, network)
    check_fit(loaded.options.model, to)
    card = model_card(loaded, backbone, folder=checkpoint_path(run).parent, network=network, to=to, file=output.name)
    weights = native_weights(backbone)
    write = (lambda path: save_file(weights, path, {"format": "pt"})) if to == "safetensors" else (lambda path: torch.save(weights, path))
    replace_whole(output, write)
    replace_whole(card_path(output), lambda path: path.write_text(card, encoding="utf-8"))


def check_fit(model: SimpleNamespace, to: str) -> None:
    """Raises UserError where torchvision or timm have no such network. `model`: the options of the section model."""
    from ffssl.backbones import RESNETS

    name = model.backbone
    if to == "safetensors":
        return
    if model.stem != "imagenet":
        raise UserError(f"--to: {to}'s {name} has no {model.stem} stem (3x3, no pooling); choose safetensors, which FFSSL loads")
    if name == "resnet-small" or (to == "torchvision" and name not in RESNETS):
        other = "safetensors, which FFSSL loads" if name == "resnet-small" else "timm or safetensors"
        raise UserError(f"--to: {to} has no {name}; choose {other}")


def native_weights(backbone) -> dict:
    """The state of a backbone by the names that its library gives: torchvision's and timm's are the same for ResNets."""
    from ffssl.backbones import TimmModel

    network = backbone.network if isinstance(backbone, TimmModel) else backbone
    return {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}


def card_path(output: Path) -> Path:
    return output.with_name(output.name + ".md")


def replace_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Have a file written under a hidden name, which takes its own once it is whole."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch and safetensors raise either
        raise UserError(f"--output: {path} can't be written: {' '.join(str(error).split())}") from error
    finally:
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(exit_status(main))
