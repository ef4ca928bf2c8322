"""What holds for every method."""

import copy
import inspect

import pytest
import torch
from support.small_methods import OPTIONS, WITH_TEACHER, build, randoms, train_a_step, views

from ffssl.config import declarations
from ffssl.config.method_options import method_options, of_file
from ffssl.data.policy import POLICIES
from ffssl.errors import UserError
from ffssl.methods import METHODS
from ffssl.methods.base import Progress
from ffssl.methods.prediction import PredictionMethod


def test_the_methods_are_found_by_name():
    assert (
        set(METHODS)
        == set(OPTIONS)
        >= {"simsiam", "byol", "simclr", "mocov2plus", "dino", "barlow_twins", "vicreg"}
    )


def test_views_are_made_by_the_policy_of_the_methods_authors():
    authors = {"simsiam": "simsiam", "mocov2plus": "simsiam", "simclr": "simclr"} | dict.fromkeys(
        ("byol", "dino", "barlow_twins", "vicreg"), "byol"
    )
    assert {name: METHODS[name].policy for name in authors} == authors
    assert {method.policy for method in METHODS.values()} <= set(POLICIES)


def test_the_options_of_the_configuration_are_those_of_the_methods_classes():
    found = method_options()
    assert set(found) == set(METHODS)
    for name, method in METHODS.items():
        parameters = list(inspect.signature(method.__init__).parameters.values())[2:]
        assert [one.name for one in found[name]] == [p.name for p in parameters]
        for one, parameter in zip(found[name], parameters):
            assert one.check.check(parameter.default) == parameter.default
            assert one.help in " ".join(method.__doc__.split())


def test_an_option_that_several_methods_have_is_one_that_names_them():
    declared = {one.path[1]: one for one in declarations() if one.path[0] == "method"}
    assert declared["predictor"].help.endswith("(byol, simsiam)")
    assert declared["hidden"].help == "width of the projector's hidden layers"
    assert all(name in declared["name"].help for name in METHODS)


@pytest.mark.parametrize(
    "constructor, doc",
    [
        ("width: int = 3", "width: of it"),
        ("width: Size = 3", "It has a width."),
        ("width=3", "width: of it"),
    ],
)
def test_an_option_without_type_or_help_is_named(tmp_path, constructor, doc):
    file = tmp_path / "odd.py"
    file.write_text(
        f'class Odd(Method):\n    """{doc}"""\n\n    name = "odd"\n\n'
        f"    def __init__(self, backbone, *, {constructor}):\n        pass\n"
    )
    with pytest.raises(SyntaxError, match="odd.py: Odd: option width needs a type, one of Size, "):
        of_file(file)


@pytest.mark.parametrize("name", METHODS)
def test_every_trained_parameter_is_in_one_group_and_no_other(name):
    method = build(name)
    grouped = [id(p) for group in method.parameter_groups(0.01) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in method.parameters() if p.requires_grad)
    if name in WITH_TEACHER:
        assert not set(grouped) & {id(p) for p in method.teacher.parameters()}


@pytest.mark.parametrize("name", METHODS)
def test_biases_and_normalisation_decay_where_the_authors_have_it(name):
    method = build(name)
    rate = {
        id(p): group["weight_decay"]
        for group in method.parameter_groups(0.01)
        for p in group["params"]
    }
    for p in method.parameters():
        if p.requires_grad:
            assert rate[id(p)] == (0.01 if p.ndim > 1 or name in ("simsiam", "mocov2plus") else 0)


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_trains_the_backbone_and_every_head(name):
    method = build(name)
    method.before_step(Progress(0, 10, epoch=5))
    loss, projections = method(*views())
    loss.backward()
    assert projections.shape == (10, 12)
    for parameter_name, p in method.named_parameters():
        if parameter_name.startswith("teacher."):
            assert not p.requires_grad and p.grad is None
        # A bias before BatchNorm changes nothing.
        elif p.requires_grad and not parameter_name.endswith("bias"):
            assert p.grad.abs().max() > 1e-7, parameter_name


@pytest.mark.parametrize("name", METHODS)
def test_a_method_goes_on_from_its_state_as_if_it_had_not_stopped(name):
    method = build(name)
    for step in range(2):
        train_a_step(method, Progress(step, 4, epoch=step), seed=step)
    state = copy.deepcopy(method.state_dict())
    resumed = build(name)
    resumed.load_state_dict(state)
    for step in range(2, 4):
        losses = [
            train_a_step(m, Progress(step, 4, epoch=step), seed=step) for m in (method, resumed)
        ]
        assert torch.equal(*losses)
    for (key, a), b in zip(method.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


@pytest.mark.parametrize("name", METHODS)
def test_mixed_precision_hardly_changes_the_loss(name):
    method = build(name).train()
    exact, _ = copy.deepcopy(method)(*views())
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = method(*views())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    "name", [name for name in METHODS if issubclass(METHODS[name], PredictionMethod)]
)
def test_extra_targets_join_the_targets_of_both_views_in_equal_parts(name):
    method = build(name).eval()  # so that BatchNorm does not mix the images
    images = views()
    with torch.no_grad():
        others = [method.targets(view) for view in randoms(3, 10, 3, 4, 4, seed=7)]
        predictions = [method.predict(method.project(view)) for view in images]
        targets = [*(method.targets(view) for view in images), *others]
        expected = 0.0
        for i in range(2):
            terms = [
                method.distances(predictions[i][:, None], targets[j][:, None]).mean()
                for j in range(5)
                if j != i
            ]
            expected += method.direction_weight * sum(terms) / 4
        loss, _ = method.loss(*images, torch.stack(others, dim=1))
    torch.testing.assert_close(loss, expected)


def test_unknown_methods_and_options_are_named():
    with pytest.raises(UserError, match="'simsim'; known are .*simclr, simsiam"):
        build("simsim")
    with pytest.raises(UserError, match=r"method\.temperature: simsiam"):
        build("simsiam", temperature=0.1)
    assert build("simsiam", temperature=None, hidden=7).projector[0].out_features == 7


def test_only_a_queue_asks_for_batches_of_a_certain_size():
    def refuses(method):
        try:
            method.check(21)  # 42 keys for a queue of 40
        except UserError:
            return True
        return False

    assert [name for name in METHODS if refuses(build(name))] == ["mocov2plus"]
