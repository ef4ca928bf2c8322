"""What an epoch adds up to: how far it has come, for whoever continues it, and its row in the log."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ffssl.distributed import mean_over_ranks, world_size
from ffssl.energy import JOULES_PER_KWH


@dataclass
class Tally:
    """An epoch under way, on this rank.

    losses, spreads: of each step's loss and embeddings, scalars on the device. seconds: of training, `waited` of them for data.
    replaced: images that did not decode. kwh: of this rank's GPU; None where nothing has counted them, or only a part.
    """

    losses: list[Tensor] = field(default_factory=list)
    spreads: list[Tensor] = field(default_factory=list)
    seconds: float = 0.0
    waited: float = 0.0
    replaced: float = 0.0
    kwh: float | None = None

    @property
    def steps(self) -> int:
        return len(self.losses)

    def share(self) -> None:
        """Make every figure the mean over the ranks, so that the checkpoint of one will do for all. Called by all ranks at one step."""
        if world_size() == 1:
            return
        device = self.losses[0].device
        figures = [self.seconds, self.waited, self.replaced, float("nan") if self.kwh is None else self.kwh]
        losses, spreads = mean_over_ranks(torch.stack([torch.stack(self.losses), torch.stack(self.spreads)]))
        self.losses, self.spreads = list(losses), list(spreads)
        self.seconds, self.waited, self.replaced, kwh = mean_over_ranks(torch.tensor(figures, dtype=torch.float64, device=device)).tolist()
        self.kwh = None if kwh != kwh else kwh

    def state(self) -> dict:
        """For a checkpoint, of any number of ranks: `replaced` and kwh are of all together. Called once they have shared."""
        kwh = None if self.kwh is None else self.kwh * world_size()
        lists = {name: torch.stack(values) if values else torch.empty(0) for name, values in (("losses", self.losses), ("spreads", self.spreads))}
        return {"seconds": self.seconds, "waited": self.waited, "replaced": self.replaced * world_size(), "kwh": kwh} | lists

    @classmethod
    def restored(cls, state: dict, device: torch.device) -> "Tally":
        kwh = None if state["kwh"] is None else state["kwh"] / world_size()
        lists = {name: list(state[name].to(device)) for name in ("losses", "spreads")}
        return cls(seconds=state["seconds"], waited=state["waited"], replaced=state["replaced"] / world_size(), kwh=kwh, **lists)


class Meter:
    """Charges the time since the last charge, and the energy where something counts it, to an epoch's tally.

    joules: used so far, or None; see `ffssl.energy`.
    """

    def __init__(self, tally: Tally, joules: Callable[[], float | None]):
        self._tally, self._read_joules = tally, joules
        self._time, self._joules = time.perf_counter(), joules()

    def elapsed(self) -> float:
        """Seconds since the last charge."""
        return time.perf_counter() - self._time

    def charge(self) -> None:
        now, joules = time.perf_counter(), self._read_joules()
        if joules is None or (self._tally.kwh is None and self._tally.seconds):  # now or before; the rest would pass for the whole
            self._tally.kwh = None
        else:
            self._tally.kwh = (self._tally.kwh or 0.0) + (joules - self._joules) / JOULES_PER_KWH
        self._tally.seconds += now - self._time
        self._time, self._joules = now, joules
