"""Evaluate the frozen backbones of runs, finished or not, and compare them in a table.

    ffssl evaluate knn runs/baseline runs/efficient
    ffssl evaluate linear runs/efficient             # 90 epochs
    ffssl evaluate linear runs/efficient --cached    # on features of centre crops

The same command continues a linear probe that was interrupted. With --cached the features are
computed once, without augmentation.

A run is its folder, or a checkpoint file. Results are added to evaluation.json beside the
checkpoint.
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
    arguments = vars(parser().parse_args())
    runs, evaluation = arguments.pop("runs"), arguments.pop("evaluation")

    # Imports torch, which takes seconds: not for --help and a mistyped option.
    from ffssl.evaluate.frozen_run import freeze
    from ffssl.evaluate.linear import Recipe, usual_batch_size
    from ffssl.evaluate.results import add_result, markdown_table, require_recordable

    names = "network train validation label_field resolution workers device amp".split()
    common = {name: arguments.pop(name) for name in names}
    for run in runs:
        # All are checked before the first takes hours.
        require_recordable(freeze(run, **common).checkpoint.parent)
    results = []
    try:
        for run in runs:
            frozen = freeze(run, **common)
            if evaluation == "knn":
                record = frozen.knn(**arguments)
            else:
                usual = usual_batch_size(frozen.images)
                recipe = Recipe(**arguments | {"batch_size": arguments["batch_size"] or usual})
                few = usual < Recipe.batch_size
                if few and recipe.learning_rate <= Recipe.learning_rate:
                    warn_of_few_images(frozen.images, recipe.learning_rate)
                record = frozen.linear(recipe)
            results.append((str(run), record))
            add_result(frozen.checkpoint.parent, record)
    finally:  # what took hours is told, whatever came after it
        if results:
            print(markdown_table(results))


def warn_of_few_images(images: int, learning_rate: float) -> None:
    print(
        f"warning: with {images} images, at a learning rate of {learning_rate:g}, the probe may "
        "end before it has converged, and rank runs wrongly; see if --learning-rate=4 gives more",
        file=sys.stderr,
    )


def parser() -> Parser:
    integer, positive = Number(int, 1), Number(float, 1e-6)
    common = Parser(add_help=False)
    common.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or a checkpoint file"
    )
    add_network(common)
    common.add_argument(
        "--train",
        type=Path,
        metavar="FILE",
        help="beton file with labels; default: the run's own, as the following",
    )
    common.add_argument("--validation", type=Path, metavar="FILE", help="beton file with labels")
    common.add_argument(
        "--label-field",
        metavar="NAME",
        help="their field of labels, where it is not clear which it is",
    )
    common.add_argument(
        "--resolution",
        type=checked(integer),
        metavar="SIDE",
        help="side of the views in pixels; default: the run's largest",
    )
    common.add_argument(
        "--workers",
        type=checked(Number(int, 0)),
        metavar="N",
        help="threads that render views; 0: one per core",
    )
    add_device_and_amp(common)
    whole = Parser("evaluate", description=__doc__)
    commands = whole.add_subparsers(dest="evaluation", required=True, metavar="{knn,linear}")
    knn = commands.add_parser(
        "knn",
        parents=[common],
        help="weighted vote of the nearest training images (Wu et al. 2018)",
    )
    knn.add_argument(
        "--k", type=checked(integer), default=200, help="neighbours (default: %(default)s)"
    )
    knn.add_argument(
        "--temperature",
        type=checked(positive),
        default=0.1,
        help="of the votes (default: %(default)s)",
    )
    linear = commands.add_parser(
        "linear",
        parents=[common],
        help="a linear classifier, trained with LARS (section B of the paper)",
    )
    linear.add_argument("--epochs", type=checked(integer), default=90, help="default: %(default)s")
    linear.add_argument(
        "--learning-rate",
        type=checked(positive),
        default=0.8,
        help="its peak, of a cosine (default: %(default)s)",
    )
    linear.add_argument(
        "--batch-size",
        type=checked(integer),
        help="default: 2048, or 1/64 of fewer than 131,072 images",
    )
    linear.add_argument(
        "--cached",
        action="store_true",
        help="train on features of centre crops, computed once: no augmentation",
    )
    return whole


if __name__ == "__main__":
    sys.exit(exit_status(main))
