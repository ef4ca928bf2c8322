"""Convert images to FFCV's .beton files, from which FFSSL trains."""

import argparse
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from ffssl.config.command_line import Parser, exit_status
from ffssl.errors import UserError
from ffssl.printable import printable

EXAMPLES = """\
examples:
  # a folder of class folders, photographs reduced to 500 pixels
  ffssl convert folder --input photos/ --output photos.beton --max-side 500

  # ImageNet; the validation images may lie flat, with the devkit beside them
  ffssl convert imagenet --input imagenet/ --split train \\
      --output train.beton --max-side 500
  ffssl convert imagenet --input imagenet/ --split val \\
      --output val.beton --max-side 500

  # something to try at once, without any download
  ffssl convert embedded --split train --size 2000 --output demo.beton

JPEG files that need no change keep their bytes.
`ffssl convert SOURCE --help` lists a source's options.
"""


def build_parser(program: str) -> Parser:
    common = _common_options()
    parser = Parser(prog=program, description=__doc__, epilog=EXAMPLES)
    sources = parser.add_subparsers(dest="source", required=True, metavar="SOURCE", title="sources")

    def add(name: str, summary: str, details: str = "") -> Parser:
        return sources.add_parser(
            name, parents=[common], help=summary, description=f"{summary}.\n{details}"
        )

    _add_folders(add)
    _add_downloads(add)
    _add_archives(add)

    embedded = add("embedded", "FFSSL's own small data set, drawn on the spot")
    _add_split(embedded, "train", "val")
    embedded.add_argument(
        "--size", type=int, default=2000, metavar="N", help="number of images (default: 2000)"
    )
    embedded.add_argument("--seed", type=int, default=0, help="draw other images (default: 0)")
    return parser


def _common_options() -> Parser:
    """Declare the options of all sources."""
    common = Parser(add_help=False)

    output = common.add_argument_group("output")
    output.add_argument(
        "--output", "-o", required=True, type=Path, metavar="FILE", help="the .beton file to write"
    )
    output.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    output.add_argument(
        "--max-side",
        type=int,
        metavar="PX",
        help="reduce images whose longer side is larger (default: keep sizes)",
    )
    output.add_argument(
        "--jpeg-quality",
        type=int,
        default=90,
        metavar="Q",
        help="of images that must be encoded, 0 to 100 (default: 90)",
    )
    output.add_argument(
        "--white-level",
        type=int,
        default=65535,
        metavar="V",
        help="the value that is white in images of 16 bits a channel, as 4095 for data of 12 bits "
        "(default: 65535)",
    )
    output.add_argument(
        "--compressed-share",
        type=float,
        default=1.0,
        metavar="P",
        help="share of images stored as JPEG, the rest as raw pixels, larger and faster "
        "(default: 1)",
    )

    run = common.add_argument_group("run")
    run.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes; the file does not depend on it (default: the cores, %(default)s here)",
    )
    run.add_argument(
        "--subset",
        type=int,
        metavar="N",
        help="only N images, drawn at random but the same each time; "
        "smaller subsets are part of larger ones",
    )
    run.add_argument(
        "--subset-seed", type=int, default=0, metavar="S", help="draw another subset (default: 0)"
    )
    run.add_argument(
        "--part",
        type=_part,
        default=(1, 1),
        metavar="K/N",
        help="only the K-th of N parts of the images, from 1, so that N machines share the work; "
        "train on all N files together (default: 1/1, all)",
    )
    run.add_argument(
        "--skip-broken",
        action="store_true",
        help="leave broken images out and list them, instead of stopping at the first",
    )
    run.add_argument(
        "--quick-check",
        action="store_true",
        help="only check that JPEG files are complete and their headers sound, "
        "not that all of their data decodes",
    )
    run.add_argument(
        "--no-progress",
        action="store_true",
        help="no progress bar (there is none either when stderr is not a terminal)",
    )
    return common


def _part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"expected K/N, as 3/8, got {text!r}")
    return int(match[1]), int(match[2])


def _add_input(source: Parser, metavar: str, text: str, **options) -> None:
    source.add_argument("--input", "-i", required=True, metavar=metavar, help=text, **options)


def _add_split(source: Parser, *names: str) -> None:
    source.add_argument("--split", choices=names, default=names[0], help=f"default: {names[0]}")


def _add_no_labels(source: Parser) -> None:
    source.add_argument(
        "--no-labels", action="store_true", help="all images without labels (label -1)"
    )


def _add_folders(add: Callable[..., Parser]) -> None:
    folder = add(
        "folder",
        "images in a folder, one folder a class",
        "Without class folders the images are unlabelled (label -1). Links are followed; an image\n"
        "is taken once.",
    )
    _add_input(folder, "DIR", "the folder")
    folder.add_argument(
        "--no-labels",
        action="store_true",
        help="take all images below DIR, however nested, without labels",
    )

    imagenet = add("imagenet", "ImageNet (ILSVRC 2012), already extracted")
    _add_input(imagenet, "DIR", "holds train/ or val/, or the images themselves")
    _add_split(imagenet, "train", "val")
    imagenet.add_argument(
        "--val-labels",
        metavar="PATH",
        help="labels of validation images that do not lie in class folders: the devkit (folder or "
        ".tar.gz) or LOC_val_solution.csv (default: found beside them)",
    )


def _add_downloads(add: Callable[..., Parser]) -> None:
    imagenette = add("imagenette", "Imagenette, downloaded if need be")
    _add_input(imagenette, "DIR", "where it is or shall be put")
    _add_split(imagenette, "train", "val")
    imagenette.add_argument(
        "--size", choices=("full", "320px", "160px"), default="full", help="default: full"
    )

    cifar10 = add(
        "cifar10",
        "CIFAR-10, downloaded if need be",
        "Pixels: --compressed-share 0 stores them exactly.",
    )
    _add_input(cifar10, "DIR", "where it is or shall be put")
    _add_split(cifar10, "train", "test")

    stl10 = add(
        "stl10",
        "STL-10, downloaded if need be",
        "Pixels: --compressed-share 0 stores them exactly.",
    )
    _add_input(stl10, "DIR", "where it is or shall be put")
    _add_split(stl10, "train", "test", "unlabeled", "train+unlabeled")


def _add_archives(add: Callable[..., Parser]) -> None:
    huggingface = add(
        "huggingface",
        "Hugging Face data sets in Parquet files",
        "Needs pyarrow: pip install 'ffssl[huggingface]'.",
    )
    _add_input(
        huggingface, "PATH", "Parquet files, patterns, or the folder that holds them", nargs="+"
    )
    huggingface.add_argument(
        "--split",
        metavar="NAME",
        help="in a folder, only the files of this split, as NAME-*.parquet",
    )
    huggingface.add_argument("--image-column", metavar="NAME", help="default: found by its type")
    huggingface.add_argument(
        "--label-column",
        metavar="NAME",
        help="numbers or texts (default: the column with class names, or label)",
    )
    _add_no_labels(huggingface)

    webdataset = add(
        "webdataset",
        "WebDataset tar shards, images (.jpg, .png, .webp, ...) and labels (.cls, .json, .txt)",
        "A label is the integer in .cls; or what .json has under label, cls, class or target; or,\n"
        "where all .txt are integers, that.",
    )
    _add_input(
        webdataset,
        "SHARDS",
        "shards, in quotes: 'train-{000..146}.tar', 'shards/*.tar', or their folder",
        nargs="+",
    )
    _add_no_labels(webdataset)


def open_source(options: argparse.Namespace):
    """Open the source that the command line names.

    Modules are imported here, since some need packages that others do not.
    """
    match options.source:
        case "folder":
            from ffssl.data.convert.sources.folder import ImageFolder

            return ImageFolder(options.input, labels=not options.no_labels)
        case "imagenet":
            from ffssl.data.convert.sources.imagenet import ImageNet

            return ImageNet(options.input, options.split, options.val_labels)
        case "imagenette":
            from ffssl.data.convert.sources.torchvision_sets import Imagenette

            return Imagenette(options.input, options.split, options.size)
        case "cifar10":
            from ffssl.data.convert.sources.torchvision_sets import Cifar10

            return Cifar10(options.input, options.split)
        case "stl10":
            from ffssl.data.convert.sources.torchvision_sets import Stl10

            return Stl10(options.input, options.split)
        case "huggingface":
            from ffssl.data.convert.sources.huggingface import HuggingFace

            labels = not options.no_labels and options.label_column != ""
            return HuggingFace(
                options.input, options.split, options.image_column, options.label_column, labels
            )
        case "webdataset":
            from ffssl.data.convert.sources.webdataset import WebDataset

            return WebDataset(options.input, labels=not options.no_labels)
        case "embedded":
            from ffssl.data.convert.sources.embedded import Embedded

            return Embedded(options.split, options.size, options.seed)


def run(options: argparse.Namespace) -> None:
    from ffssl.data.convert.conversion import ConvertOptions, check_output, convert
    from ffssl.data.convert.encode import Encoding

    convert_options = ConvertOptions(
        encoding=Encoding(
            options.max_side, options.jpeg_quality, options.quick_check, options.white_level
        ),
        compressed_share=options.compressed_share,
        workers=options.workers,
        subset=options.subset,
        subset_seed=options.subset_seed,
        part=options.part,
        skip_broken=options.skip_broken,
        overwrite=options.overwrite,
        progress=not options.no_progress,
    )
    check_output(options.output, options.overwrite)  # before a source is scanned for minutes
    print_summary(convert(open_source(options), options.output, convert_options))


def print_summary(summary) -> None:
    classes = f"{summary.labels} different labels without names" if summary.labels else "no labels"
    if summary.class_names:
        classes = f"{len(summary.class_names)} classes"
    rate = summary.samples / summary.seconds
    size = f"{summary.file_bytes / 1e6:.1f} MB"
    print(f"{summary.path}: {summary.samples} samples, {classes}, {size}")
    counts = ", ".join(f"{count} {how}" for how, count in summary.counts.items() if count)
    print(f"  {counts}; {rate:.0f} image/s")
    print(f"  sha256 {summary.sha256}")
    if summary.unlabelled and summary.labels:
        print(f"  {summary.unlabelled} samples without a label (-1)")
    if summary.passed_over:
        total = sum(count for _, count, _ in summary.passed_over)
        kinds = ", ".join(f"{count} {kind}" for kind, count, _ in summary.passed_over)
        print(f"  {total} files passed over: {kinds}")
        firsts = ", ".join(printable(first) for _, _, first in summary.passed_over)
        print(f"    the first of each: {firsts}")
    for note in summary.notes:
        print(f"  {printable(note)}")
    if summary.skipped:
        print(f"  {len(summary.skipped)} broken images skipped:")
        for name, reason in summary.skipped:
            print(f"    {printable(name)}: {reason}")


def main(program: str = "ffssl convert") -> int:
    """Run the command; return its exit status.

    program: its name in messages.

    0: done. 1: the run failed, for example at a broken image. 2: a mistake in the options. 130:
    Ctrl-C.
    """
    # SIGTERM becomes an exception, so that the unfinished file is removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    options = build_parser(program).parse_args()
    try:
        run(options)
    except UserError as error:
        from ffssl.data.beton.write import BetonWriteError
        from ffssl.data.convert.conversion import ConversionError

        if not isinstance(error, (BetonWriteError, ConversionError)):
            raise
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; {options.output} was not written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
