"""What an epoch adds up to: how far it has come, for whoever continues it, and its row in the log."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ffssl.energy import JOULES_PER_KWH


@dataclass
class Tally:
    """An epoch under way. losses, spreads: of each step's loss and embeddings, scalars on the device; seconds: of training, `waited` of
    them for data; replaced: images that did not decode."""

    losses: list[Tensor] = field(default_factory=list)
    spreads: list[Tensor] = field(default_factory=list)
    seconds: float = 0.0
    waited: float = 0.0
    replaced: int = 0

    @property
    def steps(self) -> int:
        return len(self.losses)

    def state(self) -> dict:
        """For a checkpoint."""
        lists = {name: torch.stack(values) if values else torch.empty(0) for name, values in (("losses", self.losses), ("spreads", self.spreads))}
        return {"seconds": self.seconds, "waited": self.waited, "replaced": self.replaced} | lists

    @classmethod
    def restored(cls, state: dict, device: torch.device) -> "Tally":
        return cls(**state | {name: list(state[name].to(device)) for name in ("losses", "spreads")})


class Meter:
    """Charges the time since the last charge, and the energy where something counts it, to what a run has `spent` and to its epoch.

    spent: by unit, "seconds" and "kwh". joules: used so far, or None; see `ffssl.energy`.
    """

    def __init__(self, spent: dict[str, float], tally: Tally, joules: Callable[[], float | None]):
        self._spent, self._tally, self._read_joules = spent, tally, joules
        self._time, self._joules = time.perf_counter(), joules()

    def charge(self) -> None:
        now, joules = time.perf_counter(), self._read_joules()
        self._spent["seconds"] += now - self._time
        self._tally.seconds += now - self._time
        if joules is not None:
            self._spent["kwh"] = self._spent.get("kwh", 0.0) + (joules - self._joules) / JOULES_PER_KWH
        self._time, self._joules = now, joules
