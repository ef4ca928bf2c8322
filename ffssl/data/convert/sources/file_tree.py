"""List the files below a folder, each once, and follow links."""

import functools
import os
from dataclasses import dataclass, field
from pathlib import Path

from ffssl.data.convert.sources.base import PassedOver, kind_of_name
from ffssl.errors import UserError

# Kinds of what is passed over.
SPECIAL = "pipes, sockets or devices"
LINK_AGAIN = "links to what is taken already"

_FolderId = tuple[int, int]  # device and inode


@dataclass
class FileTree:
    """The files below `root`. All paths are relative to it.

    suffixes: of the files to take, in lower case.
    paths: the files with one of these suffixes.
    again: (link, target) for each link to a folder or a file that `paths` holds already. A folder's
        path ends in a slash; `root` is "".
    passed_over: all other files; a hidden folder counts as one.

    Raises UserError for a folder that can't be listed, a link that leads nowhere, and a link to a
    folder above `root`.
    """

    root: Path
    suffixes: frozenset[str]
    paths: list[str] = field(default_factory=list)
    again: list[tuple[str, str]] = field(default_factory=list)
    passed_over: PassedOver = field(default_factory=PassedOver)

    def __post_init__(self):
        self._folders: dict[_FolderId, str] = {}
        self._above = {_id_of(folder) for folder in self.root.resolve().parents}
        # Links wait until all real folders are known, so that a file is listed by its real path if
        # it has one below `root`.
        links, file_links = self._walk(""), []
        while links:
            inner = []
            for link in sorted(links):
                if os.path.isdir(os.path.join(self.root, link)):
                    inner += self._follow(link)
                else:
                    file_links.append(link)
            links = inner
        self._take_linked_files(sorted(file_links))
        self.paths.sort()

    def _walk(self, start: str) -> list[str]:
        """Take the files below the folder `start`, and return the links there."""
        links, stack = [], [start]
        while stack:
            prefix = stack.pop()
            try:
                identity = _id_of(self.root / prefix)
                if identity in self._folders:  # a link leads to a folder above it
                    self.again.append((prefix, self._folders[identity]))
                    continue
                self._folders[identity] = prefix
                entries = os.scandir(self.root / prefix)
            except OSError as error:
                raise UserError(
                    f"{error.filename}: cannot be listed: {error.strerror}; check its permissions"
                ) from error
            for entry in entries:
                path = prefix + entry.name
                if entry.name.startswith("."):
                    self.passed_over.add("hidden", path)
                elif entry.is_symlink():
                    links.append(path)
                elif entry.is_dir():
                    stack.append(path + os.sep)
                elif not entry.is_file():
                    self.passed_over.add(SPECIAL, path)
                else:
                    self._take(path, entry.name)
        return links

    def _take(self, path: str, name: str) -> None:
        if _suffix(name) in self.suffixes:
            self.paths.append(path)
        else:
            self.passed_over.add(kind_of_name(name), path)

    def _follow(self, link: str) -> list[str]:
        if _id_of(self.root / link) in self._above:
            raise UserError(
                f"{self.root / link}: a link to a folder above {self.root}; remove it, or point it "
                "elsewhere"
            )
        return self._walk(link + os.sep)

    def _take_linked_files(self, links: list[str]) -> None:
        taken: dict[tuple[_FolderId, str], str] = {}
        id_of = functools.cache(_id_of)  # of a few folders, to which there may be a million links
        for link in links:
            path, suffix = os.path.join(self.root, link), _suffix(link)
            # A link that leads nowhere may stand for a missing image or a whole class.
            if not os.path.exists(path) and (not suffix or suffix in self.suffixes):
                raise UserError(
                    f"{path}: a link to {os.readlink(path)}, which can't be reached; "
                    "bring that back, or remove the link"
                )
            if suffix not in self.suffixes:
                self.passed_over.add(kind_of_name(os.path.basename(link)), link)
            elif not os.path.isfile(path):
                self.passed_over.add(SPECIAL, link)
            else:
                folder, name = os.path.split(os.path.realpath(path))
                place = id_of(folder), name
                if place[0] in self._folders and self._is_taken(name):
                    self.again.append((link, self._folders[place[0]] + name))
                elif place in taken:
                    self.again.append((link, taken[place]))
                else:
                    taken[place] = link
                    self.paths.append(link)

    def _is_taken(self, name: str) -> bool:
        """Return whether a file of that name, in a folder that was walked, is in `paths`."""
        return not name.startswith(".") and _suffix(name) in self.suffixes


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _id_of(folder: str | os.PathLike) -> _FolderId:
    status = os.stat(folder)
    return status.st_dev, status.st_ino
