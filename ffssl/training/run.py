"""What a run trains, and how far it has come."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ffssl.config import Options
from ffssl.methods import Method
from ffssl.parallel import batch_norm
from ffssl.parallel.device import keep_freed_memory, mixed_precision
from ffssl.parallel.energy import energy_counter
from ffssl.parallel.ranks import world_size
from ffssl.training.classifier import OnlineClassifier
from ffssl.training.optimizers import build_optimizer, restore_optimizer
from ffssl.training.run_schedule import RunSchedule
from ffssl.training.totals import EpochTotals


@dataclass
class Run:
    """What a run trains, and how far it has come."""

    options: Options
    schedule: RunSchedule
    device: torch.device
    method: Method
    # The method as `parallelise` returns it; in one process the method itself.
    parallel: nn.Module
    optimizer: torch.optim.Optimizer
    amp: torch.autocast
    scaler: torch.amp.GradScaler
    joules: Callable[[], float | None]  # used by the GPU so far, see `ffssl.parallel.energy`
    classifier: OnlineClassifier | None = None
    epoch: int = 0  # epochs finished
    totals: EpochTotals = field(default_factory=EpochTotals)  # of the epoch under way
    spent: dict[str, float] = field(default_factory=lambda: {"seconds": 0.0, "flops": 0.0})
    # Identifies the training images, see `ffssl.data.beton.description.identity`.
    data: dict[str, object] = field(default_factory=dict)
    # The file of weights it started from, see `ffssl.training.build.first_backbone`.
    weights: dict[str, object] = field(default_factory=dict)
    resumed: bool = False  # from a checkpoint

    @property
    def energy_note(self) -> str:
        """A suffix for the start-up line.

        It is a warning if this GPU has no energy counter, else an empty string.
        """
        if self.device.type == "cuda" and self.joules() is None:
            return "; no energy counter: kWh left out"
        return ""

    def state(self) -> dict:
        state = {
            "epoch": self.epoch,
            "totals": self.totals.state(),
            "spent": self.spent,
            "data": self.data,
            "weights": self.weights,
            "options": self.options.as_dict(),
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        return state | ({"classifier": self.classifier.state()} if self.classifier else {})

    def restore(self, state: dict) -> None:
        """Continue from a state, saved on any device."""
        self.epoch, self.spent = state["epoch"], state["spent"]
        self.weights = state.get("weights", {})
        self.totals = EpochTotals()
        if "totals" in state:
            self.totals = EpochTotals.restored(state["totals"], self.device)
        self.method.load_state_dict(state["method"])
        restore_optimizer(self.optimizer, state["optimizer"])
        if self.classifier is not None:
            self.classifier.restore(state.get("classifier"))
        if state["scaler"]:  # empty unless the run was in fp16
            self.scaler.load_state_dict(state["scaler"])


def start_run(options: Options, method: Method, schedule: RunSchedule, device: torch.device) -> Run:
    """Return a run at its beginning.

    method: as `build` returns it. With several ranks its BatchNorm layers are synchronised from
        here on.
    """
    # cuDNN tries its algorithms on each new shape and keeps the quickest. A run has few shapes.
    torch.backends.cudnn.benchmark = True
    if device.type == "cpu":
        keep_freed_memory()
    t = options.training
    parallel = parallelise(method.train(), device)
    optimizer = build_optimizer(
        t.optimizer,
        method.parameter_groups(t.weight_decay),
        weight_decay=t.weight_decay,
        decay_norm_and_bias=t.decay_norm_and_bias,
        momentum=t.momentum,
    )
    amp, scaler = mixed_precision(t.amp, device)
    joules = energy_counter(device)
    return Run(options, schedule, device, method, parallel, optimizer, amp, scaler, joules)


def parallelise(method: Method, device: torch.device) -> nn.Module:
    """Return a module that computes the method's loss on this rank's part of a joint batch.

    BatchNorm uses the statistics of the joint batch. The backward pass averages gradients over the
    ranks.
    """
    if world_size() == 1:
        return method
    batch_norm.synchronise(method)
    # No need to broadcast buffers: all ranks compute those of BatchNorm, queues and centres from
    # the joint batch. Older versions of torch call the option broadcast_buffers.
    option = "forward_sync_buffers"
    if option not in inspect.signature(DistributedDataParallel).parameters:
        option = "broadcast_buffers"
    settings: dict[str, Any] = {option: False}
    return DistributedDataParallel(method, gradient_as_bucket_view=True, **settings)
