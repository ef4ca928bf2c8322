"""How much memory this process may still take."""

from pathlib import Path

# Of cgroups 2 and 1.
_LIMIT_AND_USE = (
    ("memory.max", "memory.current"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
)


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that can be taken without swapping or meeting a container's or batch job's limit; None
    where Linux does not say.
    """
    found = [*_of_the_machine(root), *_of_the_control_groups(root)]
    return max(0, min(found)) if found else None


def _of_the_machine(root: Path) -> list[int]:
    return [
        kilobytes * 1024
        for kilobytes in [_fields(root / "proc/meminfo").get("MemAvailable")]
        if kilobytes is not None
    ]


def _of_the_control_groups(root: Path) -> list[int]:
    """What is left in each control group that holds this process.

    Cached files count as free: they make way.
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
        # Inside a container the path may be the host's and not exist here; the group itself then is
        # the top of the tree.
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
    """The numbers of a file of lines of a name and a number."""
    try:
        return {
            name.rstrip(":"): int(value)
            for name, value, *_ in map(str.split, path.read_text().splitlines())
        }
    except (OSError, ValueError):
        return {}
