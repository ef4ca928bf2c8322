import copy

import numpy as np
import pytest
import torch
from support.options import HARD
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ffssl.backbones import SmallResNet
from ffssl.config import read_options
from ffssl.methods import METHODS
from ffssl.training.build import build
from ffssl.training.classifier import OnlineClassifier, online_classifier
from ffssl.training.compile import COMPILED_METHODS, compile_methods
from ffssl.training.run import start_run
from ffssl.training.run_schedule import RunSchedule
from ffssl.training.step import train_step

CPU = torch.device("cpu")
CLASSES = torch.tensor([-7, 3, 2**40])
OPTIONS = {
    "simsiam": ["--method.predictor=8"],
    "byol": ["--method.predictor=8"],
    "mocov2plus": ["--method.queue=64"],
    "dino": ["--method.prototypes=24"],
}


class Features(nn.Module):
    """A backbone that returns what it is given."""

    features = 5

    def forward(self, x):
        return x


def options_of(name, *more):
    return read_options(
        [
            "--data.train=none.beton",
            "--data.validation=none.beton",
            "--run.folder=none",
            f"--method.name={name}",
            "--method.hidden=32",
            "--method.projection=16",
            "--resolution.max=32",
            "--training.batch_size=16",
            "--training.epochs=4",
            "--training.learning_rate=0.05",
            *OPTIONS.get(name, []),
            *more,
        ]
    )


@pytest.fixture
def start(monkeypatch):
    """Starts a run, with a tiny network that draws random numbers in its steps."""
    monkeypatch.setattr(
        "ffssl.training.build.build_backbone", lambda *_, **__: WithDropout((8, 16))
    )

    def started(options, *, classifier=True, device=CPU):
        torch.manual_seed(0)
        run = start_run(options, build(options, device), RunSchedule(options, 5), CPU)
        run.device = device if device.type != "meta" else CPU
        if classifier:
            run.classifier = online_classifier(
                options, run.method.backbone, np.array([3, -1, -7, 2**40, 3]), total_steps=20
            )
        return run

    return started


class WithDropout(SmallResNet):
    def forward(self, images):
        return nn.functional.dropout(super().forward(images), 0.1, self.training)


def batch(seed=0, images=16, views=3, side=32):
    generator = torch.Generator().manual_seed(seed)
    views = torch.randint(
        0, 256, (images, views, 3, side, side), dtype=torch.uint8, generator=generator
    )
    labels = torch.tensor([-7, 3, 2**40, -1])
    return views, labels[torch.randint(0, 4, (images,), generator=generator)]


def by_the_formulas(batches, *, peak, total):
    """The weights and the bias after SGD on rows of features, in float64.

    batches: of features (n, d) and indices of classes (n,), -1 for none.
    """
    weights, speed = np.zeros((3, 6)), np.zeros((3, 6))
    for step, (features, targets) in enumerate(batches):
        rows = np.hstack([features, np.ones((len(features), 1))])[targets >= 0]
        powers = np.exp(rows @ weights.T)
        errors = powers / powers.sum(1, keepdims=True) - np.eye(3)[targets[targets >= 0]]
        speed = 0.9 * speed + errors.T @ rows / max(len(rows), 1)
        weights = weights - peak * (1 + np.cos(np.pi * step / total)) / 2 * speed
    return weights[:, :-1], weights[:, -1]


def test_it_takes_the_steps_of_the_formulas_and_leaves_out_images_without_a_label():
    backbone, generator = Features(), np.random.default_rng(0)
    classifier = OnlineClassifier(
        backbone, CLASSES, learning_rate=2.0, batch_size=64, total_steps=6, device=CPU
    )
    batches = []
    for step in range(4):
        features = generator.normal(size=(2, 10, 5)).astype(np.float32)  # views, images
        indices = generator.integers(-1, 3, 10) if step != 2 else np.full(10, -1)
        batches.append((features.reshape(20, 5).astype(float), np.tile(indices, 2)))
        labels = torch.where(
            torch.tensor(indices) < 0, -1, CLASSES[torch.tensor(indices).clamp(min=0)]
        )
        parts = zip(torch.tensor(features).split(5, 1), classifier.targets(labels).split(5))
        for views, targets in parts:
            for view in views.requires_grad_():  # one after the other
                backbone(view)
            with torch.no_grad():
                backbone(torch.full((5, 5), torch.nan))  # as of a selection
            classifier.add_gradients(targets)
        classifier.step(step)
    weights, bias = by_the_formulas(batches, peak=2.0 * 64 / 256, total=6)
    np.testing.assert_allclose(classifier.layer.weight.detach(), weights, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(classifier.layer.bias.detach(), bias, rtol=1e-4, atol=1e-6)
    assert np.abs(weights).max() > 0.1


def test_its_flops_are_eight_times_features_times_classes_for_each_image():
    backbone = Features()
    classifier = OnlineClassifier(
        backbone, CLASSES, learning_rate=1, batch_size=7, total_steps=5, device=CPU
    )
    for _ in range(2):  # views
        backbone(torch.randn(7, 5))
    with FlopCounterMode(display=False) as counter:
        classifier.add_gradients(torch.tensor([0, 1, 2, 0, 1, 2, -1]))
        classifier.step(0)
    assert counter.get_total_flops() == 7 * 8 * 5 * 3


def test_features_that_are_not_finite_do_not_ruin_it():
    backbone = Features()
    classifier = OnlineClassifier(
        backbone, CLASSES, learning_rate=1, batch_size=2, total_steps=5, device=CPU
    )
    for value in (1.0, float("inf"), 1.0):
        backbone(torch.full((2, 5), value, dtype=torch.float16))
        classifier.add_gradients(torch.tensor([0, 1]))
        classifier.step(0)
    assert all(parameter.isfinite().all() for parameter in classifier.layer.parameters())


@pytest.mark.parametrize(
    "name, more",
    [
        *((name, []) for name in METHODS),
        ("simsiam", [*HARD, "--hard_augment.extra_targets=true", "--training.accumulate=2"]),
        ("dino", [*HARD, "--training.accumulate=4"]),
        ("byol", [*HARD, "--training.joint_views=true", "--training.amp=bf16"]),
    ],
)
def test_it_learns_from_the_views_that_are_trained_and_leaves_the_method_as_it_is(
    start, name, more, monkeypatch
):
    options = options_of(name, *more)
    alone, beside, seen = start(options, classifier=False), start(options), []
    loss = type(beside.method).loss

    def recorded(method, first, second, *targets):
        # After the loss: the same pass again, which leaves BatchNorm's statistics alone.
        state, kept = torch.get_rng_state(), [*beside.classifier._features]
        result = loss(method, first, second, *targets)
        if method is beside.method:
            after = torch.get_rng_state()
            torch.set_rng_state(state)
            again = copy.deepcopy(method.backbone)
            again._forward_hooks.clear()
            seen.append([again(images) for images in method.batches(first, second)])
            torch.set_rng_state(after)
            assert kept == []
        return result

    monkeypatch.setattr(type(beside.method), "loss", recorded)
    for step in range(3):
        views, labels = batch(seed=step, views=3 if HARD[0] in more else 2)
        for run in (alone, beside):
            torch.manual_seed(step)
            train_step(run, views, step, labels)
            run.drawn = torch.rand(1).item()
        assert alone.drawn == beside.drawn
        if step == 0:
            # From weights of 0: each class's mean of features, less that of all, by the rates.
            rows = torch.cat([torch.cat(part).unflatten(0, (2, -1)) for part in seen], dim=1)
            known = rows.float()[:, labels != -1].flatten(0, 1)
            targets = torch.searchsorted(CLASSES, labels[labels != -1]).repeat(2)
            errors = nn.functional.one_hot(targets, 3) - 1 / 3
            expected = 0.1 * 16 / 256 * errors.T @ known / len(known)
            torch.testing.assert_close(
                beside.classifier.layer.weight, expected, rtol=1e-3, atol=1e-6
            )
    states = [run.method.state_dict() for run in (alone, beside)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert alone.method.state_dict().keys() == beside.method.state_dict().keys()


def test_building_it_draws_no_random_number():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    OnlineClassifier(Features(), CLASSES, learning_rate=1, batch_size=2, total_steps=5, device=CPU)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["simclr", "simsiam"])
def test_a_step_with_it_reads_no_value_of_a_tensor(start, name):
    """As in tests/test_step.py, on the meta device."""
    run = start(options_of(name, *HARD, "--training.accumulate=2"), device=torch.device("meta"))
    views, labels = batch()
    for step in range(2):
        train_step(run, views.to("meta"), step, labels)


def test_compiled_code_keeps_the_same_features_in_one_graph(start):
    states, compiled = {}, []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    for mode in ("off", "default"):
        torch.compiler.reset()
        run = start(options_of("simsiam", *HARD))
        settings = {} if mode == "off" else {"backend": backend, "fullgraph": True}
        compile_methods(run.method, COMPILED_METHODS, mode, **settings)
        for step in range(2):
            torch.manual_seed(step)
            views, labels = batch(step)
            train_step(run, views, step, labels)
        states[mode] = run.method.state_dict() | run.classifier.layer.state_dict()
    torch.compiler.reset()
    assert len(compiled) == 2  # the selection and the loss
    for key, tensor in states["off"].items():
        torch.testing.assert_close(states["default"][key], tensor)


def test_it_goes_on_from_its_state_and_begins_anew_with_other_classes(start):
    options = options_of("simclr")
    unbroken, stopped = start(options), start(options)

    def take(run, step):
        views, labels = batch(step, views=2)
        torch.manual_seed(step)
        train_step(run, views, step, labels)

    for run in (unbroken, stopped):
        take(run, 0)
        take(run, 1)
    resumed = start(options)
    resumed.restore(copy.deepcopy(stopped.state()))
    take(unbroken, 2)
    take(resumed, 2)
    states = [run.classifier.layer.state_dict() for run in (unbroken, resumed)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert resumed.classifier.trained

    state = stopped.state()
    for other in (None, state["classifier"] | {"classes": torch.tensor([0, 1, 2])}):
        anew = start(options)
        anew.restore(state | {"classifier": other})
        assert not anew.classifier.trained and not anew.classifier.layer.weight.any()


@pytest.mark.parametrize(
    "more, labels",
    [
        (["--evaluate.linear_learning_rate=0"], np.array([0, 1])),
        ([], None),
    ],
)
def test_it_is_off_where_there_is_nothing_to_learn(more, labels):
    options = options_of("simclr", *more)
    assert online_classifier(options, Features(), labels, total_steps=1) is None
    options = options.changed(data={"validation": None})
    assert online_classifier(options, Features(), np.array([0, 1]), total_steps=1) is None
