"""The totals of an epoch, from which it can be resumed and its row of the log is made."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ffssl.parallel.energy import JOULES_PER_KWH
from ffssl.parallel.ranks import gather, mean_over_ranks, rank, world_size
from ffssl.training.gauges import EMBEDDINGS


class StepResult(NamedTuple):
    """What a step measured on this rank. The tensors are on the device, perhaps not computed yet.

    loss, embedding_std: scalars.
    embeddings: (B, d), of the first views.
    gauges: (3,), the hardness, the variance of its mean and the predictor's cosine, see
        `ffssl.training.gauges`. NaN for those that a run does not have. None in steps that are not
        measured.
    """

    loss: Tensor
    embedding_std: Tensor
    embeddings: Tensor
    gauges: Tensor | None


PER_STEP = ("losses", "embedding_stds", "gauges")
FIGURES = ("seconds", "compile_seconds", "compile_steps", "waited", "replaced")


@dataclass
class EpochTotals:
    """The totals of an epoch under way, on this rank.

    losses, embedding_stds: one scalar a step, on the device.
    gauges: (3,), one for each step that was measured.
    embeddings: (n, d), of the last steps.
    seconds: training time, including the time `waited` for data, without compile_seconds.
    compile_seconds: of the steps in which torch.compile made code.
    compile_steps: their number.
    replaced: images that did not decode and were replaced.
    kwh: energy of this rank's GPU; None if all or a part of it was not counted.
    """

    losses: list[Tensor] = field(default_factory=list)
    embedding_stds: list[Tensor] = field(default_factory=list)
    gauges: list[Tensor] = field(default_factory=list)
    embeddings: Tensor | None = None
    seconds: float = 0.0
    compile_seconds: float = 0.0
    compile_steps: float = 0.0
    waited: float = 0.0
    replaced: float = 0.0
    kwh: float | None = None

    @property
    def steps(self) -> int:
        return len(self.losses)

    def add(self, result: StepResult) -> None:
        self.losses.append(result.loss)
        self.embedding_stds.append(result.embedding_std)
        if result.gauges is not None:
            self.gauges.append(result.gauges)
        rows = result.embeddings.float()
        if self.embeddings is not None:
            rows = torch.cat([self.embeddings, rows])
        self.embeddings = rows[-max(EMBEDDINGS // world_size(), 1) :].clone()

    def average_over_ranks(self) -> None:
        """Make every figure the mean over the ranks, so that the checkpoint of one rank serves all.

        Called by all ranks at the same step. `embeddings` stays this rank's own; `all_embeddings`
        then has those of all ranks.
        """
        if world_size() == 1:
            return
        for name in PER_STEP:
            values = getattr(self, name)
            if values:
                setattr(self, name, list(mean_over_ranks(torch.stack(values))))
        device = self.losses[0].device
        kwh = float("nan") if self.kwh is None else self.kwh
        figures = [*(getattr(self, name) for name in FIGURES), kwh]
        means = mean_over_ranks(torch.tensor(figures, dtype=torch.float64, device=device))
        *means_of_figures, kwh = means.tolist()
        for name, mean in zip(FIGURES, means_of_figures):
            setattr(self, name, mean)
        self.kwh = None if kwh != kwh else kwh
        assert self.embeddings is not None  # a step has been taken
        self._everyones = gather(self.embeddings)

    @property
    def all_embeddings(self) -> Tensor:
        """The embeddings (n, d) of all ranks, after `average_over_ranks`; empty before a step."""
        if self.embeddings is None:
            return torch.empty(0)
        return self.embeddings if world_size() == 1 else self._everyones

    def gauge_means(self) -> dict[str, float]:
        """Return the means of the measured gauges, and the standard error of the hardness."""
        if not self.gauges:
            return {}
        hardness, variance, cosine = torch.stack(self.gauges).double().mean(0).tolist()
        error = math.sqrt(variance / (len(self.gauges) * world_size()))
        means = {"hardness": hardness, "hardness_error": error, "predictor_cosine": cosine}
        return {name: mean for name, mean in means.items() if not math.isnan(mean)}

    def state(self) -> dict:
        """Return the state for a checkpoint, after `average_over_ranks`.

        `replaced` and `kwh` are the sums over the ranks, so that any number of ranks can resume.
        """
        kwh = None if self.kwh is None else self.kwh * world_size()
        lists = {}
        for name in PER_STEP:
            values = getattr(self, name)
            lists[name] = torch.stack(values) if values else torch.empty(0)
        return {
            "seconds": self.seconds,
            "compile_seconds": self.compile_seconds,
            "compile_steps": self.compile_steps,
            "waited": self.waited,
            "replaced": self.replaced * world_size(),
            "kwh": kwh,
            "embeddings": self.all_embeddings,
            **lists,
        }

    @classmethod
    def restored(cls, state: dict, device: torch.device) -> "EpochTotals":
        kwh = None if state["kwh"] is None else state["kwh"] / world_size()
        lists = {name: list(state[name].to(device)) for name in PER_STEP}
        rows = state["embeddings"].to(device)
        return cls(
            seconds=state["seconds"],
            compile_seconds=state.get("compile_seconds", 0.0),  # older checkpoints lack the two
            compile_steps=state.get("compile_steps", 0.0),
            waited=state["waited"],
            replaced=state["replaced"] / world_size(),
            kwh=kwh,
            embeddings=rows.tensor_split(world_size())[rank()] if len(rows) else None,
            **lists,
        )


class Meter:
    """Charge the time and the energy since the last charge to an epoch's totals.

    joules: returns the joules used so far, or None without a counter, see `ffssl.parallel.energy`.
    """

    def __init__(self, totals: EpochTotals, joules: Callable[[], float | None]):
        self._totals, self._read_joules = totals, joules
        self._time, self._joules = time.perf_counter(), joules()
        self._compiling = False

    def elapsed(self) -> float:
        """Return the seconds since the last charge."""
        return time.perf_counter() - self._time

    def charge(self) -> None:
        seconds, joules = self._since_the_last()
        kwh = self._totals.kwh
        # None, now or before: a part of the energy would pass for the whole.
        if joules is None or (kwh is None and self._totals.seconds):
            self._totals.kwh = None
        else:
            self._totals.kwh = (kwh or 0.0) + joules / JOULES_PER_KWH
        self._totals.seconds += seconds

    @contextlib.contextmanager
    def noticing_compilation(self) -> Iterator[None]:
        """Notice in the block when torch.compile begins to make code or to record a CUDA graph."""

        # It is called in whichever thread compiles, while the step waits.
        def begin(*_: object) -> None:
            if not self._compiling:
                self.charge()
                self._compiling = True

        handler = torch._dynamo.callback.callback_handler
        handler.register_start_callback(begin)
        try:
            yield
        finally:
            handler.remove_start_callback(begin)

    def end_step(self) -> None:
        """Charge a step that has compiled to compilation, and its energy to nothing.

        The whole of it: kernels are finished when they are first launched.
        """
        if self._compiling:
            seconds, _ = self._since_the_last()
            self._totals.compile_seconds += seconds
            self._totals.compile_steps += 1
            self._compiling = False

    def _since_the_last(self) -> tuple[float, float | None]:
        """Return the seconds and the joules since this was last called."""
        before, joules_before = self._time, self._joules
        self._time, self._joules = time.perf_counter(), self._read_joules()
        if self._joules is None or joules_before is None:
            return self._time - before, None
        return self._time - before, self._joules - joules_before
