r"""Compute the features of images: of a beton file, or of a folder, which need not be converted.

    ffssl embed runs/efficient photos/ --output features.npy
    ffssl embed resnet50.safetensors val.beton --output features.parquet

The encoder is a run (its folder or a checkpoint), a file that `ffssl export` wrote, or a folder
that it wrote for huggingface. Of other files of weights, name the network with --backbone.

Beside features.npy, float32 (images, d), lie features.csv, with the name and the label of each row,
and features.json, which says what computed them. Views are the centre crops of an evaluation. The
same command continues one that was interrupted.
"""

import sys
from pathlib import Path

from ffssl.config import Number
from ffssl.config.command_line import (
    Parser,
    add_device_and_amp,
    add_network,
    checked,
    exit_status,
)


def main() -> None:
    arguments = parser().parse_args()

    # Imports torch, which takes seconds: not for --help and a mistyped option.
    from ffssl.embed.embed import Settings, embed
    from ffssl.embed.feature_file import check_output
    from ffssl.embed.images import open_images
    from ffssl.encoder import check_side, load_trained
    from ffssl.errors import UserError

    check_output(arguments.output)
    encoder = load_trained(
        arguments.encoder,
        network=arguments.network,
        backbone=arguments.backbone,
        stem=arguments.stem,
    )
    side = arguments.resolution or encoder.resolution
    if side is None:
        raise UserError(
            f"{arguments.encoder}: no card beside it says the side of its images; name it with "
            "--resolution"
        )
    check_side(encoder, side)
    images = open_images(
        arguments.images,
        side,
        encoder.scaled_decoding,
        label_field=arguments.label_field,
        labels=not arguments.no_labels,
    )
    settings = Settings(
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        device=arguments.device,
        amp=arguments.amp,
        skip_unreadable=arguments.skip_unreadable,
        overwrite=arguments.overwrite,
    )
    print(embed(encoder, images, arguments.output, settings))


def parser() -> Parser:
    whole = Parser(prog="ffssl embed", description=__doc__)
    add = whole.add_argument
    add("encoder", type=Path, metavar="ENCODER", help="a run, or an exported file or folder")
    add("images", type=Path, metavar="IMAGES", help="a beton file, or a folder of images")
    add(
        "--output",
        required=True,
        type=Path,
        metavar="FILE",
        help="ends in .npy, or in .parquet (with the extra parquet)",
    )
    add("--overwrite", action="store_true", help="replace FILE, and what is unfinished of it")
    add(
        "--skip-unreadable",
        action="store_true",
        help="leave images out that can't be read, and list them, instead of stopping",
    )
    add_network(whole, "whose backbone, of a run")
    add("--backbone", metavar="NAME", help="of an exported file without its card")
    add("--stem", choices=("imagenet", "cifar"), help="likewise (default: imagenet)")
    add(
        "--resolution",
        type=checked(Number(int, 1)),
        metavar="SIDE",
        help="side of the views in pixels; default: the largest of the encoder's training",
    )
    add("--label-field", metavar="NAME", help="the beton file's field of labels")
    add(
        "--no-labels",
        action="store_true",
        help="take all images below a folder, however nested, without labels",
    )
    add(
        "--batch-size",
        type=checked(Number(int, 1)),
        default=256,
        metavar="N",
        help="images at once (default: %(default)s)",
    )
    add(
        "--workers",
        type=checked(Number(int, 0)),
        default=0,
        metavar="N",
        help="threads that decode images; 0, the default: one per core",
    )
    add_device_and_amp(whole)
    return whole


if __name__ == "__main__":
    told = "\ninterrupted; the same command continues where it was"
    sys.exit(exit_status(main, interrupted=told))
