"""Find the image and the label of each sample in one shard of a WebDataset.

All files of a sample have one key: their name up to the first dot. The suffix begins there.
"""

import json
import os
import re
import tarfile
from dataclasses import dataclass

from ffssl.data.convert.sources.base import IMAGE_SUFFIXES, PassedOver, as_label, kind_of_name
from ffssl.data.convert.sources.file_tree import SPECIAL
from ffssl.errors import UserError

INSTEAD = "repair the shard, or pass --no-labels"
_LABEL_SUFFIXES = (".cls", ".json", ".txt")
_LABEL_KEYS = ("label", "cls", "class", "target")
_MENTIONS_LABEL = re.compile('"({})"'.format("|".join(_LABEL_KEYS)).encode())
_METADATA = re.compile(r"__[^/]*__($|/)")  # the webdataset library passes it over as well
_MOST_LINKS = 40  # that are followed one after the other, as in Linux


@dataclass(frozen=True)
class Caption:
    """A sample's .txt. It is the label only if all samples' .txt are numbers."""

    number: int | None


Label = int | str | Caption | None


@dataclass(frozen=True)
class ShardImage:
    """An image: `size` bytes, from `offset` on in the shard."""

    key: str
    offset: int
    size: int
    label: Label


_Files = dict[str, tarfile.TarInfo]  # by suffix, or by name


def scan(path: str, labels: bool, passed_over: PassedOver) -> list[ShardImage]:
    """Return the images of a shard, in its order.

    labels: read the labels too.
    passed_over: counts the files that are neither an image nor a label.

    Raises UserError for a broken shard, and for samples whose image or label is not certain.
    """
    try:
        with tarfile.open(path, "r:") as archive:
            members = archive.getmembers()
            _require_end(archive, path)
            return _Shard(path, archive.fileobj.fileno(), labels, passed_over).images(members)
    except tarfile.TarError as error:
        raise UserError(
            f"{path}: not a sound, uncompressed tar file ({error}); decompress or download it again"
        ) from error
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read: {error.strerror}; check the file and its permissions"
        ) from error


class _Shard:
    def __init__(self, path: str, descriptor: int, labels: bool, passed_over: PassedOver):
        self.path, self.descriptor, self.labels = path, descriptor, labels
        self.passed_over = passed_over

    def images(self, members: list[tarfile.TarInfo]) -> list[ShardImage]:
        return [
            self._image(key, suffix, files)
            for group, found in self._grouped(members)
            for key, suffix, files in self._samples(group, found)
        ]

    def _samples(self, key: str, files: _Files) -> list[tuple[str, str, _Files]]:
        """Return (key, suffix of the image, files) of each sample in the files of one key."""
        suffix = self._image_suffix(key, files)
        return [(key, suffix, files)] if suffix else self._split_at_last_dots(key, files)

    def _image_suffix(self, key: str, files: _Files) -> str | None:
        images = [suffix for suffix in files if suffix in IMAGE_SUFFIXES]
        if len(images) > 1:
            raise UserError(
                f"{self.path}:{key}: two images under one key; give each sample its own"
            )
        return images[0] if images else None

    def _grouped(self, members: list[tarfile.TarInfo]) -> list[tuple[str, _Files]]:
        """Return the files of each key, which may have other files between them.

        A key that comes again with the same suffixes is another sample, as for the webdataset
        library. If files of the key are scattered too, it would be a guess which belong together:
        UserError.
        """
        by_name = {os.path.normpath(member.name): member for member in members}
        groups: list[tuple[str, _Files]] = []
        current: dict[str, _Files] = {}
        scattered, repeated, last = set(), set(), None
        for member in members:
            name = os.path.normpath(member.name)
            content = None if member.isdir() else self._content(name, member, by_name)
            if content is None:
                continue
            key, suffix = _split_name(name)
            again = suffix in current.get(key, ())
            if key in current and key != last:
                (repeated if again else scattered).add(key)
            if again and key == last or key in scattered and key in repeated:
                raise UserError(
                    f"{self.path}:{name}: its sample is there twice; pack the shard again"
                )
            if again or key not in current:
                current[key] = {}
                groups.append((key, current[key]))
            current[key][suffix] = content
            last = key
        return groups

    def _content(
        self, name: str, member: tarfile.TarInfo, by_name: _Files
    ) -> tarfile.TarInfo | None:
        """Follow links to the member that holds a file; return None if it is of no sample."""
        base = os.path.basename(name)
        kind = kind_of_name(base)
        if base.startswith(".") or _METADATA.match(name):
            kind = "hidden"
        elif member.islnk() or member.issym():
            target = _follow(member, by_name)
            if target and "." in base:
                return target
            if os.path.splitext(base)[1].lower() in (*IMAGE_SUFFIXES, *_LABEL_SUFFIXES):
                raise UserError(
                    f"{self.path}:{name}: a link to {member.linkname}, which is no file of "
                    "the shard; pack it again with tar --dereference"
                )
        elif not member.isfile():
            kind = SPECIAL
        elif "." in base:
            return member
        self.passed_over.add(kind, f"{self.path}:{name}")
        return None

    def _split_at_last_dots(self, key: str, files: _Files) -> list[tuple[str, str, _Files]]:
        """Return what `_samples` does, if no image has just the key.

        The keys then have dots: a.1.jpg and a.1.cls are the sample a.1.
        """
        inner: dict[str, _Files] = {}
        for suffix, member in files.items():
            stem, last = os.path.splitext(suffix)
            inner.setdefault(stem if last else "", {})[last or suffix] = member
        samples, left = [], []
        for stem, own in inner.items():
            suffix = self._image_suffix(key + stem, own)
            if suffix:
                samples.append((key + stem, suffix, own))
            else:
                left += [stem + other for other in own]
        if samples:
            self._require_keys_with_dots(key, samples, left)
        for suffix in left:
            self._leave_out(key, suffix)
        return samples

    def _require_keys_with_dots(
        self, key: str, samples: list[tuple[str, str, _Files]], left: list[str]
    ) -> None:
        """Raise UserError if the dots may as well divide the files of one sample."""
        what_to_do = "a key ends at the first dot of a name; rename what has dots in it"
        lost = next((suffix for suffix in left if suffix.endswith(_LABEL_SUFFIXES)), None)
        if lost:
            raise UserError(
                f"{self.path}:{key}{lost}: has no image of its name, while "
                f"{samples[0][0]}{samples[0][1]} is there: {what_to_do}"
            )
        # Words, as in a.left.jpg and a.right.jpg, are names of files; numbers are parts of keys.
        fields = [name for name, _, own in samples if len(own) == 1 and _ends_in_word(name)]
        if len(fields) > 1:
            raise UserError(
                f"{self.path}:{key}: which of its images is to be taken, {', '.join(fields[:3])}? "
                f"{what_to_do.capitalize()}"
            )

    def _leave_out(self, key: str, suffix: str) -> None:
        kind = suffix if re.fullmatch(r"(\.[^\W\d]\w{0,7}){1,3}", suffix) else "with other suffixes"
        self.passed_over.add(kind, f"{self.path}:{key}{suffix}")

    def _image(self, key: str, suffix: str, files: _Files) -> ShardImage:
        image = files[suffix]
        if image.issparse():
            raise UserError(
                f"{self.path}:{key}: stored as a sparse file; pack the shard again without --sparse"
            )
        label, used = self._label(key, files) if self.labels else (None, None)
        for other in files.keys() - {suffix, used}:
            self._leave_out(key, other)
        return ShardImage(key, image.offset_data, image.size, label)

    def _label(self, key: str, files: _Files) -> tuple[Label, str | None]:
        """Return the label, and the suffix of the file that it comes from."""
        if ".cls" in files:
            text = self._read(files[".cls"]).decode("ascii", "replace")
            return self._number_in(f"{key}.cls", text), ".cls"
        if ".json" in files and _MENTIONS_LABEL.search(data := self._read(files[".json"])):
            label = self._label_in_json(f"{key}.json", data)
            if label is not None:
                return label, ".json"
        if ".txt" in files:
            text = self._read(files[".txt"], at_most=40).decode("ascii", "replace")
            return Caption(as_label(text)), ".txt"
        return None, None

    def _read(self, member: tarfile.TarInfo, at_most: int | None = None) -> bytes:
        size = member.size if at_most is None else min(member.size, at_most)
        return os.pread(self.descriptor, size, member.offset_data)

    def _number_in(self, name: str, text: str) -> int:
        number = as_label(text)
        if number is None:
            text = repr(text.strip()[:24])
            raise UserError(
                f"{self.path}:{name}: holds {text}, not a class number of 64 bits; {INSTEAD}"
            )
        return number

    def _label_in_json(self, name: str, data: bytes) -> int | str | None:
        try:
            content = json.loads(data)
        except ValueError as error:
            raise UserError(f"{self.path}:{name}: is no sound JSON ({error}); {INSTEAD}") from error
        if not isinstance(content, dict):
            return None
        values = (content.get(key) for key in _LABEL_KEYS)
        label = next((value for value in values if value is not None), None)
        if isinstance(label, bool) or not isinstance(label, int | str | None):
            text = str(label)[:24]
            raise UserError(
                f"{self.path}:{name}: its label, {text}, is neither an integer nor a text; "
                f"{INSTEAD}"
            )
        return self._number_in(name, str(label)) if isinstance(label, int) else label


def _follow(member: tarfile.TarInfo, by_name: _Files) -> tarfile.TarInfo | None:
    """Return the file that a link leads to inside the shard, or None."""
    for _ in range(_MOST_LINKS):
        folder = os.path.dirname(member.name) if member.issym() else ""
        member = by_name.get(os.path.normpath(os.path.join(folder, member.linkname)))
        if member is None or not (member.islnk() or member.issym()):
            return member if member and member.isfile() else None
    return None


def _require_end(archive: tarfile.TarFile, shard: str) -> None:
    """Raise UserError unless only zeros, a block or more, follow the last member.

    Needed since tarfile takes whatever it can't read for the end.
    """
    archive.fileobj.seek(archive.offset)
    end = archive.fileobj.read(tarfile.BLOCKSIZE)
    padding = iter(lambda: archive.fileobj.read(1 << 20), b"")
    if end != bytes(tarfile.BLOCKSIZE) or any(part.strip(b"\0") for part in padding):
        raise UserError(
            f"{shard}: damaged or cut short at byte {archive.offset}; download or pack it again"
        )


def _split_name(name: str) -> tuple[str, str]:
    """Return key and suffix, the suffix in lower case. So a.seg.png is not an image of a."""
    folder, base = os.path.split(name)
    stem, dot, suffix = base.partition(".")
    return os.path.join(folder, stem), (dot + suffix).lower()


def _ends_in_word(name: str) -> bool:
    return bool(re.search(r"\.[^\W\d]\w*$", name))
