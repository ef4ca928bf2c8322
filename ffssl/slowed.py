"""Find epochs that took long for what they computed.

Other work may have held the machine. The seconds of such epochs say little about a recipe.
"""

from collections.abc import Mapping, Sequence

# Report epochs that took so many times as long for a FLOP. With the machine to itself a run varies
# less between epochs of one resolution.
TIMES = 3


def describe_slowed(logs: Mapping[str, Sequence[dict]]) -> list[str]:
    """Return a sentence for each run that has such epochs.

    logs: rows as `ffssl.train` logs them, by the run's name; all runs of one machine.
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
            which = f"{len(slowed)} of {len(own)} epochs"
            if len(slowed) == 1:
                which = f"epoch {min(slowed)}"
            times = max(slowed.values())
            sentences.append(
                f"{name}: {which} took up to {times:.1f} times as long for the same FLOPs as "
                "the quickest here at that resolution; if other work held the machine, go by the "
                "FLOPs"
            )
    return sentences


def _paces(rows: Sequence[dict]) -> dict[int, tuple[int, float]]:
    """Return each epoch's resolution and its seconds per FLOP.

    The seconds and flops of the rows are sums from the start.
    """
    paces, before = {}, {"seconds": 0, "flops": 0}
    for row in rows:
        seconds, flops = (row[name] - before[name] for name in ("seconds", "flops"))
        if flops > 0 and seconds > 0 and "resolution" in row:
            paces[row["epoch"]] = row["resolution"], seconds / flops
        before = row
    return paces
