"""Damaged JPEG and beton files by the thousand, through all that reads them; each must be served or
refused, by name.

    # 20 000 cases, some minutes
    PYTHONPATH=.:tests python -m support.fuzz
    # one case again, in this process, for a debugger
    PYTHONPATH=.:tests python -m support.fuzz --first 1234 --cases 1 --here

A case follows from its seed alone. Seeds are dealt out in turn to three kinds of case:

- jpeg: a damaged JPEG through `ffssl.data.convert.jpeg`, which the converter stands on. It decodes,
  or JpegError is raised.
- decode: a damaged JPEG through the loader's compiled decoder, at every scale.
- beton: a damaged beton file through `read_beton`, sample by sample through `render_samples`, and
  as a whole through `ViewLoader`. It is refused with a UserError that begins with the file's name;
  or the loader serves the samples in order up to the first that does not decode, and refuses that
  one by its number.

What decodes must decode to the same pixels in memory that held zeros or ones before, each time
after another image: else what is served came from there. Cases run in a child process, so that a
crash or a hang (no answer in LIMIT_S) is told with its seed, and the next child goes on behind it.
Leaves with status 1 if any case crashed, hung or broke a rule.

Reads and writes out of bounds: in the kinds decode and beton the JPEG, the decoded pixels, the
whole beton file and the views lie against pages that may not be touched (`damage.Guarded`), first
at the end of their memory, then at its beginning. Not guarded is what the compiled kernels and
libjpeg allocate themselves. Numba can check the kernels' indices, but for those of simd.py:

    export NUMBA_BOUNDSCHECK=1 NUMBA_CACHE_DIR=/tmp/checked PYTHONPATH=.:tests
    python -m support.fuzz --kinds decode beton

and valgrind every access of all compiled code, simd.py and libjpeg-turbo included; Numba's has to
be compiled for a CPU that it knows, best by a first run without it:

    export NUMBA_CPU_NAME=generic NUMBA_CACHE_DIR=/tmp/generic
    export PYTHONMALLOC=malloc PYTHONPATH=.:tests
    python -m support.fuzz --cases 60
    options="--error-exitcode=1 --undef-value-errors=no --suppressions=tests/support/valgrind.supp"
    valgrind $options python -m support.fuzz --here --cases 1000

Values that are not initialised can't be looked for in this way: CPython reads some, and
libjpeg-turbo's vectors read their own padding.
"""

import argparse
import contextlib
import faulthandler
import functools
import io
import itertools
import multiprocessing
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import PIL.Image
from support.damage import Guarded, compact, damage_beton, damage_jpeg
from support.sample_images import smooth_image

from ffssl.data.beton.read import MODE_JPEG, MODE_RAW, read_beton
from ffssl.data.beton.write import MIN_PAGE_SIZE, BetonWriter
from ffssl.data.convert import jpeg
from ffssl.errors import UserError

LIMIT_S = 600  # a case takes milliseconds
SERVED, IN_PART, REFUSED, WRONG, CRASHED, HUNG = OUTCOMES = (
    "served",
    "in part",
    "refused",
    "wrong",
    "crashed",
    "hung",
)
Check = Callable[[int], str]


class Wrong(Exception):
    """A rule is broken."""


def check(seed: int) -> str:
    """Run a case.

    Returns SERVED, IN_PART or REFUSED; raises Wrong, or whatever the code under test should not
    have raised.
    """
    return KINDS[kind_of(seed)](np.random.default_rng(seed))


def kind_of(seed: int) -> str:
    return tuple(KINDS)[seed % len(KINDS)]


@functools.cache
def sound_jpegs() -> list[bytes]:
    """Small JPEGs of many kinds; the last is one whose tables are its own."""
    files = []
    for i, (height, width, mode, options) in enumerate(
        [
            (24, 32, "RGB", {}),
            (37, 51, "RGB", {"subsampling": 0}),
            (40, 40, "L", {}),
            (33, 20, "RGB", {"progressive": True}),
            (64, 48, "RGB", {"restart_marker_blocks": 2}),
            (1, 1, "RGB", {}),
            (3, 90, "RGB", {"subsampling": 1}),
            (16, 16, "CMYK", {}),
            (120, 160, "RGB", {"optimize": True}),
            (30, 30, "L", {"progressive": True}),
            (48, 48, "RGB", {"quality": 20, "optimize": True}),
        ]
    ):
        buffer = io.BytesIO()
        PIL.Image.fromarray(smooth_image(height, width, seed=i)).convert(mode).save(
            buffer, "JPEG", **{"quality": 90} | options
        )
        files.append(buffer.getvalue())
    return files


def draw_damaged_jpeg(random: np.random.Generator) -> tuple[bytes, tuple[int, int]]:
    """A damaged JPEG, and the height and width that it had before."""
    sound, other = (sound_jpegs()[i] for i in random.integers(len(sound_jpegs()), size=2))
    header = jpeg.parse_header(sound)
    return damage_jpeg(random, sound, other), (header.height, header.width)


def check_jpeg(random: np.random.Generator) -> str:
    data, _ = draw_damaged_jpeg(random)
    another = sound_jpegs()[-1]
    try:
        header = jpeg.parse_header(data)
    except jpeg.JpegError:
        return REFUSED
    for step in (
        lambda: jpeg.verify_markers(data),
        lambda: jpeg.parse_header(jpeg.to_baseline(data)),
    ):
        with contextlib.suppress(jpeg.JpegError):
            step()
    try:
        jpeg.verify(data, header)
        if not header.decodes_to_rgb:
            return REFUSED
        for denominator in (1, 2, 4, 8):
            first = jpeg.decode(data, header, denominator)
            jpeg.decode(another, jpeg.parse_header(another))
            if not np.array_equal(jpeg.decode(data, header, denominator), first):
                raise Wrong(f"decodes to other pixels after another image, at 1/{denominator}")
    except jpeg.JpegError:
        return REFUSED
    return SERVED


@functools.cache
def memory(name: str) -> Guarded:
    return Guarded(32 << 20)


def check_decode(random: np.random.Generator) -> str:
    from ffssl.data.kernels.decode import decode

    data, (height, width) = draw_damaged_jpeg(random)
    try:
        header = jpeg.parse_header(data)
        if random.integers(4):
            height, width = header.height, header.width
    except jpeg.JpegError:
        pass
    another = np.frombuffer(sound_jpegs()[-1], np.uint8)
    scratch = np.empty(3 * 48 * 48, np.uint8)
    outcomes = set()
    for denominator in (1, 2, 4, 8):
        seen = []
        for at_end in (True, False):
            if not decode(another, MODE_JPEG, 48, 48, scratch, 1):
                raise Wrong("a sound image no longer decodes")
            source = memory("source").array(len(data), at_end)
            source[:] = np.frombuffer(data, np.uint8)
            pixels = memory("pixels").array(
                3 * -(-height // denominator) * -(-width // denominator), at_end
            )
            pixels[:] = 255 * at_end
            seen.append(
                pixels.copy()
                if decode(source, MODE_JPEG, height, width, pixels, denominator)
                else None
            )
        outcomes.add(_same(seen, f"at 1/{denominator}"))
    return SERVED if outcomes == {SERVED} else REFUSED


def _same(seen: list[np.ndarray | None], what: str) -> str:
    """SERVED or REFUSED. Raises Wrong where one attempt (None: did not decode) had another outcome
    than the other.
    """
    first, second = seen
    if (first is None) != (second is None):
        raise Wrong(f"decodes only sometimes, {what}")
    if first is None:
        return REFUSED
    if not np.array_equal(first, second):
        raise Wrong(f"decodes to other pixels when memory held others, {what}")
    return SERVED


@functools.cache
def sound_betons() -> list[bytes]:
    """Small files: of JPEGs, of raw pixels, and of both."""
    files = []
    with tempfile.TemporaryDirectory() as folder:
        for kinds in ("jjjjjj", "rrr", "jrjrj"):
            path = Path(folder) / kinds
            with BetonWriter(path, len(kinds), MIN_PAGE_SIZE) as writer:
                for i, kind in enumerate(kinds):
                    data, side = sound_jpegs()[i], (10 + i, 9)
                    header = jpeg.parse_header(data)
                    if kind == "j":
                        writer.add(data, MODE_JPEG, header.width, header.height, i)
                    else:
                        writer.add(
                            smooth_image(*side, seed=i).tobytes(), MODE_RAW, side[1], side[0], i
                        )
            files.append(compact(path.read_bytes()))
    return files


@functools.cache
def scratch_folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="ffssl-fuzz-")


def check_beton(random: np.random.Generator) -> str:
    from ffssl.data.loader import ViewLoader
    from ffssl.data.policy import POLICIES

    sound = sound_betons()[random.integers(len(sound_betons()))]
    data = damage_beton(random, sound, sound_jpegs()[random.integers(len(sound_jpegs()))])
    path = Path(scratch_folder().name) / "damaged.beton"
    path.write_bytes(data)
    settings = {
        "views": 2,
        "resolution": int(random.integers(1, 33)),
        "policy": POLICIES[random.choice(["simsiam", "byol", "randaugment"])],
        "scaled_decoding": bool(random.integers(2)),
    }
    try:
        beton = read_beton(path)
        loader = ViewLoader(
            path,
            batch_size=1,
            shuffle=False,
            drop_last=False,
            workers=1,
            batches_ahead=2,
            max_resolution=32,
            **settings,
        )
    except UserError as error:
        if not str(error).startswith(f"{path}: ") or "\n" in str(error):
            raise Wrong(f"refused without the file's name or at length: {error}") from error
        return REFUSED
    expected = [render_guarded(data, beton, sample, settings) for sample in range(len(beton))]
    sound_ones = sum(1 for _ in itertools.takewhile(lambda views: views is not None, expected))
    served = 0
    with loader:
        try:
            for batch in loader:
                if served >= sound_ones or not np.array_equal(
                    batch.views[0].numpy(), expected[served]
                ):
                    raise Wrong(f"sample {served} is not served as it renders alone")
                served += 1
        except UserError as error:
            if served != sound_ones or not str(error).startswith(
                f"{path}: image {served} does not decode"
            ):
                raise Wrong(
                    f"after {served} of {sound_ones} samples that render: {error}"
                ) from error
            return IN_PART if any(views is not None for views in expected) else REFUSED
    if served != len(expected):
        raise Wrong(f"served {served} of {len(expected)} samples without an error")
    return SERVED


def render_guarded(data: bytes, beton, sample: int, settings: dict) -> np.ndarray | None:
    """The views of one sample, rendered alone between forbidden pages; None if it does not
    decode.
    """
    from ffssl.data.kernels.decode import render_samples
    from ffssl.data.policy import ViewSettings

    view_settings = ViewSettings(seed=0, **settings)
    views, side, seen = settings["views"], settings["resolution"], []
    for at_end in (True, False):
        file = memory("file").array(len(data), at_end)
        file[:] = np.frombuffer(data, np.uint8)
        file.flags.writeable = False  # as the loader's is; Numba would compile it anew
        out = memory("views").array(views * 3 * side**2, at_end)
        out[:] = 255 * at_end
        try:
            render_samples(
                file,
                beton.pointers,
                beton.sizes,
                beton.images,
                np.array([sample]),
                view_settings.counters,
                view_settings.policy_rows,
                settings["scaled_decoding"],
                view_settings.layout(1),
                0,
                out,
            )
            seen.append(out.reshape(views, 3, side, side).copy())
        except ValueError as error:
            if error.args != ("image does not decode", sample):
                raise
            seen.append(None)
    _same(seen, f"sample {sample}")
    return seen[0]


KINDS = {"jpeg": check_jpeg, "decode": check_decode, "beton": check_beton}


# Running them


def attempt(check: Check, seed: int) -> tuple[str, str]:
    """The outcome of a case, and what there is to say about it."""
    try:
        return check(seed), ""
    except Exception:
        return WRONG, traceback.format_exc()


def attempt_all_here(check: Check, seeds: Iterable[int]) -> Iterator[tuple[int, str, str]]:
    for seed in seeds:
        yield seed, *attempt(check, seed)


def attempt_all(
    check: Check, seeds: Iterable[int], limit_s: float = LIMIT_S
) -> Iterator[tuple[int, str, str]]:
    """Seed, outcome and what there is to say of each case, run in a child process, a new one after
    a crash or a hang.

    limit_s: for a case, once the child has imported what it needs.
    """
    context, child = multiprocessing.get_context("spawn"), None
    try:
        for seed in seeds:
            if child is None:
                connection, other_end = context.Pipe()
                child = context.Process(target=_serve, args=(check, other_end))
                child.start()
                other_end.close()
                connection.recv()
            connection.send(seed)
            try:
                outcome, said = (
                    connection.recv()
                    if connection.poll(limit_s)
                    else (HUNG, f"no answer within {limit_s} s")
                )
            except (EOFError, ConnectionError):
                child.join()
                outcome, said = (
                    CRASHED,
                    signal.Signals(-child.exitcode).name
                    if child.exitcode < 0
                    else f"status {child.exitcode}",
                )
            if outcome in (HUNG, CRASHED):
                child.kill()
                child = None
            yield seed, outcome, said
    finally:
        if child is not None:
            child.kill()


def _serve(check: Check, connection) -> None:
    faulthandler.enable()
    connection.send("ready")
    while True:
        try:
            seed = connection.recv()
        except EOFError:
            return
        connection.send(attempt(check, seed))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=20_000, help="how many (default: %(default)s)")
    parser.add_argument(
        "--first",
        type=int,
        default=0,
        metavar="SEED",
        help="seed of the first (default: %(default)s)",
    )
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=KINDS,
        default=list(KINDS),
        help="only cases of these kinds; the others' seeds are passed over",
    )
    parser.add_argument(
        "--here", action="store_true", help="in this process, which a crash then ends"
    )
    options = parser.parse_args()
    seeds = (seed for seed in itertools.count(options.first) if kind_of(seed) in options.kinds)
    seeds = itertools.islice(seeds, options.cases)
    counts = {kind: Counter() for kind in options.kinds}
    for seed, outcome, said in (attempt_all_here if options.here else attempt_all)(check, seeds):
        counts[kind_of(seed)][outcome] += 1
        if outcome in (WRONG, CRASHED, HUNG):
            print(
                (
                    f"seed {seed} ({kind_of(seed)}) {outcome}: {said.strip()}\n    again: "
                    f"{sys.argv[0]} --first {seed} --cases 1 --here"
                ),
                flush=True,
            )
    print(f"{'':<10}{'cases':>9}" + "".join(f"{outcome:>9}" for outcome in OUTCOMES))
    for kind, count in counts.items():
        print(
            f"{kind:<10}{count.total():>9}"
            + "".join(f"{count[outcome]:>9}" for outcome in OUTCOMES)
        )
    return int(
        any(count[outcome] for count in counts.values() for outcome in (WRONG, CRASHED, HUNG))
    )


if __name__ == "__main__":
    sys.exit(main())
