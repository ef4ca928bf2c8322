import pytest
import torch
from support.small_runs import Code, save_run

from ffssl.errors import UserError
from ffssl.load import backbone_of, fingerprint, load_run
from ffssl.run_folder import checkpoint


def test_a_run_is_loaded_from_its_folder_and_from_its_checkpoint(tmp_path):
    method = save_run(tmp_path, "--training.learning_rate=0.3", epoch=2)
    (tmp_path / checkpoint.NAME).rename(tmp_path / "other.pt")
    (tmp_path / checkpoint.NAME).symlink_to("other.pt")
    for path in (tmp_path, str(tmp_path / "other.pt")):
        options, loaded, state = load_run(path)
        assert (
            options.training.learning_rate == 0.3
            and options.method.settings["hidden"] == 32
            and options.data.validation is None
        )
        assert state["epoch"] == 2 and "torch" in state["written_on"]
        assert not any(module.training for module in loaded.modules())
        images = torch.randn(4, 3, 32, 32)
        assert torch.equal(loaded.project(images), method.project(images))


def test_options_that_are_newer_than_the_run_have_their_defaults(tmp_path):
    save_run(tmp_path)
    change_state(tmp_path, lambda state: state["options"]["training"].pop("amp"))
    assert load_run(tmp_path).options.training.amp == "auto"


def change_state(folder, change):
    state = checkpoint.load(folder)
    change(state)
    checkpoint.save(folder, state)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda state: state["options"]["model"].update(backbone="resnet18"),
            r"weights do not fit its options \(simclr over resnet18\): .*Missing key",
        ),
        (
            lambda state: state["options"]["method"].update(hidden=24),
            "weights do not fit its options .*size mismatch",
        ),
        (
            lambda state: state["options"]["model"].update(backbone="resnet19"),
            "options are not those of this version.*unknown backbone 'resnet19'",
        ),
        (
            lambda state: state["options"]["model"].update(newer=1),
            "options are not those of this version.*model.newer: unknown option",
        ),
        (lambda state: state.pop("method"), "not the checkpoint of a run"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_named(tmp_path, change, message):
    save_run(tmp_path)
    change_state(tmp_path, change)
    with pytest.raises(UserError, match=f"^{tmp_path / checkpoint.NAME}: .*{message}") as error:
        load_run(tmp_path)
    assert "\n" not in str(error.value)


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(
        UserError, match=f"{tmp_path}: holds no checkpoint.pt; name the folder of a run"
    ):
        load_run(tmp_path)
    with pytest.raises(UserError, match="absent: no such run"):
        load_run(tmp_path / "absent")
    torch.save([torch.zeros(2)], tmp_path / "tensors.pt")
    with pytest.raises(UserError, match="tensors.pt: not the checkpoint of a run"):
        load_run(tmp_path / "tensors.pt")
    (tmp_path / "text.pt").write_text("text")
    with pytest.raises(UserError, match=r"text.pt: not a readable checkpoint \(\w+\)$"):
        load_run(tmp_path / "text.pt")


def test_a_run_cannot_run_code(tmp_path):
    save_run(tmp_path)
    state = torch.load(tmp_path / checkpoint.NAME, weights_only=True)
    torch.save(state | {"epoch": Code(tmp_path / "ran")}, tmp_path / checkpoint.NAME)
    with pytest.raises(UserError, match="not a readable checkpoint"):
        load_run(tmp_path)
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / checkpoint.NAME, weights_only=False)
    assert (tmp_path / "ran").exists()  # the trap works


@pytest.mark.parametrize(
    "name, more",
    [
        ("byol", "--method.predictor=8"),
        ("mocov2plus", "--method.queue=64"),
        ("dino", "--method.prototypes=12"),
    ],
)
def test_the_teachers_backbone_is_the_first_of_what_images_pass(tmp_path, name, more):
    save_run(tmp_path, f"--method.name={name}", more)
    method = load_run(tmp_path).method
    teacher, images = backbone_of(method, "teacher"), torch.randn(2, 3, 32, 32)
    assert backbone_of(method, "student") is method.backbone
    assert teacher.state_dict().keys() == method.backbone.state_dict().keys()
    rest = torch.nn.Sequential(*list(method.teacher.layers)[1:])
    assert torch.equal(rest(teacher(images)), method.teacher(images))


def test_fingerprints_tell_weights_and_statistics_apart():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    first = fingerprint(network)
    assert len(first) == 16 and fingerprint(network.to(memory_format=torch.channels_last)) == first
    network[1].running_mean[0] += 1e-6
    assert fingerprint(network) != first
