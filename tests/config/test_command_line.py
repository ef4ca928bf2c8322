import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ffssl.config.command_line import exit_status
from ffssl.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def raising(error):
    def program():
        raise error

    return program


@pytest.mark.parametrize(
    "program, words, status, told",
    [
        (lambda: None, {}, 0, ""),
        (lambda: 3, {}, 3, ""),
        (raising(UserError("--a: b")), {}, 2, "error: --a: b\n"),
        (raising(KeyboardInterrupt), {}, 130, "\ninterrupted\n"),
        (raising(KeyboardInterrupt), {"interrupted": "go on"}, 130, "go on\n"),
        (raising(KeyboardInterrupt), {"interrupted": ""}, 130, ""),
    ],
)
def test_a_programs_end_is_told_in_a_line_and_a_status(program, words, status, told, capsys):
    assert exit_status(program, **words) == status
    assert capsys.readouterr().err == told


def test_what_nobody_foresaw_is_not_swallowed():
    with pytest.raises(ZeroDivisionError):
        exit_status(raising(ZeroDivisionError))


NAME = "caf\udce9\n中"  # a byte that is no UTF-8, a line break, and what an ASCII terminal has not


def test_an_error_is_one_line_whatever_names_are_in_it(capfd):
    assert exit_status(raising(UserError(f"{NAME}: gone"))) == 2
    assert capfd.readouterr().err == "error: caf\\udce9\\n中: gone\n"


def run(code: str, *, shell: str = "", **environment) -> subprocess.CompletedProcess:
    """A program that calls `exit_status`, its output piped to what stands in `shell`."""
    code = (
        "import sys\nfrom ffssl.config.command_line import exit_status\nfrom ffssl.errors "
        f"import UserError\ndef program():\n {code}\nsys.exit(exit_status(program))"
    )
    words = [sys.executable, "-c", code]
    words = (
        ["bash", "-c", f"{shlex.join(words)} {shell}; exit ${{PIPESTATUS[0]}}"] if shell else words
    )
    return subprocess.run(
        words,
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": ""} | environment,
        capture_output=True,
        timeout=600,
    )


def test_what_a_terminal_can_not_show_is_escaped():
    result = run(f"print({NAME!r}); raise UserError({NAME!r})", PYTHONIOENCODING="ascii")
    assert (result.returncode, result.stdout, result.stderr) == (
        2,
        b"caf\\udce9\n\\u4e2d\n",
        b"error: caf\\udce9\\n\\u4e2d\n",
    )


@pytest.mark.parametrize(
    "code, told",
    [
        ("print('a')", b""),  # written at the end
        ("print('a'); sys.exit(0)", b""),  # as argparse's --help
        ("print('a' * 1_000_000)", b"\ninterrupted\n"),  # while it runs
        ("print('a', flush=True)", b"\ninterrupted\n"),
    ],
)
def test_a_program_whose_output_nobody_reads_ends_without_a_traceback(code, told):
    # For its reader to leave.
    wait = "import select; pipe = select.poll(); pipe.register(1, 0); pipe.poll(); "
    result = run(wait + code, shell="| true")
    assert (result.returncode, result.stderr) == (141, told)


def test_a_broken_pipe_of_another_kind_is_not_taken_for_that():
    result = run("raise BrokenPipeError('a worker')")
    assert result.returncode == 1 and b"BrokenPipeError: a worker" in result.stderr


def test_options_and_help_without_docstrings_and_readers():
    program = ["ffssl/train.py", "--help"]
    result = subprocess.run(
        [sys.executable, "-OO", *program], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert (
        result.returncode == 0 and "--training.learning_rate" in result.stdout and not result.stderr
    )
    command = f"{shlex.quote(sys.executable)} {shlex.join(program)} | true; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    # 0 where it was quicker than its reader.
    assert result.returncode in (0, 141) and not result.stderr
