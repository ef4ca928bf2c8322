"""The command `ffssl`, and what starting costs."""

import importlib.util
import resource
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from ffssl.__main__ import COMMANDS
from ffssl.config.command_line import command, typed_command

HEAVY = {"torch", "numpy", "numba", "yaml", "fastargs", "PIL", "matplotlib", "ffcv"}


def imported(*words: str) -> set[str]:
    """Return the top-level modules that a Python program imports, site's own left out."""
    told = subprocess.run(
        [sys.executable, "-X", "importtime", *words], capture_output=True, text=True, check=True
    ).stderr
    names = (line.rpartition("|")[2].strip() for line in told.splitlines())
    return {name.partition(".")[0] for name in names}


def seconds(*words: str) -> float:
    """Return the least of several processor times, which other work on the machine adds little to.

    Nothing here waits, so that without other work it is the time that passes.
    """
    times = []
    for _ in range(5):
        subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(used.ru_utime + used.ru_stime)
    return min(after - before for before, after in pairwise(times))


def test_importing_the_package_takes_no_time_and_no_torch():
    assert not imported("-c", "import ffssl") & HEAVY
    assert seconds("-c", "import ffssl") < 0.1 + seconds("-c", "")


def test_help_takes_no_time_and_no_torch():
    program = command("--help")[1:]
    assert not imported(*program) & HEAVY
    assert seconds(*program) < 0.2 + seconds("-c", "")


def of_this_checkout(name: str) -> str:
    """Return a command's module, or skip the test if the checkout has none."""
    module = COMMANDS[name][0]
    if name == "embed" and not importlib.util.find_spec(module):
        pytest.skip(f"this checkout has no {module}")
    return module


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_module_that_runs(name):
    spec = importlib.util.find_spec(of_this_checkout(name))
    file = Path(spec.origin)
    program = file.with_name("__main__.py") if spec.submodule_search_locations else file
    assert 'if __name__ == "__main__":\n' in program.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_calls_itself_as_it_is_typed(name):
    of_this_checkout(name)
    result = subprocess.run(command(name, "--help"), capture_output=True, text=True, timeout=600)
    assert result.returncode == 0 and f"ffssl {name}" in result.stdout, result.stderr


def test_without_a_command_the_help_is_printed():
    help_text = subprocess.run(command("--help"), capture_output=True, text=True).stdout
    program = command("--help")[:-1]
    assert subprocess.run(program, capture_output=True, text=True).stdout == help_text


@pytest.mark.parametrize(
    "module, told",
    [
        ("ffssl.lr_range", "ffssl lr-range '--a=b c'"),
        ("ffssl.data.convert.__main__", "ffssl convert '--a=b c'"),
        ("pytest.__main__", "python ffssl/train.py '--a=b c'"),
        (None, "python ffssl/train.py '--a=b c'"),
    ],
)
def test_a_command_is_told_as_it_would_be_typed(module, told, monkeypatch):
    # `ffssl` and `python -m` leave the name of the module that they run.
    main = SimpleNamespace(__spec__=module and SimpleNamespace(name=module))
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "argv", ["ffssl/train.py", "--a=b c"])
    assert typed_command() == told
