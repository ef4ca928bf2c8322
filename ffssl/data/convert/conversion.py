"""Convert a source of images to a beton file, in parallel.

The bytes are the same whatever the number of workers.

    from ffssl.data.convert.conversion import ConvertOptions, Encoding, convert
    from ffssl.data.convert.sources.folder import ImageFolder

    if __name__ == "__main__":  # worker processes import the main module
        options = ConvertOptions(Encoding(max_side=500))
        summary = convert(ImageFolder("photos"), "photos.beton", options)

A description, `photos.beton.json`, is written beside the file: class names, options, counts, what
was left out, and the file's checksum.
"""

import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

import ffssl
from ffssl.data.beton.description import description_path
from ffssl.data.beton.read import read_beton
from ffssl.data.beton.write import BetonWriter, check_writable
from ffssl.data.convert.encode import (
    BrokenImage,
    EncodedImage,
    Encoding,
    How,
    depth_notes,
    encode_image,
)
from ffssl.data.convert.sources import UNLABELLED, Source
from ffssl.data.convert.workers import WorkerDied, WorkersNotStarted, leave_if_worker, map_in_order
from ffssl.errors import UserError
from ffssl.files import write_json

_LARGE = 100 * 10**6  # pixels; 16 threads of the loader take 5 GB for such an image


class ConversionError(UserError):
    """The run failed at a sample, a worker or a device, though the options were sound."""


@dataclass(frozen=True)
class ConvertOptions:
    """How to convert.

    encoding: size limit, JPEG quality and more.
    compressed_share: fraction of the samples stored as JPEG; the rest is stored as raw pixels. A
        hash of a sample's index decides which.
    workers: processes that encode; with 1 the caller's own process encodes.
    subset: number of samples to take, in the source's order; all by default. They are those with
        the least hash of (subset_seed, index): random, repeatable, and a smaller subset is part of
        a larger one.
    part: (k, n), the k-th of n parts of these samples, from 1: a run of consecutive samples. The
        parts of a source hold each sample once, and their lengths differ by one at most. Labels
        and class names are those of the whole source.
    skip_broken: leave broken images out instead of stopping.
    overwrite: replace a file that exists.
    progress: show a progress bar on a terminal.

    Raises UserError for values out of range.
    """

    encoding: Encoding = field(default_factory=Encoding)
    compressed_share: float = 1.0
    workers: int = 1
    subset: int | None = None
    subset_seed: int = 0
    part: tuple[int, int] = (1, 1)
    skip_broken: bool = False
    overwrite: bool = False
    progress: bool = True

    def __post_init__(self):
        if not 0 <= self.compressed_share <= 1:
            raise UserError(
                f"compressed share {self.compressed_share}: must be 0 to 1 (--compressed-share)"
            )
        if self.workers < 1:
            raise UserError(f"{self.workers} workers: must be at least 1 (--workers)")
        if self.subset is not None and self.subset < 1:
            raise UserError(f"subset {self.subset}: must be at least 1 (--subset)")
        k, n = self.part
        if not 1 <= k <= n:
            raise UserError(f"part {k}/{n}: must be the k-th of n parts, from 1 (--part)")


@dataclass(frozen=True)
class Summary:
    r"""What was written.

    labels: number of different labels.
    unlabelled: number of samples without a label.
    counts: samples by `How`.
    skipped: (name, reason) of each broken image that was left out.
    passed_over: (kind, count, first name) of the files that the source does not take for images.
    largest: (name, width, height) of the stored image with most pixels.
    notes: sentences on what is special about the images.

    Names are text that can be printed: a byte that is not UTF-8 is written as \xe9.
    """

    path: Path
    samples: int
    class_names: list[str] | None
    labels: int
    unlabelled: int
    file_bytes: int
    counts: dict[str, int]
    skipped: list[tuple[str, str]]
    passed_over: list[tuple[str, int, str]]
    largest: tuple[str, int, int]
    notes: list[str]
    sha256: str
    seconds: float


def convert(
    source: Source, path: str | os.PathLike, options: ConvertOptions = ConvertOptions()
) -> Summary:
    """Write the images and labels of `source` to a beton file.

    The file gets its name, `path`, when it is whole. A failed or interrupted run leaves what was
    there before. A description is written to `path`.json.

    Raises UserError for options that do not fit and for a program that workers can't import;
    ConversionError for a broken image, a failing source or a worker that was killed;
    BetonWriteError when writing fails.
    """
    leave_if_worker()
    path = Path(path)
    started = time.monotonic()
    check_output(path, options.overwrite)
    indices = select_part(
        select_subset(len(source), options.subset, options.subset_seed), *options.part
    )
    counts: Counter[str] = Counter()
    labels: Counter[int] = Counter()
    skipped: list[tuple[str, str]] = []
    largest, peaks = ("", 0, 0), []

    # Closed explicitly, since an exception's traceback would keep the generator and its workers
    # alive.
    with (
        BetonWriter(path, max_samples=len(indices)) as writer,
        closing(_encoded(source, indices, options)) as results,
    ):
        for index, result in zip(indices.tolist(), results, strict=True):
            if isinstance(result, _Broken):
                if not options.skip_broken:
                    raise ConversionError(
                        f"{result.name}: {result.reason}; repair it, or pass --skip-broken"
                    )
                skipped.append((result.name, result.reason))
                continue
            image, label = result
            writer.add(image.data, image.mode, image.width, image.height, label)
            counts[image.how.value] += 1
            labels[label] += 1
            if image.width * image.height > largest[1] * largest[2]:
                largest = (source.name(index), image.width, image.height)
            if image.peak is not None:
                peaks.append(image.peak)
        if len(writer) == 0:
            raise ConversionError(
                f"{path}: not written: all {len(skipped)} images are broken; the first, "
                f"{': '.join(skipped[0])}"
            )
        sha256 = writer.finish()

        # A description must never lie beside a file that it does not describe, even if this process
        # is killed here.
        try:
            description_path(path).unlink(missing_ok=True)
        except OSError as error:
            raise ConversionError(
                f"{description_path(path)}: cannot be replaced: {error.strerror}; "
                f"{path} was not written"
            ) from error
    class_names = source.class_names
    if class_names is not None:
        class_names = [_as_text(name) for name in class_names]
    summary = Summary(
        path=path,
        samples=sum(counts.values()),
        class_names=class_names,
        labels=len(labels.keys() - {UNLABELLED}),
        unlabelled=labels[UNLABELLED],
        file_bytes=path.stat().st_size,
        counts={how.value: counts[how.value] for how in How},
        skipped=[(_as_text(name), _as_text(reason)) for name, reason in skipped],
        passed_over=[
            (_as_text(kind), count, _as_text(first)) for kind, count, first in source.passed_over
        ],
        largest=(_as_text(largest[0]), *largest[1:]),
        notes=depth_notes(peaks, options.encoding.white_level) + _size_notes(*largest),
        sha256=sha256,
        seconds=time.monotonic() - started,
    )
    _write_description(summary, source, options)
    return summary


def _as_text(name: str) -> str:
    r"""Make a name printable: write bytes that are not UTF-8, and control characters, as \xe9."""

    def escape(found: re.Match) -> str:
        code = ord(found[0])
        code -= 0xDC00 if 0xDC80 <= code <= 0xDCFF else 0  # where Python keeps such a byte
        return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"

    return re.sub("[\x00-\x1f\x7f\ud800-\udfff]", escape, name)


def check_output(path: Path, overwrite: bool) -> None:
    """Raise UserError unless a beton file may be put at `path`, and its description beside it."""
    check_writable(path)
    description = description_path(path)
    if description.exists() and not description.is_file():
        raise UserError(
            f"{description}: is not a file, and the description of {path.name} belongs there; "
            "choose another name, or move it away"
        )
    if path.exists() and not overwrite:
        raise UserError(f"{path}: exists already; pass --overwrite to replace it")


def select_subset(count: int, subset: int | None, seed: int) -> np.ndarray:
    """Return the indices of a subset of `count` samples: int64 (subset,), ascending.

    Raises UserError if there are fewer than `subset` samples.
    """
    if subset is None:
        return np.arange(count)
    if subset > count:
        raise UserError(f"subset {subset}: the source has only {count} images (--subset)")
    return np.sort(np.argsort(_hash(np.arange(count), seed), kind="stable")[:subset])


def select_part(indices: np.ndarray, k: int, n: int) -> np.ndarray:
    """Return the k-th of n parts of `indices`, from 1: consecutive ones.

    Raises UserError if there are fewer than n indices, since a part would be empty.
    """
    if len(indices) < n:
        raise UserError(f"part {k}/{n}: there are only {len(indices)} images (--part)")
    return np.array_split(indices, n)[k - 1]


def is_compressed(indices: np.ndarray, share: float) -> np.ndarray:
    """Return which samples are stored as JPEG: bool, of the shape of `indices`.

    They are a `share` of all samples, chosen by a hash of their index.
    """
    # The upper 53 bits make an exact float64 in [0, 1), so shares of 0 and 1 are exact as well.
    return (_hash(indices, seed=0x6A706567) >> np.uint64(11)) * 2.0**-53 < share


def _hash(indices: np.ndarray, seed: int) -> np.ndarray:
    """Hash indices: return uint64, of the shape of `indices`.

    The hash is SplitMix64's output function (Steele et al. 2014) of a counter that starts at a hash
    of `seed`.
    """

    def mix(z: np.ndarray) -> np.ndarray:
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    gamma = np.uint64(0x9E3779B97F4A7C15)
    start = mix(np.array([seed % 2**64], np.uint64) + gamma)
    return mix(start + (indices.astype(np.uint64) + np.uint64(1)) * gamma)


@dataclass(frozen=True)
class _Broken:
    name: str
    reason: str


@dataclass(frozen=True)
class _Encoder:
    """The workers' task: (index, whether compressed) -> (image, label) or _Broken."""

    source: Source
    encoding: Encoding

    def __call__(self, sample: np.ndarray) -> tuple[EncodedImage, int] | _Broken:
        index, compressed = sample.tolist()
        try:
            image, label = self.source.load(index)
        except OSError as error:
            # Not a broken image: with --skip-broken, a failing disk must not thin out the data set.
            raise ConversionError(
                f"{self.source.name(index)}: cannot be read: {error.strerror or error}"
            ) from error
        try:
            return encode_image(image, self.encoding, bool(compressed)), label
        except BrokenImage as error:
            return _Broken(self.source.name(index), str(error))
        except MemoryError:
            raise ConversionError(
                f"{self.source.name(index)}: not enough memory; pass fewer --workers"
            ) from None


def _encoded(source: Source, indices: np.ndarray, options: ConvertOptions) -> Iterator:
    samples = np.column_stack([indices, is_compressed(indices, options.compressed_share)])
    results = map_in_order(
        _Encoder(source, options.encoding), samples, options.workers, size_of=_bytes_of
    )
    # disable=None: no bar unless standard error is a terminal.
    bar = tqdm(
        results,
        total=len(samples),
        unit=" images",
        smoothing=0.05,
        disable=None if options.progress else True,
    )
    try:
        yield from bar
    except WorkersNotStarted:
        raise UserError(
            "the worker processes did not start: they import the program first, and it calls "
            'convert() again there, or fails; put the call under `if __name__ == "__main__":`, '
            "or pass one worker"
        ) from None
    except WorkerDied as error:
        first = source.name(int(indices[error.position]))
        raise ConversionError(
            f"a worker process was killed near {first}, perhaps for lack of memory; "
            "pass fewer --workers"
        ) from error
    finally:
        bar.close()
        results.close()


def _bytes_of(result: tuple[EncodedImage, int] | _Broken) -> int:
    return 0 if isinstance(result, _Broken) else len(result[0].data)


def _size_notes(name: str, width: int, height: int) -> list[str]:
    if width * height < _LARGE:
        return []
    memory = f"{3 * width * height / 1e9:.1f} GB"
    return [
        f"the largest image, {name}, measures {width} x {height}: "
        f"each thread of the loader takes {memory} for it; --max-side reduces it"
    ]


def _write_description(summary: Summary, source: Source, options: ConvertOptions) -> None:
    """Write the description: only what the input determines, so that equal runs give equal files.

    Neither times nor the number of workers are in it.
    """
    description = {
        "ffssl": ffssl.__version__,
        "sha256": summary.sha256,
        "bytes": summary.file_bytes,
        "samples": summary.samples,
        "digest": read_beton(summary.path).digest(),
        "class_names": summary.class_names,
        "unlabelled": summary.unlabelled,
        "source": {
            "kind": type(source).__name__,
            "origin": _as_text(source.origin),
            "samples": len(source),
        },
        "options": {
            **asdict(options.encoding),
            "compressed_share": options.compressed_share,
            "subset": options.subset,
            "subset_seed": options.subset_seed,
            "part": "{}/{}".format(*options.part),
            "skip_broken": options.skip_broken,
        },
        "counts": summary.counts,
        "largest": dict(zip(("name", "width", "height"), summary.largest)),
        "notes": summary.notes,
        "skipped": [{"name": name, "reason": reason} for name, reason in summary.skipped],
        "passed_over": [
            {"kind": kind, "files": count, "first": first}
            for kind, count, first in summary.passed_over
        ],
    }
    target = description_path(summary.path)
    try:
        write_json(target, description)
    except OSError as error:
        raise ConversionError(
            f"{target}: could not be written: {error.strerror}; {summary.path} itself is whole"
        ) from error
