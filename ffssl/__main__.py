"""The command `ffssl`: each of the package's programs by a word.

    ffssl train --config efficient.yaml --data.train=train.beton --run.folder=runs/efficient
    python -m ffssl train ...       # the same

Nothing is imported that the program itself does not need: each starts as fast as its module.
"""

import runpy
import signal
import sys

from ffssl.errors import UserError, did_you_mean

COMMANDS = {
    "convert": ("ffssl.data.convert", "images to a beton file, which the others read"),
    "train": ("ffssl.train", "pre-train an encoder"),
    "evaluate": ("ffssl.evaluate", "kNN and linear evaluation of runs"),
    "embed": ("ffssl.embed", "features of images by a run or an exported encoder"),
    "export": ("ffssl.export", "a run's encoder as a file for other libraries"),
    "report": ("ffssl.report", "one HTML page about runs"),
    "cost": ("ffssl.cost", "FLOPs of configs, without running them"),
    "lr-range": ("ffssl.lr_range", "which learning rates a config bears"),
    "benchmark": ("ffssl.benchmark", "what this machine makes of the loader, a step, a config"),
    "study": ("ffssl.study", "a grid of recipes, methods and seeds, with one table"),
    "demo": ("ffssl.demo", "the whole on a small scale, in minutes"),
}
OWN = {"configs": "the configs and studies that come with FFSSL"}


def main() -> int:
    """Run the command that the first word names; return its exit status."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help", "--version", "configs"):
        # Without a reader (`| head`) it ends at once, as other programs do.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        print(told(name))
        return 0

    from ffssl.config.command_line import exit_status

    return exit_status(lambda: run(name, arguments))


def told(name: str) -> str:
    """Return what the front itself prints: help, version or configs."""
    if name == "configs":
        return configs_text()
    if name == "--version":
        from ffssl import __version__

        return f"ffssl {__version__}"
    lines = [f"  {name:<11}{about}" for name, (_, about) in COMMANDS.items()]
    lines += [f"  {name:<11}{about}" for name, about in OWN.items()]
    usage = "usage: ffssl COMMAND ...", "       ffssl COMMAND --help", "       ffssl --version"
    return "\n".join([*usage, "", "commands:", *lines])


def configs_text() -> str:
    """Return a table of the configs and studies that come with FFSSL."""
    from ffssl.config.named import FOLDER, listed, summary

    parts = [f"in {FOLDER}"]
    for kind, use in (("config", "ffssl train --config NAME"), ("study", "ffssl study NAME")):
        files = listed(kind)
        width = max(len(path.name) for path in files) + 2
        parts.append(f"\n{use}:")
        parts += [f"  {path.name:<{width}}{summary(path)}" for path in files]
    return "\n".join(parts)


def run(name: str, arguments: list[str]) -> None:
    """Run a command's module as `python -m` would. Raise UserError for an unknown command."""
    if name not in COMMANDS:
        known = [*COMMANDS, *OWN]
        hint = did_you_mean(name, known, cutoff=0.5)
        raise UserError(f"{name!r}: unknown command{hint} (known: {', '.join(known)})")
    sys.argv[1:] = arguments
    runpy.run_module(COMMANDS[name][0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    sys.exit(main())
