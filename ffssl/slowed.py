"""Epochs that took long for what they computed, as when other work has held the machine: their
seconds say little of a recipe.
"""

from collections.abc import Mapping, Sequence

# As long for a FLOP; what has the machine for itself differs by less between epochs of a
# resolution.
TIMES = 3


def describe_slowed(logs: Mapping[str, Sequence[dict]]) -> list[str]:
    """A sentence for each run that has such epochs.

    logs: the runs that are compared, of one machine, by name: rows as `ffssl.train` logs them.
    """
    paces = {name: _paces(rows) for name, rows in logs.items()}
    quickest: dict[int, float] = {}
    for own in paces.values():
        for resolution, pace in own.values():
            quickest[resolution] = min(pace, quickest.get(resolution, pace))
    sentences = []
    for name, own in paces.items():
        slowed = {
            epoch: pace / quickest[resolution]
            for epoch, (resolution, pace) in own.items()
            if pace >= TIMES * quickest[resolution]
        }
        if slowed:
            which = (
                f"epoch {min(slowed)}"
                if len(slowed) == 1
                else f"{len(slowed)} of {len(own)} epochs"
            )
            sentences.append(
                f"{name}: {which} took up to {max(slowed.values()):.1f} times as long for the same FLOPs as the quickest here at that resolution; "
                "if other work held the machine, go by the FLOPs"
            )
    return sentences


def _paces(rows: Sequence[dict]) -> dict[int, tuple[int, float]]:
    """Of each epoch its resolution and its seconds for a FLOP. seconds and flops of the rows are
    sums from the start.
    """
    paces, before = {}, {"seconds": 0, "flops": 0}
    for row in rows:
        seconds, flops = (row[name] - before[name] for name in ("seconds", "flops"))
        if flops > 0 and seconds > 0 and "resolution" in row:
            paces[row["epoch"]] = row["resolution"], seconds / flops
        before = row
    return paces
