import torch
from torch import nn

from ffssl.backbones import build_backbone
from ffssl.data.loader import ViewLoader
from ffssl.data.normalise import to_input
from ffssl.data.policy import EVALUATION
from ffssl.evaluate import features as features_module
from ffssl.evaluate.features import extract_features, frozen_features
from ffssl.parallel.device import mixed_precision

CPU = torch.device("cpu")
OFF, _ = mixed_precision("off", CPU)


def backbone():
    torch.manual_seed(0)
    network = build_backbone("resnet-small").train()
    for _ in range(3):
        network(torch.randn(8, 3, 32, 32))
    return network


def test_features_are_those_of_running_statistics_and_leave_the_backbone_as_it_was(betons):
    network = backbone()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with ViewLoader(
        betons["val"],
        batch_size=16,
        views=1,
        resolution=32,
        policy=EVALUATION,
        shuffle=False,
        drop_last=False,
    ) as loader:
        features, labels = extract_features(network, loader, CPU, OFF)
        short, same = extract_features(network, loader, CPU, OFF, store=CPU, unit_length=True)
        images = torch.cat([views[:, 0].clone() for views, _, _ in loader])
        expected_labels = loader.beton.labels.tolist()
    assert network.training and all(module.training for module in network.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert not features.requires_grad and labels.tolist() == same.tolist() == expected_labels

    with torch.no_grad():
        # A batch of one has no statistics of its own.
        alone = torch.cat([network.eval()(to_input(image[None])) for image in images])
        of_the_batch = network.train()(to_input(images))
    torch.testing.assert_close(features, alone, rtol=1e-4, atol=1e-5)
    assert (features - of_the_batch).abs().max() > 0.01
    assert short.dtype == torch.float16
    torch.testing.assert_close(
        short.float(), nn.functional.normalize(features, dim=1), rtol=0, atol=5e-4
    )


def test_a_large_batch_goes_through_in_parts(monkeypatch):
    network, images = backbone().eval(), torch.randint(256, (11, 3, 32, 32), dtype=torch.uint8)
    whole, sizes = frozen_features(network, images, OFF), []
    monkeypatch.setattr(features_module, "IMAGES_AT_ONCE", 4)
    network.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    torch.testing.assert_close(frozen_features(network, images, OFF), whole)
    assert sizes == [4, 4, 3]
