"""What a run trains, and how far it has come."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ffssl.config import Options
from ffssl.methods import Method
from ffssl.parallel import batch_norm
from ffssl.parallel.device import keep_freed_memory, mixed_precision
from ffssl.parallel.energy import energy_counter
from ffssl.parallel.ranks import world_size
from ffssl.training.optimizers import build_optimizer
from ffssl.training.schedule import RunSchedule
from ffssl.training.totals import EpochTotals


@dataclass
class Run:
    """What a run trains, and how far it has come."""

    options: Options
    schedule: RunSchedule
    device: torch.device
    method: Method
    # The method, whose backward pass averages the gradients over the ranks; in one process the
    # method itself.
    parallel: nn.Module
    optimizer: torch.optim.Optimizer
    amp: torch.autocast
    scaler: torch.amp.GradScaler
    joules: Callable[[], float | None]  # that the GPU has used, see `ffssl.parallel.energy`
    epoch: int = 0  # epochs finished
    totals: EpochTotals = field(default_factory=EpochTotals)  # of the one after them
    spent: dict[str, float] = field(default_factory=lambda: {"seconds": 0.0, "flops": 0.0})
    # What tells the training images from others.
    data: dict[str, object] = field(default_factory=dict)
    resumed: bool = False  # from a checkpoint

    @property
    def energy_note(self) -> str:
        """To be added to what is said of the device: of a GPU whose energy nothing counts; of
        others nothing.
        """
        return (
            "; no energy counter: kWh left out"
            if self.device.type == "cuda" and self.joules() is None
            else ""
        )

    def state(self) -> dict:
        return {
            "epoch": self.epoch,
            "totals": self.totals.state(),
            "spent": self.spent,
            "data": self.data,
            "options": self.options.as_dict(),
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, state: dict) -> None:
        """Go on from a state, of any device."""
        self.epoch, self.spent = state["epoch"], state["spent"]
        self.totals = (
            EpochTotals.restored(state["totals"], self.device)
            if "totals" in state
            else EpochTotals()
        )
        self.method.load_state_dict(state["method"])
        for group in state["optimizer"]["param_groups"]:
            group["fused"] = self.optimizer.defaults["fused"]  # as this device has it
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # of a device whose precision needs one
            self.scaler.load_state_dict(state["scaler"])


def start_run(options: Options, method: Method, schedule: RunSchedule, device: torch.device) -> Run:
    """A run at its beginning.

    method: as `build` makes it; with several ranks, its BatchNorm is synchronised from here on.
    """
    # cuDNN tries its algorithms on each new shape and keeps the quickest: a run has a resolution
    # for many epochs, so few shapes.
    torch.backends.cudnn.benchmark = True  # concerns GPUs alone
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
    return Run(
        options,
        schedule,
        device,
        method,
        parallel,
        optimizer,
        *mixed_precision(t.amp, device),
        energy_counter(device),
    )


def parallelise(method: Method, device: torch.device) -> nn.Module:
    """The method as ranks that share a batch compute its loss: over BatchNorm statistics of the
    joint batch, with averaged gradients.
    """
    if world_size() == 1:
        return method
    batch_norm.synchronise(method)
    # No buffer is broadcast: what BatchNorm, queues and centres hold is computed from the joint
    # batch, on all ranks alike.
    option = "forward_sync_buffers"  # broadcast_buffers in versions of torch before it
    if option not in inspect.signature(DistributedDataParallel).parameters:
        option = "broadcast_buffers"
    return DistributedDataParallel(method, gradient_as_bucket_view=True, **{option: False})
