"""Write the report's files."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from ffssl.errors import UserError
from ffssl.files import replacing
from ffssl.parallel.device import choose_device
from ffssl.report.page import compose
from ffssl.report.runs import read_runs


def write_report(folders: list[Path], output: Path, device: str = "auto") -> Path:
    """Write the page of the runs in `folders`, and PNGs of its pictures to a folder beside it.

    Return that folder.

    Raise UserError if a folder holds no run, or if nothing can be written.
    """
    place = choose_device(device, "--device")
    runs = read_runs(folders)
    if output.is_dir():
        raise UserError(f"--output: {output} is a folder; name the page, as {output}/report.html")
    beside = output.with_name(f"{output.stem}_pictures")
    with _writing(output):  # before what takes minutes
        beside.mkdir(parents=True, exist_ok=True)
    page, pictures = compose(runs, place)
    with _writing(output):
        for path, content in (
            *((beside / name, png) for name, png in pictures.items()),
            (output, page.encode("utf-8", "backslashreplace")),
        ):
            with replacing(path) as partial:
                partial.write_bytes(content)
    return beside


@contextlib.contextmanager
def _writing(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--output: {output} and the pictures beside it can't be written: {error.strerror}"
        ) from error
