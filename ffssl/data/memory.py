"""How much memory this process may still take."""

from pathlib import Path

# Files of cgroups version 2 and version 1.
_LIMIT_AND_USE = (
    ("memory.max", "memory.current"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
)


def available_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes that can be taken without swapping or meeting a limit.

    Limits are those of a container or a batch job. Return None if Linux does not tell.
    """
    found = [*_of_the_machine(root), *_of_the_control_groups(root)]
    return max(0, min(found)) if found else None


def _of_the_machine(root: Path) -> list[int]:
    kilobytes = _fields(root / "proc/meminfo").get("MemAvailable")
    return [] if kilobytes is None else [kilobytes * 1024]


def _of_the_control_groups(root: Path) -> list[int]:
    """Return the bytes left in each control group that holds this process.

    Cached files count as free, since they make way.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    left = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        # Inside a container the path may be the host's and not exist here. Then the group itself
        # is the top of the tree.
        top = root / "sys/fs/cgroup" / controllers
        group = top / path.lstrip("/")
        for folder in (group, *group.parents[: len(group.parts) - len(top.parts)]):
            for limit_file, use_file in _LIMIT_AND_USE:
                try:
                    limit, use = (folder / limit_file).read_text(), (folder / use_file).read_text()
                except OSError:
                    continue
                if limit.strip() != "max":
                    statistics = _fields(folder / "memory.stat")
                    cached = sum(
                        statistics.get(name, 0) for name in ("inactive_file", "active_file")
                    )
                    left.append(int(limit) - int(use) + cached)
    return left


def _fields(path: Path) -> dict[str, int]:
    """Read a file whose lines are a name and a number; return no fields if it can't be read."""
    try:
        return {
            name.rstrip(":"): int(value)
            for name, value, *_ in map(str.split, path.read_text().splitlines())
        }
    except (OSError, ValueError):
        return {}
