"""The whole of FFSSL on two CPU cores, in minutes.

    ffssl demo [--folder runs/demo]

Images -> beton files -> a baseline and an efficient run -> a report of both. The demo runs the
commands that a user would run, and prints them. Runs that are in the folder already are kept and
only compared.
"""

import shlex
import subprocess
import sys
import time
from pathlib import Path

from ffssl.config import Options, read_options
from ffssl.config.command_line import Parser, command, exit_status
from ffssl.data.beton.read import read_beton
from ffssl.files import make_folder
from ffssl.run_folder.log import read_log
from ffssl.slowed import describe_slowed
from ffssl.tables import table

CONFIGS = {"baseline": "demo_baseline.yaml", "efficient": "demo_efficient.yaml"}
IMAGES = {"train": 4000, "val": 1000}


def main() -> int:
    parser = Parser("demo", description=__doc__)
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("runs/demo"),
        help="where everything goes (default: %(default)s)",
    )
    folder = parser.parse_args().folder
    started = time.perf_counter()
    betons = {split: folder / f"{split}.beton" for split in IMAGES}
    make_folder(folder, "--folder")
    for split, count in IMAGES.items():
        if not betons[split].exists():
            source = ("embedded", "--split", split, "--size", str(count))
            run("convert", *source, "--output", str(betons[split]))
    arguments = {
        name: [
            "--config",
            config,
            f"--data.train={betons['train']}",
            f"--data.validation={betons['val']}",
            f"--run.folder={folder / name}",
        ]
        for name, config in CONFIGS.items()
    }
    for name in CONFIGS:
        run("train", *arguments[name])

    print_table(
        {name: read_log(folder / name) for name in CONFIGS},
        raw_pixel_accuracy(read_options(arguments["baseline"])),
    )
    report, runs = folder / "report.html", [str(folder / name) for name in CONFIGS]
    run("report", *runs, "--output", str(report))
    print(
        f"\nOpen {report}. In all {time.perf_counter() - started:.0f} s. "
        f"The runs are kept in {folder}; delete it to start anew."
    )
    return 0


def run(name: str, *arguments: str) -> None:
    """Run one of FFSSL's commands and show it; exit with its status if it fails."""
    print(f"\n$ ffssl {name} {shlex.join(arguments)}", flush=True)
    status = subprocess.run(command(name, *arguments)).returncode
    if status:
        sys.exit(status)


def raw_pixel_accuracy(options: Options) -> float:
    """Return the kNN accuracy (0..1) on centred pixels instead of features.

    It tells what the data give away without any network.
    """
    import torch  # takes seconds

    from ffssl.evaluate.features import open_views
    from ffssl.evaluate.knn import knn_accuracy
    from ffssl.evaluate.labels import shared_classes

    data = options.data
    assert data.validation is not None  # the demo has drawn one
    files = {"train": data.train, "validation": data.validation}
    train, validation = (read_beton(file, data.label_field) for file in files.values())
    shared_classes(train, validation)
    pixels, labels = {}, {}
    for name, file in files.items():
        with open_views(file, data, options.resolution.max) as loader:
            batches = [
                (views.flatten(1).float(), batch_labels) for views, batch_labels, _ in loader
            ]
        pixels[name], labels[name] = (torch.cat(part) for part in zip(*batches))
    mean = pixels["train"].mean(0)
    return knn_accuracy(
        pixels["train"] - mean,
        labels["train"],
        pixels["validation"] - mean,
        labels["validation"],
        k=options.evaluate.k,
        temperature=options.evaluate.temperature,
    )


def print_table(logs: dict[str, list[dict]], raw_accuracy: float) -> None:
    """Print accuracy and cost of both runs, and the two accuracies that training must beat."""
    last = {name: rows[-1] for name, rows in logs.items()}
    base = last["baseline"]
    print(
        f"\nkNN accuracy on {IMAGES['val']} validation images: raw pixels "
        f"{raw_accuracy:.1%}, untrained network {logs['baseline'][0]['knn']:.1%}\n"
    )
    rows = [
        (
            name,
            row["epoch"],
            f"{row['knn']:.1%}",
            f"{row['flops'] / 1e12:.1f}",
            f"{base['flops'] / row['flops']:.2f}x",
            f"{row['seconds']:.1f}",
            f"{base['seconds'] / row['seconds']:.2f}x",
        )
        for name, row in last.items()
    ]
    print(table(("run", "epochs", "kNN", "TFLOP", "speed-up", "seconds", "speed-up"), rows))
    print(
        "\nTFLOP in the standard count (backward = 2 forward); seconds of training, "
        "without the evaluations."
    )
    for sentence in describe_slowed(logs):
        print(f"\n{sentence}.")


if __name__ == "__main__":
    sys.exit(exit_status(main))
