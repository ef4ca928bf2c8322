import pytest

from ffssl.command_line import exit_status
from ffssl.errors import UserError


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
