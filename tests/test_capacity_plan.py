"""The capacity plan against cases computed by hand."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ffssl.benchmark import plan
from ffssl.benchmark.capacity import Machines, Measured, Work, cores_per_gpu, exchange_seconds, schedule, step_times, storage_of, work_of
from ffssl.cost import Flops
from ffssl.data.convert import ConvertOptions, convert
from ffssl.data.sources.embedded import Embedded
from ffssl.errors import UserError

CONFIG = str(Path(__file__).parent.parent / "rn50_configs" / "imagenette_baseline.yaml")
MACHINES = Machines(gpus=8, nodes=2, cores=36, memory=100e9, disk=1e12, disk_rate=500e6, network_rate=1.25e9, link_rate=12.5e9)
WORK = Work(224, epochs=10, gpu=0.001, backward=2 / 3, loader=0.002)
STEP = {"batch_size": 512, "parts": 1, "gradient": 150e6, "image_bytes": 50e3, "storage_rate": 500e6, "overlap": True}


def test_a_ring_carries_twice_the_gradient_but_for_a_share():
    assert exchange_seconds(150e6, 8, 12.5e9) == pytest.approx(0.021)
    assert exchange_seconds(150e6, 2, 12.5e9) == pytest.approx(0.012)
    assert exchange_seconds(150e6, 1, 12.5e9) == 0


def test_times_of_a_step():
    times = step_times(WORK, MACHINES, **STEP)
    assert times.gpu == pytest.approx(0.064)  # 64 images each
    assert times.link == 0  # 21 ms in the 42.7 ms of the backward pass
    assert times.loader == pytest.approx(0.016)  # 1.024 core seconds on 72 - 8 cores
    assert times.storage == pytest.approx(0.0256)  # 12.8 MB a node
    assert times.step == times.gpu and times.bound == "GPU" and times.efficiency == 1
    assert cores_per_gpu(WORK, times) == pytest.approx(3)  # 1000 images/s of 2 ms, and one


def test_an_exchange_is_hidden_by_the_backward_pass_or_not_at_all():
    after = step_times(WORK, MACHINES, **STEP | {"overlap": False})
    assert after.step == pytest.approx(0.064 + 0.021) and after.bound == "GPU"
    assert after.efficiency == pytest.approx(64 / 85) and cores_per_gpu(WORK, after) == pytest.approx(1 + 2 * 64 / 85)
    slow = replace(MACHINES, link_rate=2.5e9)  # 105 ms
    hidden, bare = (step_times(WORK, slow, **STEP | {"overlap": overlap}) for overlap in (True, False))
    assert hidden.link == pytest.approx(0.105 - 0.064 * 2 / 3) and hidden.bound == "link"
    assert bare.step == pytest.approx(0.169) and bare.bound == "link"


def test_only_the_last_part_of_a_batch_hides_the_exchange():
    parts = step_times(WORK, MACHINES, **STEP | {"parts": 4})
    assert parts.gpu == pytest.approx(0.064) and parts.link == pytest.approx(0.021 - 0.064 * 2 / 3 / 4) and parts.bound == "link"
    assert step_times(WORK, MACHINES, **STEP | {"parts": 4, "overlap": False}).link == pytest.approx(0.021)


def test_what_is_slowest_is_the_bound():
    few_cores = step_times(WORK, replace(MACHINES, cores=8), **STEP)
    assert few_cores.step == pytest.approx(0.128) and few_cores.bound == "loader"
    slow_disk = step_times(WORK, MACHINES, **STEP | {"storage_rate": 50e6})
    assert slow_disk.step == pytest.approx(0.256) and slow_disk.bound == "storage"


def test_a_file_is_kept_where_it_fits():
    for beton, expected in [
        (68e9, ("page cache", float("inf"))),  # 100 GB less 8 for each of 4 processes
        (69e9, ("local disk", 500e6)),
        (1.1e12, ("network", 1.25e9)),
    ]:
        assert storage_of(beton, MACHINES) == expected


def test_a_file_that_fits_the_page_cache_is_read_by_every_node_in_the_first_epoch():
    work, run = [WORK, replace(WORK, resolution=112, gpu=0.00025)], {"images": 10**6, "batch_size": 512, "parts": 1, "gradient": 150e6, "overlap": True}
    where, rows = schedule(work, MACHINES, **run, beton=60e9)
    assert where == "page cache" and [(row.resolution, row.epochs) for row in rows] == [(224, 1), (224, 9), (112, 10)]
    assert rows[0].times.storage == pytest.approx(512 * 60e3 / 500e6) and rows[1].times.storage == 0
    # 21 ms of exchange in 16 ms of computing, of which 10.7 are the backward pass
    seconds = [1 * 1953 * 0.064, 9 * 1953 * 0.064, 10 * 1953 * (0.016 + 0.021 - 0.016 * 2 / 3)]
    assert [row.seconds for row in rows] == pytest.approx(seconds) and rows[2].times.bound == "link"
    where, rows = schedule(work, MACHINES, **run, beton=200e9)
    assert where == "local disk" and [row.epochs for row in rows] == [10, 10]
    assert all(row.times.bound == "storage" and row.times.step == pytest.approx(512 * 200e3 / 2 / 500e6) for row in rows)


def test_a_resolution_that_was_not_measured_goes_by_the_flops_of_the_nearest():
    def flops(side):
        return Flops(forward=2 * side**2, teacher=side**2, selection=64**2)

    measured = [Measured(224, 0.001, 0.002), Measured(96, 0.0003, 0.0015)]
    work = work_of([(224, 5), (192, 3), (96, 2)], measured, flops)
    assert [(stage.resolution, stage.epochs, stage.loader) for stage in work] == [(224, 5, 0.002), (192, 3, 0.002), (96, 2, 0.0015)]
    expected = 0.001 * (7 * 192**2 + 64**2) / (7 * 224**2 + 64**2)
    assert [stage.gpu for stage in work] == pytest.approx([0.001, expected, 0.0003])
    assert work[1].backward == pytest.approx(4 * 192**2 / (7 * 192**2 + 64**2))


# The command


def planned(capsys, *words):
    plan.main(["--config", CONFIG, "--images=imagenette", "--disk-gb=1000", "--memory=64", *words])
    return capsys.readouterr().out


def total_hours(text):
    return float(next(line for line in text.splitlines() if line.split()[:1] == ["run"]).split()[-1])


def test_hours_and_gradient_of_a_run(capsys):
    text = planned(capsys, "--gpus=1", "--cores=5", "--step-ms=100", "--loader-ms=1")
    assert total_hours(text) == pytest.approx(800 * 73 * 0.1 / 3600, abs=0.005)
    # backbone, projector and predictor of SimSiam
    parameters = 23_508_032 + 3 * 2048**2 + 2 * 2 * 2048 + 2048 * 512 + 2 * 512 + 512 * 2048 + 2048
    assert f"{4 * parameters / 1e6:.1f} MB   counted" in text
    assert "0.781 ms   given: 100 ms for 128 images at 224 px" in text and "1.000 ms   given" in text and "1.0 GB, is read from the page cache" in text
    assert "500 MB/s   assumed" in text
    loader_bound = planned(capsys, "--gpus=1", "--cores=2", "--step-ms=100", "--loader-ms=1")
    assert total_hours(loader_bound) == pytest.approx(800 * 73 * 0.128 / 3600, abs=0.005) and " loader " in loader_bound.split("bound")[1]
    halved = planned(capsys, "--gpus=1", "--cores=5", "--step-ms=100", "--step-images=256", "--loader-ms=0.1")
    assert total_hours(halved) == pytest.approx(800 * 73 * 0.05 / 3600, abs=0.005)


def test_the_loader_is_measured_on_the_training_file(capsys, tmp_path):
    convert(Embedded("train", 160), tmp_path / "train.beton", ConvertOptions(progress=False))
    plan.main(["--config", CONFIG, f"--data.train={tmp_path / 'train.beton'}", "--gpus=1", "--cores=4", "--step-ms=1", "--resolution.max=64"])
    text = capsys.readouterr().out
    (line,) = [line for line in text.splitlines() if "measured on a core of this machine, on data.train" in line]
    assert 0.05 < float(line.split()[3]) < 20
    assert "160   counted in data.train" in text and "measured: the mean in data.train" in text


def test_a_plan_knows_in_how_many_parts_a_batch_is_computed(capsys):
    words = ["--gpus=8", "--cores=64", "--step-ms=100", "--loader-ms=0.1", "--link-gbps=160", "--image-kb=1"]
    whole, parts = (total_hours(planned(capsys, *words, f"--training.accumulate={n}")) for n in (1, 8))
    exchange = 2 * 7 / 8 * 4 * 38.2e6 / 20e9
    assert whole == pytest.approx(800 * 73 * (0.0125 + max(0, exchange - 0.0125 * 2 / 3)) / 3600, abs=0.01)
    assert parts == pytest.approx(800 * 73 * (0.0125 + exchange - 0.0125 * 2 / 3 / 8) / 3600, abs=0.01)


def speedup_of(**configs):
    """What the speed-up benchmark writes, as far as a plan reads it."""
    keys = ("resolution", "steps", "batch_size", "step_ms", "loader_images_per_second_per_core")
    return {"configs": [{"name": name, "stages": [dict(zip(keys, row)) for row in rows]} for name, rows in configs.items()]}


def test_what_the_speedup_benchmark_measured_of_the_config_is_taken(capsys, tmp_path):
    path = tmp_path / "speedup.json"
    content = speedup_of(efficient=[(224, 10, 64, 9.0, 100)], imagenette_baseline=[(224, 10, 64, 50.0, 500), (96, 10, 64, 20.0, 800)])
    path.write_text(json.dumps(content))
    assert plan.read_measured(path, "imagenette_baseline") == [Measured(224, 0.05 / 64, 1 / 500), Measured(96, 0.02 / 64, 1 / 800)]
    text = planned(capsys, "--gpus=1", "--cores=5", f"--measured={path}")
    assert total_hours(text) == pytest.approx(800 * 73 * 0.1 / 3600, abs=0.005)
    assert f"at 224, 96 px   measured: {path}" in text


@pytest.mark.parametrize("content", ["", "[]", '{"configs": [{"name": "imagenette_baseline"}]}', json.dumps(speedup_of(efficient=[])),
                                     json.dumps(speedup_of(imagenette_baseline=[(1, 1, 1, 0, 1)]))])  # fmt: skip
def test_a_measured_file_without_the_configs_stages_is_refused(tmp_path, content):
    path = tmp_path / "speedup.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"--measured: .*speedup\.json") as raised:
        plan.read_measured(path, "imagenette_baseline")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--gpus=3", "--step-ms=1", "--cores=9"], "3 GPUs.*128 images equally"),
        (["--gpus=128", "--step-ms=1", "--cores=256"], "128 images equally, with two or more"),
        (["--gpus=8", "--step-ms=1", "--cores=9", "--training.accumulate=32"], "in each of --training.accumulate=32 parts"),
        (["--gpus=8", "--step-ms=1", "--cores=8"], "--cores: 8 a node leave none"),
        (["--gpus=1", "--cores=4"], "--step-ms.*--measured.*required"),
        (["--gpus=1", "--step-ms=-1"], "--step-ms.*expected a number"),
        (["--gpus=1", "--step-ms=1", "--training.epoch=2"], "training.epochs"),
        (["--gpus=1", "--cores=4", "--step-ms=1", "--measured=x"], "not allowed with"),
    ],
)
def test_mistakes_are_named(words, message):
    with pytest.raises(UserError, match=message):
        plan.main(["--config", CONFIG, "--images=imagenette", *words])


