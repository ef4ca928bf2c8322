import copy

import pytest
import torch
from support.small_methods import (
    WideBackbone,
    assert_same_gradients,
    assert_same_value_and_gradients,
    build,
    pair,
    randoms,
    unlike_the_student,
    views,
)
from torch import nn
from torch.nn import functional as F

from ffssl.errors import UserError
from ffssl.methods import build_method


def info_nce_by_the_paper(queries, keys, queue, temperature):
    """MoCo, eq. 1, by loops; all vectors normalised first."""
    total = 0.0
    for q, k in zip(queries, keys):
        q, k = q / q.norm(), k / k.norm()
        logits = [
            torch.dot(q, k) / temperature,
            *(torch.dot(q, other) / temperature for other in queue),
        ]
        total = total - torch.log(torch.exp(logits[0]) / sum(torch.exp(logit) for logit in logits))
    return total / len(queries)


def test_info_nce_and_its_gradient_are_the_papers():
    method = build("mocov2plus", temperature=0.3)
    (q,), (exact,) = (
        [pair(7, 12, dtype)[0].requires_grad_()] for dtype in (torch.float32, torch.float64)
    )
    keys = pair(7, 12)[1]
    value = method.distances(q[:, None], keys[:, None]).mean()
    expected = info_nce_by_the_paper(exact, keys.double(), method.queue.double(), 0.3)
    assert_same_value_and_gradients([q], [exact], value, expected)


def test_info_nce_and_its_gradient_are_lightlys():
    lightly = pytest.importorskip("lightly.loss").NTXentLoss(
        temperature=0.2, memory_bank_size=(40, 12)
    )
    method = build("mocov2plus")
    lightly.memory_bank.bank = method.queue.clone()
    (ours, keys), (theirs, _) = pair(8, 12), pair(8, 12)
    ours.requires_grad_(), theirs.requires_grad_()
    assert_same_value_and_gradients(
        [ours],
        [theirs],
        method.distances(ours[:, None], keys[:, None]).mean(),
        lightly(theirs, keys),
    )


def test_loss_is_symmetric_against_the_old_queue_without_the_teachers_gradient():
    method = unlike_the_student(build("mocov2plus"))
    exact = copy.deepcopy(method).double()
    value, _ = method.loss(*views())
    value.backward()
    q = [exact.projector(exact.backbone(view)) for view in views().double()]
    k = [exact.teacher(view) for view in views().double()]
    expected = info_nce_by_the_paper(q[0], k[1], exact.queue, 0.2) + info_nce_by_the_paper(
        q[1], k[0], exact.queue, 0.2
    )
    expected.backward()
    torch.testing.assert_close(value.double(), expected, atol=1e-5, rtol=1e-5)
    assert_same_gradients(method, exact)
    keys = F.normalize(torch.cat(k), dim=1).float()
    torch.testing.assert_close(method.queue[:20], keys, atol=1e-5, rtol=1e-4)


def test_keys_replace_the_oldest_in_order_and_wrap_around():
    method = build("mocov2plus", queue=30)  # room for one and a half steps of ten pairs
    expected = list(method.queue.clone())
    oldest = 0
    for step in range(4):
        keys = randoms(10, 2, 12, seed=step)
        method.remember(keys)
        for key in [*keys[:, 0], *keys[:, 1]]:
            expected[oldest] = key / key.norm()
            oldest = (oldest + 1) % 30
        torch.testing.assert_close(method.queue, torch.stack(expected))
        assert method.oldest.item() == oldest


def test_the_queue_works_without_a_value_to_read():
    method = build("mocov2plus").to("meta")
    method.remember(torch.empty(10, 2, 12, device="meta"))


@pytest.mark.parametrize("batch_size", [21, 40, 41])
def test_a_queue_shorter_than_a_steps_keys_is_refused(batch_size):
    with pytest.raises(
        UserError, match=rf"--method.queue: 40 .*--training.batch_size={batch_size}"
    ):
        build("mocov2plus").check(batch_size)


def test_a_queue_that_fits_is_not():
    for batch_size in (2, 15, 20):
        build("mocov2plus").check(batch_size)


def test_the_queue_starts_with_vectors_of_length_1_in_all_directions():
    queue = build("mocov2plus", queue=4000).queue
    torch.testing.assert_close(queue.norm(dim=1), torch.ones(4000))
    assert queue.mean(0).norm() < 0.1


def test_the_projector_computes_what_lightlys_does():
    heads = pytest.importorskip("lightly.models.modules")
    method = build_method("mocov2plus", WideBackbone(), {"queue": 8})
    ours, theirs = method.projector, heads.MoCoProjectionHead(2048, 2048, 128)
    assert [type(layer) for layer in ours] == [nn.Linear, nn.ReLU, nn.Linear]
    theirs.layers.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(randoms(4, 2048)), theirs(randoms(4, 2048)))
