"""Compare recipes and methods over several seeds, in one table and one picture.

    ffssl study methods.yaml                # one of FFSSL's, which `ffssl configs` lists
    ffssl study STUDY.yaml --folder runs/mine --training.epochs=2

An option of training, as in the second line, overrides that option in all runs.

The program runs one run after another, by the commands that a user would type, and prints them.
The same call again continues: finished runs are kept, an interrupted run is continued, a failed one
is tried again. After every run `table.md`, `table.json` and `picture.png` in the folder are
replaced. A study file:

    title: Warm-up and magnitude
    data: {train: train.beton, validation: val.beton}
    # or several files as one set: train: part-*.beton, or [a.beton, b.beton]
    # or drawn on the spot: embedded: {train: 4000, validation: 1000}
    seeds: [0, 1, 2]
    # Of the runs that name none, relative to this file, or one of FFSSL's; may be left out.
    config: ../demo_baseline.yaml
    # Of all runs; may be left out.
    options: {training: {epochs: 20}}
    runs:
      baseline:
      warm-up:
        against: baseline
        options: {training: {schedule: cosine-warmup, warmup_epochs: 2}}
      efficient: {against: baseline, config: ../demo_efficient.yaml}
    # May be left out; with it, every run is made once for each group.
    groups:
      simclr: {options: {method: {name: simclr}}}
      simsiam:
        options: {method: {name: simsiam}}
        runs: {efficient: {training: {learning_rate: 0.1}}}
        leave_out: [warm-up]

The command line decides an option first, then the group's `runs`, the group, the run, the study,
and the config last.
"""

import datetime
import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from ffssl.config import dotted, read_options
from ffssl.config.command_line import Parser, command, exit_status
from ffssl.config.named import find
from ffssl.data.beton.description import identity, same_samples
from ffssl.data.beton.files import beton_files
from ffssl.data.beton.several import read_betons
from ffssl.errors import UserError
from ffssl.evaluate.labels import shared_classes
from ffssl.files import exclusive_folder, make_folder, write_json
from ffssl.study.recipes import SPLITS, Run, Study, comparable, read_study

RECORD = "study.json"  # in a run's folder: how it was started, and when it finished
EMBEDDED_SPLITS = {"train": "train", "validation": "val"}  # what `ffssl convert` calls them


def main() -> int:
    usage = "%(prog)s STUDY.yaml [--folder FOLDER] [--section.option=value ...]"
    parser = Parser("study", usage=usage, description=__doc__)
    parser.add_argument("study", type=Path, metavar="STUDY.yaml", help="the study file")
    parser.add_argument(
        "--folder",
        type=Path,
        help="where everything goes (default: runs/ and the study file's name)",
    )
    arguments, overrides = parser.parse_known_args()
    file = find("study", arguments.study)
    folder = arguments.folder or Path("runs") / file.stem
    # As an exception, so that the run is ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    return conduct(read_study(file, folder, overrides), folder)


def conduct(study: Study, folder: Path) -> int:
    """Do what is left of a study in `folder`, and report.

    Return 1 if a run failed, else 0.
    """
    # Seed by seed, so that a machine whose speed drifts slows all runs alike.
    todo = [(seed, run) for seed in study.seeds for run in study.runs]
    make_folder(folder, "--folder")
    with exclusive_folder(folder, "study", "--folder") as lock:
        data = {
            split: identity(read_betons(files))
            for split, files in study.data.items()
            if exist(files)
        }
        check_classes(study, folder)
        for seed, run in todo:
            check_unchanged(study, run, seed, folder, data)
        for split, count in study.embedded.items():
            if not exist(study.data[split]):
                Path(study.data[split]).parent.mkdir(exist_ok=True)
                words = ["embedded", "--split", EMBEDDED_SPLITS[split], "--size", str(count)]
                words += ["--output", study.data[split]]
                if status := execute("convert", words, lock):
                    return status
        failed: dict[tuple[str, int], int] = {}
        for number, (seed, run) in enumerate(todo, 1):
            if finished(run.folder(folder, seed)):
                continue
            print(f"\n[{number} of {len(todo)}] {run.name}, seed {seed}", flush=True)
            if status := train(study, run, seed, folder, lock):
                failed[run.name, seed] = status
                print(
                    f"{run.name}, seed {seed}: failed with status {status}; the others go on",
                    file=sys.stderr,
                    flush=True,
                )
            report(study, folder, failed)
        print(f"\n{report(study, folder, failed)}\nPicture: {folder / 'picture.png'}")
    return 1 if failed else 0


def train(study: Study, run: Run, seed: int, study_folder: Path, lock: int) -> int:
    """Train one run to its end, from where it stands. Return the exit status."""
    folder, arguments = run.folder(study_folder, seed), run.command(study_folder, seed)
    record = {
        "command": shlex.join(["ffssl", "train", *arguments]),
        "options": comparable(read_options(arguments)),
        "data": {split: identity(read_betons(files)) for split, files in study.data.items()},
    }
    write_record(folder, record)
    status = execute("train", arguments, lock)
    if status == 0:
        write_record(
            folder, record | {"finished": datetime.datetime.now().isoformat(timespec="seconds")}
        )
    return status


def execute(name: str, arguments: list[str], lock: int) -> int:
    """Run one of FFSSL's commands, and show it.

    Return its exit status. If interrupted, end the program first.
    """
    print(f"$ ffssl {name} {shlex.join(arguments)}", flush=True)
    with subprocess.Popen(
        command(name, *arguments),
        # Should this process be killed outright, the folder stays locked until its child has ended
        # as well.
        pass_fds=[lock],
        # Ctrl-C reaches both; only one is to answer.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    ) as process:
        try:
            return process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise


def report(study: Study, folder: Path, failed: dict[tuple[str, int], int]) -> str:
    """Write the table and the picture of what has finished so far. Return the table."""
    # Imports matplotlib, which takes a second.
    from ffssl.study.table_and_picture import write_report

    records = {
        (run.name, seed): finished(run.folder(folder, seed))
        for run in study.runs
        for seed in study.seeds
    }
    done = {key: record for key, record in records.items() if record}
    typed = shlex.join(["ffssl", "study", *sys.argv[1:]])
    return write_report(study, folder, done, failed, command=typed)


def finished(folder: Path) -> dict | None:
    """Return the record of a run that has finished, else None."""
    record = read_record(folder)
    return record if record and "finished" in record else None


def read_record(folder: Path) -> dict | None:
    path = folder / RECORD
    return json.loads(path.read_text()) if path.exists() else None


def write_record(folder: Path, record: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RECORD, record)


def exist(files: str) -> bool:
    return all(path.exists() for path in beton_files(files))


def check_classes(study: Study, folder: Path) -> None:
    """Raise UserError if the files exist and their labels are of different classes.

    This is checked before any run takes hours.
    """
    if all(map(exist, study.data.values())):
        commands = [run.command(folder, study.seeds[0]) for run in study.runs]
        for field in {read_options(command).data.label_field for command in commands}:
            try:
                betons = (read_betons(study.data[split], field) for split in SPLITS)
                shared_classes(*betons, partly=True)
            except UserError as error:
                raise UserError(f"{study.path}: {error}") from error


def check_unchanged(
    study: Study, run: Run, seed: int, study_folder: Path, data: dict[str, dict]
) -> None:
    """Raise UserError if a run was started with other options or data than the study now gives.

    The message names the option or the file. data: the identity of each file that exists.
    """
    record = read_record(run.folder(study_folder, seed))
    for split, before in (record or {}).get("data", {}).items():
        if not same_samples(before, data.get(split, {})):
            raise UserError(
                f"{study.path}: {study.data[split]} holds other images than those that the run in "
                f"{run.folder(study_folder, seed)} is trained or evaluated on; "
                "put that file back, or choose another --folder"
            )
    given = dotted(comparable(read_options(run.command(study_folder, seed))))
    for name, before in dotted(record["options"] if record else {}).items():
        now = given.get(name, before)
        if now != before:
            raise UserError(
                f"{study.path}: run {run.name}: {name} is {now}, but its run in "
                f"{run.folder(study_folder, seed)} was started with {before}; put it back, give "
                "the run another name, choose another --folder, or delete "
                f"{study_folder}/seed*/{run.name} to train it anew"
            )


if __name__ == "__main__":
    sys.exit(
        exit_status(main, interrupted="\ninterrupted; the same command goes on where it stopped")
    )
