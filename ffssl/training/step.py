"""One step of the optimiser, and all that it works on."""

import collections
import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from ffssl.parallel import batch_norm
from ffssl.training import gauges as gauge
from ffssl import hard_augment
from ffssl.backbones import build_backbone, check_resolutions
from ffssl.config import as_dict
from ffssl.parallel.device import keep_freed_memory, mark_work, mixed_precision, until_out_of_memory
from ffssl.parallel.ranks import world_size
from ffssl.errors import UserError
from ffssl.parallel.energy import energy_counter
from ffssl.methods import Method, build_method
from ffssl.methods.base import Progress
from ffssl.training.optimizers import build_optimizer, set_learning_rate_and_momentum
from ffssl.training.schedule import Plan, input_sides, view_policies
from ffssl.training.epoch import StepResult, Tally

PASSES = ("loss", "project", "targets", "compare")  # of a method: all that computes with networks
SHAPES_COMPILED = 64  # for how many shapes and states torch.compile makes code before it gives up: resolutions, and each method's own


@dataclass
class Run:
    """What a run trains, and how far it has come."""

    options: SimpleNamespace
    plan: Plan
    device: torch.device
    method: Method
    parallel: nn.Module  # the method, whose backward pass averages the gradients over the ranks; in one process the method itself
    optimizer: torch.optim.Optimizer
    amp: torch.autocast
    scaler: torch.amp.GradScaler
    joules: Callable[[], float | None]  # that the GPU has used, see `ffssl.parallel.energy`
    epoch: int = 0  # epochs finished
    tally: Tally = field(default_factory=Tally)  # of the one after them
    spent: dict[str, float] = field(default_factory=lambda: {"seconds": 0.0, "flops": 0.0})
    data: dict[str, object] = field(default_factory=dict)  # what tells the training images from others

    @property
    def energy_note(self) -> str:
        """To be added to what is said of the device: of a GPU whose energy nothing counts; of others nothing."""
        return "; no energy counter: kWh left out" if self.device.type == "cuda" and self.joules() is None else ""

    def state(self) -> dict:
        return {
            "epoch": self.epoch,
            "tally": self.tally.state(),
            "spent": self.spent,
            "data": self.data,
            "options": as_dict(self.options),
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, state: dict) -> None:
        """Go on from a state, of any device."""
        self.epoch, self.spent = state["epoch"], state["spent"]
        self.tally = Tally.restored(state["tally"], self.device) if "tally" in state else Tally()
        self.method.load_state_dict(state["method"])
        for group in state["optimizer"]["param_groups"]:
            group["fused"] = self.optimizer.defaults["fused"]  # as this device has it
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # of a device whose precision needs one
            self.scaler.load_state_dict(state["scaler"])


def start_run(options: SimpleNamespace, method: Method, plan: Plan, device: torch.device) -> Run:
    """A run at its beginning. method: as `build` makes it; with several ranks, its BatchNorm is synchronised from here on."""
    # cuDNN tries its algorithms on each new shape and keeps the quickest: a run has a resolution for many epochs, so few shapes.
    torch.backends.cudnn.benchmark = True  # concerns GPUs alone
    if device.type == "cpu":
        keep_freed_memory()
    t = options.training
    parallel = share(method.train(), device)
    optimizer = build_optimizer(
        t.optimizer, method.parameter_groups(t.weight_decay), weight_decay=t.weight_decay,
        decay_norm_and_bias=t.decay_norm_and_bias, momentum=t.momentum,
    )  # fmt: skip
    return Run(options, plan, device, method, parallel, optimizer, *mixed_precision(t.amp, device), energy_counter(device))


def share(method: Method, device: torch.device) -> nn.Module:
    """The method as ranks that share a batch compute its loss: over BatchNorm statistics of the joint batch, with averaged gradients."""
    if world_size() == 1:
        return method
    batch_norm.synchronise(method)
    # No buffer is broadcast: what BatchNorm, queues and centres hold is computed from the joint batch, on all ranks alike.
    option = "forward_sync_buffers"  # broadcast_buffers in versions of torch before it
    if option not in inspect.signature(DistributedDataParallel).parameters:
        option = "broadcast_buffers"
    return DistributedDataParallel(method, gradient_as_bucket_view=True, **{option: False})


def build(options: SimpleNamespace, device: torch.device) -> Method:
    """A run's method with random weights, channels_last. Raises UserError for options that no run can have."""
    model, training = options.model, options.training
    backbone = build_backbone(model.backbone, zero_init_residual=model.zero_init_residual, stem=model.stem)
    check_resolutions(model.backbone, backbone, input_sides(options))
    settings = {name: value for name, value in vars(options.method).items() if name != "name"}
    method = build_method(options.method.name, backbone, settings)
    method.check(training.batch_size)
    if options.hard_augment.across_policies and len(view_policies(options)) == 1:
        raise UserError(
            "--hard_augment.across_policies: the views have one policy alone; leave this out, or "
            "take --augment.policy=byol"
        )
    hard_augment.check(method, Plan(options, steps_per_epoch=1).selection(training.epochs - 1))
    if training.joint_views is not None:
        method.joint_views = training.joint_views
    return method.to(device, memory_format=torch.channels_last)


def compile_passes(module: nn.Module, passes: Iterable[str], mode: str, device: torch.device, **settings) -> str:
    """Have torch.compile make code of these methods of a module, once for each shape. Returns the mode, "off" if it does nothing.

    mode: one of torch.compile's, "off", or "auto": "default" on a GPU. settings: others that torch.compile takes.
    """
    if mode == "auto":
        mode = "default" if device.type == "cuda" else "off"
    if mode != "off":
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, SHAPES_COMPILED)
        for name in passes:
            setattr(module, name, torch.compile(getattr(module, name), dynamic=False, mode=mode, **settings))
    return mode


def train_step(run: Run, views: Tensor, step: int, mark: Callable[[str], None] = lambda part: None) -> StepResult:
    """One step of the optimiser on this rank's uint8 views (B, m, 3, R, R) on the run's device, without waiting for it.

    mark: called with the name of each part when it has been given to the device.
    """
    options, progress = run.options, Progress(step, run.plan.total_steps, run.epoch)
    learning_rate, momentum = run.plan.learning_rate_and_momentum(step)
    set_learning_rate_and_momentum(run.optimizer, learning_rate, momentum, peak=options.training.learning_rate)
    run.method.before_step(progress)
    run.optimizer.zero_grad(set_to_none=True)
    if run.device.type == "cuda":  # before the first part alone: the gradients of one must last while the next adds to them
        torch.compiler.cudagraph_mark_step_begin()
    parts = views.chunk(options.training.accumulate)
    seeds = [(options.run.seed + step) * len(parts) + part for part in range(len(parts))]  # no part's pairs are drawn as another's
    with local_gradients(run.parallel):
        results = [add_gradients(run, part, seed, len(parts), mark) for part, seed in zip(parts[:-1], seeds)]
    steps_per_epoch = run.plan.steps_per_epoch
    measured = gauge.is_due(step % steps_per_epoch, steps_per_epoch)
    results.append(add_gradients(run, parts[-1], seeds[-1], len(parts), mark, measured=measured))
    run.method.after_backward(progress)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    mark("optimiser")
    run.method.after_step(progress)
    mark("teacher")
    losses, spreads, embeddings, gauges = zip(*results)
    return StepResult(
        torch.stack(losses).mean(), torch.stack(spreads).mean(), torch.cat(embeddings), gauges[-1]
    )


class Lead:
    """How far the host may be ahead of a GPU: by `steps` steps, so that waiting for the GPU is not taken for waiting for data.

    Call after each step; does nothing on a CPU.
    """

    def __init__(self, device: torch.device, steps: int = 2):
        self._device, self._steps, self._ends = device, steps, collections.deque()

    def __call__(self) -> None:
        if self._device.type == "cuda":
            self._ends.append(mark_work(self._device))
            if len(self._ends) > self._steps:
                self._ends.popleft().synchronize()


def local_gradients(network: nn.Module) -> contextlib.AbstractContextManager:
    """Backward passes inside add to this rank's gradients; the next one outside averages the sums over the ranks."""
    return network.no_sync() if isinstance(network, DistributedDataParallel) else contextlib.nullcontext()


def add_gradients(
    run: Run,
    views: Tensor,
    seed: int,
    parts: int = 1,
    mark: Callable[[str], None] = lambda part: None,
    measured: bool = False,
) -> StepResult:
    """Forward and backward pass over one of the equal `parts` of a batch, as `train_step`."""
    selection = run.plan.selection(run.epoch)
    with run.amp:
        chosen = hard_augment.choose_views(run.method, views, selection, seed)
    mark("selection")
    with run.amp:  # anew: before torch 2.10 autocast keeps the weights that it cast without gradient, and none would reach the real ones
        loss, embeddings = run.parallel(*chosen)
    mark("forward")
    gauges = None
    if measured:
        with run.amp:
            gauges = measure(run.method, views, chosen[:2], selection, seed, embeddings.detach())
    run.scaler.scale(loss / parts).backward()
    mark("backward")
    # Copies: CUDA graphs write the next results to the same place.
    loss, embeddings = loss.detach().clone(), embeddings.detach().clone()
    return StepResult(loss, embedding_spread(embeddings), embeddings, gauges)


def measure(
    method: Method,
    views: Tensor,
    chosen: tuple[Tensor, Tensor],
    selection: hard_augment.Selection,
    seed: int,
    embeddings: Tensor,
) -> Tensor:
    """The gauges of a step, see `StepResult`: (3,), NaN for what is not measured."""
    gauges = embeddings.new_full((3,), float("nan"), dtype=torch.float32)
    if selection.select == "hard" and views.shape[1] > 2:
        gauges[:2] = torch.stack(gauge.hardness(method, views, chosen, selection, seed))
    cosine = gauge.predictor_cosine(method, embeddings)
    if cosine is not None:
        gauges[2] = cosine
    return gauges


def embedding_spread(embeddings: Tensor) -> Tensor:
    """Standard deviation of the L2-normalised embeddings (N, d) times sqrt(d): 1 for directions at random, 0 after a collapse."""
    z = F.normalize(embeddings.float(), dim=1)
    return z.std(0).mean() * z.shape[1] ** 0.5


def memory_advice(run: Run, views: torch.Size | tuple[int, ...]) -> str:
    """What to do after a step on views (B, m, 3, R, R) has not fitted into the device's memory: found by trying parts of it, in eager mode,
    which rarely needs less: torch.compile would take a minute for each.
    """
    for parts in (parts for parts in range(2, views[0] // 2 + 1) if views[0] % parts == 0):
        run.optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        with until_out_of_memory(), torch.compiler.set_stance("force_eager"):
            add_gradients(run, torch.zeros(views[0] // parts, *views[1:], dtype=torch.uint8, device=run.device), seed=0)
            return f"{views[0] // parts} images fit: take --training.batch_size={views[0] // parts}, or --training.accumulate={parts}"
    return "not even two images fit; take a smaller network or resolution"


def to_device(batches: Iterable[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Batches of one shape, of which the last may be shorter, in memory that is overwritten by the next, on the `device`.

    On a GPU a batch is copied while the one before it is computed with; it is overwritten by the next but one.
    """
    if device.type != "cuda":
        yield from (batch.to(device) for batch in batches)
        return
    computing, copying = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    batches, buffers, read = iter(batches), [], []
    for turn in itertools.cycle((0, 1)):
        with torch.cuda.stream(copying):  # on which a loader notes that its last batch has been read
            batch = next(batches, None)
        if batch is None:
            return
        if len(buffers) < 2:
            buffers.append(torch.empty_like(batch, device=device))
            read.append(computing.record_event())  # the memory may have been something else's
        copying.wait_event(read[turn])
        with torch.cuda.stream(copying):
            on_device = buffers[turn][: len(batch)].copy_(batch, non_blocking=True)
        computing.wait_stream(copying)
        yield on_device
        read[turn] = computing.record_event()
