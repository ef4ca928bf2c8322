r"""Pre-train an image encoder without labels.

    ffssl train --config efficient.yaml --data.train=train.beton --run.folder=runs/efficient
    ffssl train --config ... --training.epochs=50       # any option can be overridden
    ffssl train --help                                  # all options
    torchrun --nproc_per_node=8 -m ffssl train ...      # on 8 GPUs, see docs/many-gpus.md
    python ffssl/train.py ...                           # in a checkout

`ffssl configs` lists the configs that come with FFSSL; a path names one of your own.
The same command again continues an interrupted run, from the very next batch after its checkpoint.
SIGTERM, SIGUSR1 and Ctrl-C save a checkpoint and exit, with status 75, 75 and 130.
"""

import faulthandler
import sys

from ffssl.config import Options, command_line_options
from ffssl.config.command_line import exit_status
from ffssl.data.turbojpeg import check_turbojpeg
from ffssl.parallel.openmp import share_cores

if __name__ == "__main__":
    # Print the stack if a disk fails under a mapped file (SIGBUS).
    faulthandler.enable(2)
    # Before the import of torch, which takes seconds, so that --help and a mistyped option are
    # answered at once.
    OPTIONS = command_line_options(__doc__)
    share_cores()
    # If it is missing, a line says so here, and a traceback in the imports below.
    if status := exit_status(check_turbojpeg):
        sys.exit(status)

import contextlib

from ffssl.errors import Stopped
from ffssl.prepare import Prepared, prepared
from ffssl.training.epoch import Epoch, end_epoch
from ffssl.training.memory import with_memory_advice
from ffssl.training.step import train_step


def train(options: Options) -> None:
    """Train to the last epoch, from the folder's checkpoint if there is one.

    Called by all ranks. Raise UserError, FloatingPointError if the loss diverges, Stopped after a
    signal, and ConnectionError if another rank is lost.
    """
    with prepared(options) as prep:
        run, record = prep.run, prep.record
        if not run.resumed:
            record.untrained(run.spent | evaluate(prep))
            record.save(run)
        while run.epoch < options.training.epochs:
            shape = run.schedule.shape(run.epoch)
            prep.compiler.begin(shape)
            batch = shape.of_batch(prep.loader.batch_size)
            with_memory_advice(run, batch, lambda: train_epoch(prep))
            run.totals.average_over_ranks()
            accuracies = {}
            if evaluation_is_due(options, run.epoch + 1):
                record.save(run)
                accuracies = evaluate(prep)
            row = end_epoch(run, prep.loader, prep.flops) | accuracies
            record.epoch(row, run)
            record.save(run)


def train_epoch(prep: Prepared) -> None:
    """Train on the batches that are left of the current epoch."""
    run, record = prep.run, prep.record
    run.method.train()
    with Epoch(run, prep.loader) as epoch:
        for views, labels in epoch:  # views on the device; timed, seeded, with a progress bar
            epoch.add(train_step(run, views, epoch.step, labels))  # waits for nothing
            saving = bool(prep.stop) or record.due()
            if epoch.check_is_due(saving):
                loss, saving = epoch.check(saving)  # waits for the GPU and the other ranks
                learning_rate, _ = run.schedule.learning_rate_and_momentum(epoch.step - 1)
                record.step(epoch.step, loss, learning_rate)
                if saving:
                    run.totals.average_over_ranks()
                    record.save(run)
                    prep.stop.check()  # raises Stopped


def evaluation_is_due(options: Options, epochs_done: int) -> bool:
    every, last = options.evaluate.every, epochs_done == options.training.epochs
    due = last or (every > 0 and epochs_done % every == 0)
    return due and bool(options.data.validation)


def evaluate(prep: Prepared) -> dict[str, float]:
    """Return the accuracies on rank 0, and an empty dict on the other ranks.

    The other ranks wait for rank 0. Raise Stopped on all ranks if one of them has received a
    signal.
    """
    run, accuracies = prep.run, {}
    if run.options.data.validation:
        # All ranks raise Stopped together below, so that none is left waiting.
        with contextlib.suppress(Stopped):
            if prep.knn:
                with prep.stop.interruptible():
                    accuracies = prep.knn.accuracies(run.method.backbone, run.amp, run.classifier)
        prep.stop.check()
    return accuracies


def main(options: Options) -> int:
    """Train. Return the exit status, and print in one line why training ended early, if it did."""
    again = "the same command continues"
    try:
        train(options)
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        print(f"{stopped}; {again} where it was", file=sys.stderr)
        return stopped.status
    except BrokenPipeError:  # of its output, as any program's; it is a ConnectionError
        raise
    except ConnectionError as error:
        print(f"error: {error}; {again} after the last checkpoint", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    told = "interrupted; the same command continues after the last checkpoint"
    sys.exit(exit_status(lambda: main(OPTIONS), interrupted=told))
