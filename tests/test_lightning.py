"""lightly's SimSiam as a LightningModule, trained with the callbacks on a CPU."""

import json

import pytest
import pytorch_lightning as pl
import torch
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules import SimSiamPredictionHead, SimSiamProjectionHead
from torch.nn import functional as F

from ffssl import FixedOneCycleLR, ProgressiveMagnitude, ProgressiveResolution, schedules, to_input
from ffssl.backbones import SmallResNet
from ffssl.data import POLICIES, ViewLoader
from ffssl.errors import UserError
from ffssl.lightning import OneCycle, ViewSchedule, training_pair

pytestmark = pytest.mark.filterwarnings("ignore")  # of Lightning, on what a small test lacks

EPOCHS, WARMUP, BATCH, VIEWS, PEAK = 4, 1, 16, 3, 0.05
RESOLUTION = ProgressiveResolution(EPOCHS, WARMUP, low=16, high=32, step=16)
MAGNITUDE = ProgressiveMagnitude(EPOCHS, low=4, high=6)


def loss_of(first, second):
    (z0, p0), (z1, p1) = first, second
    return -(F.cosine_similarity(p0, z1) + F.cosine_similarity(p1, z0)) / 2


class SimSiam(pl.LightningModule):
    """Notes in a file of its rank what each step saw."""

    def __init__(self, beton, notes):
        super().__init__()
        torch.manual_seed(0)
        self.beton, self.notes = beton, notes
        self.backbone = SmallResNet((8, 16))
        self.projector = SimSiamProjectionHead(16, 16, 8)
        self.predictor = SimSiamPredictionHead(8, 4, 8)
        self.criterion = NegativeCosineSimilarity()

    def train_dataloader(self):
        return open_loader(
            self.beton,
            batch_size=BATCH // self.trainer.world_size,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
        )

    def forward(self, x):
        z = self.projector(self.backbone(x))
        return z.detach(), self.predictor(z)

    def training_step(self, batch, batch_idx):
        x0, x1 = training_pair(self, batch.views, loss_of, resolution=8)
        chosen = [
            [
                next(
                    v
                    for v in range(batch.views.shape[1])
                    if torch.equal(to_input(b[v : v + 1])[0], x)
                )
                for x in pair
            ]
            for b, *pair in zip(batch.views, x0, x1)
        ]
        [group] = self.optimizers().param_groups
        with open(f"{self.notes}/rank{self.global_rank}.jsonl", "a") as file:
            note = {
                "epoch": self.current_epoch,
                "step": self.global_step,
                "shape": list(batch.views.shape),
                "indices": batch.indices.tolist(),
                "first": batch.views[:, 0].sum((1, 2, 3), dtype=torch.int64).tolist(),
                "chosen": chosen,
                "rate": group["lr"],
                "momentum": group["momentum"],
            }
            file.write(json.dumps(note) + "\n")
        (z0, p0), (z1, p1) = self(x0), self(x1)
        return (self.criterion(z0, p1) + self.criterion(z1, p0)) / 2

    def on_train_end(self):
        sums = [p.double().sum().item() for p in self.parameters()]
        with open(f"{self.notes}/weights{self.global_rank}.json", "w") as file:
            json.dump(sums, file)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.06)


def open_loader(beton, **options):
    usual = {"batch_size": BATCH, "views": VIEWS, "resolution": 32, "workers": 1}
    return ViewLoader(beton, policy=POLICIES["simsiam"], **usual | options)


class Save(pl.Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            trainer.save_checkpoint(f"{pl_module.notes}/half.ckpt")


def callbacks():
    views = ViewSchedule(RESOLUTION, MAGNITUDE, pairs_until=WARMUP)
    return [OneCycle(PEAK, WARMUP, momentum=(0.8, 0.9)), views]


def trainer_of(*its_callbacks, **options):
    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    usual = {"max_epochs": EPOCHS, "accelerator": "cpu", "devices": 1}
    return pl.Trainer(callbacks=[*its_callbacks], **quiet | usual | options)


def notes_of(folder, rank=0):
    return [json.loads(line) for line in (folder / f"rank{rank}.jsonl").read_text().splitlines()]


def assert_scheduled(notes, steps):
    """Steps had the learning rate and momentum of eq. 8, epochs their resolution and views."""
    assert [note["step"] for note in notes] == list(range(EPOCHS * steps))
    for note in notes:
        epoch, cycle = note["step"] // steps, {"total": EPOCHS * steps, "warmup": WARMUP * steps}
        assert note["epoch"] == epoch
        assert note["rate"] == schedules.f1_clr(note["step"], **cycle, peak=PEAK)
        assert note["momentum"] == schedules.anti_phase_momentum(
            note["step"], **cycle, low=0.8, high=0.9
        )
        views = 2 if epoch < WARMUP else VIEWS
        side = RESOLUTION(epoch)
        assert note["shape"][1:] == [views, 3, side, side]
        if views == 2:
            assert note["chosen"] == [[0, 1]] * len(note["chosen"])
    later = [tuple(pair) for note in notes[WARMUP * steps :] for pair in note["chosen"]]
    assert set(later) == {(0, 1), (0, 2), (1, 2)}


def test_a_training_follows_the_schedules_and_goes_on_from_a_checkpoint(betons, tmp_path):
    model = SimSiam(betons["train"], tmp_path)
    trainer_of(*callbacks(), Save()).fit(model)
    notes = notes_of(tmp_path)
    steps = 160 // BATCH
    assert_scheduled(notes, steps)
    with open_loader(betons["train"]) as loader:  # the views are those of the epoch's magnitude
        for epoch in (0, EPOCHS - 1):
            note = notes[epoch * steps]
            settings = RESOLUTION(epoch), MAGNITUDE(epoch)
            loader.set_epoch(epoch, *settings, views=note["shape"][1])
            batch = next(iter(loader))
            assert batch.indices.tolist() == note["indices"]
            assert batch.views[:, 0].sum((1, 2, 3), dtype=torch.int64).tolist() == note["first"]

    (tmp_path / "again").mkdir()
    again = SimSiam(betons["train"], tmp_path / "again")
    trainer_of(*callbacks()).fit(again, ckpt_path=tmp_path / "half.ckpt")
    assert notes_of(tmp_path / "again") == notes[2 * steps :]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_two_ranks_share_each_epoch_and_end_with_the_same_weights(betons, tmp_path):
    model = SimSiam(betons["train"], tmp_path)
    before = [p.double().sum().item() for p in model.parameters()]
    trainer_of(*callbacks(), devices=2, strategy="ddp_fork").fit(model)
    ranks = [notes_of(tmp_path, rank) for rank in range(2)]
    steps = 160 // BATCH
    for notes in ranks:
        assert_scheduled(notes, steps)
        assert {note["shape"][0] for note in notes} == {BATCH // 2}
    for epoch in range(EPOCHS):
        seen = [
            index
            for notes in ranks
            for note in notes[epoch * steps : (epoch + 1) * steps]
            for index in note["indices"]
        ]
        assert sorted(seen) == list(range(160))
    first, second = (json.loads((tmp_path / f"weights{r}.json").read_text()) for r in range(2))
    assert first == second != before


class WithScheduler(SimSiam):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [FixedOneCycleLR(optimizer, 10, 2, PEAK)]


class ByItself(SimSiam):
    automatic_optimization = False


def schedule(epochs):
    return ViewSchedule(ProgressiveResolution(epochs, 0, 16, 32, 16))


@pytest.mark.parametrize(
    "kind, callback, options, message",
    [
        (SimSiam, schedule(5), {}, "the resolution has 5 epochs, the Trainer max_epochs=4"),
        (SimSiam, ViewSchedule(magnitude=ProgressiveMagnitude(3, 4, 6)), {}, "magnitude has 3"),
        (SimSiam, OneCycle(PEAK, EPOCHS), {}, r"warmup_steps is 40, must lie in 0..39"),
        (SimSiam, OneCycle([0.1, 0.2], 1), {}, "max_lr has 2 values for 1 parameter groups"),
        (SimSiam, OneCycle(PEAK, 1), {"max_epochs": -1}, "length of training is not known"),
        (WithScheduler, OneCycle(PEAK, 1), {}, "WithScheduler.configure_optimizers returns a"),
        (ByItself, OneCycle(PEAK, 1), {}, "ByItself has 1 optimisers, or steps them by itself"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_step(
    betons, tmp_path, kind, callback, options, message
):
    with pytest.raises(UserError, match=message) as error:
        trainer_of(callback, **options).fit(kind(betons["train"], tmp_path))
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_another_loader_is_refused(betons, tmp_path):
    model = SimSiam(betons["train"], tmp_path)
    loader = torch.utils.data.DataLoader(torch.zeros(8, 2))
    with pytest.raises(UserError, match="the Trainer's loader is a DataLoader, must be a"):
        trainer_of(schedule(EPOCHS)).fit(model, loader)
    with (
        open_loader(betons["train"], rank=1, world_size=2) as loader,
        pytest.raises(UserError, match="that of rank 1 of 2, the Trainer's is 0 of 1; make"),
    ):
        trainer_of(schedule(EPOCHS)).fit(model, loader)
    with (
        ViewLoader(betons["train"], batch_size=8, views=(2, 2), resolution=(32, 16)) as loader,
        pytest.raises(UserError, match="the loader has views of several sizes"),
    ):
        trainer_of(schedule(EPOCHS)).fit(model, loader)


def test_a_quick_run_of_one_batch_passes(betons, tmp_path):
    trainer_of(*callbacks(), fast_dev_run=True).fit(SimSiam(betons["train"], tmp_path))
    assert len(notes_of(tmp_path)) == 1


def test_views_of_lightlys_transforms_are_left_as_they_are(betons, tmp_path):
    model = SimSiam(betons["train"], tmp_path).eval()
    views = list(torch.rand(4, 5, 3, 24, 24))
    first, second = training_pair(model, views[:2], loss_of, normalise=None)
    assert first is views[0] and second is views[1]
    first, _ = training_pair(model, views, loss_of, normalise=None)
    assert all(any(torch.equal(x, view[i]) for view in views) for i, x in enumerate(first))
