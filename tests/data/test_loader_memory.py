"""What the loader takes of the machine: memory, threads, file descriptors, the disk, start-up time.

Each in a process of its own.
"""

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from ffssl.data import loader as loader_module
from ffssl.data.beton.mapped import ImageFiles
from ffssl.data.beton.read import MODE_RAW, read_beton
from ffssl.data.beton.write import BetonWriter
from ffssl.data.convert.conversion import ConvertOptions, convert
from ffssl.data.convert.sources.folder import ImageFolder
from ffssl.data.loader import ViewLoader
from ffssl.data.memory import available_memory
from ffssl.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
PREAMBLE = """
import itertools, os, sys, threading, time
from ffssl.data import ViewLoader

path = sys.argv[1]

def resident(kind):  # of VmRSS, VmHWM, RssAnon, RssFile
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(kind + ":"))
"""


def run_alone(code, *arguments):
    """What `code` prints, run by a fresh interpreter."""
    command = [sys.executable, "-c", PREAMBLE + textwrap.dedent(code), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def large_beton(tmp_path_factory):
    """2000 raw images of 300 kB, 600 MB in all: far more than the buffers of the loaders below."""
    path = tmp_path_factory.mktemp("large") / "large.beton"
    pixels = np.random.default_rng(0).integers(0, 256, 2000 + 320 * 320 * 3, np.uint8)
    with BetonWriter(path, 2000) as writer:
        for i in range(2000):
            writer.add(pixels[i : i + 320 * 320 * 3].tobytes(), MODE_RAW, 320, 320, i)
    yield path
    path.unlink()


def test_pinned_buffers_are_announced_as_torch_takes_them(betons, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for batch_size, expected in ((8, 2**14), (11, 2**15)):
        with ViewLoader(
            betons["train"],
            batch_size=batch_size,
            views=2,
            resolution=16,
            batches_ahead=1,
            workers=1,
        ) as loader:
            assert batch_size * 2 * 3 * 16 * 16 <= loader.buffer_bytes == expected


def test_memory_at_its_peak_is_what_was_announced(large_beton):
    run_alone(
        """
        with ViewLoader(path, batch_size=8, views=2, resolution=32, workers=2) as warm_up:
            next(iter(warm_up))
        before = resident("VmRSS")
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak is counted anew
        with ViewLoader(path, batch_size=128, views=4, resolution=160, workers=2) as loader:
            assert loader.buffer_bytes == 3 * 128 * 4 * 3 * 160 * 160
            assert loader.buffer_bytes < loader.memory_bytes < 1.1 * loader.buffer_bytes
            for _ in loader:
                pass
            grown = resident("VmHWM") - before
            # Of the file, while its batch is in memory, and what the kernel maps around it; of
            # photographs it would be a tenth.
            mapped = 1.3 * 3 * 128 * 320 * 320 * 3
            most = 1.3 * loader.buffer_bytes + mapped
            assert 0.9 * loader.buffer_bytes < grown < most, (grown, loader.buffer_bytes)
            del _  # a window on the buffers
        assert resident("VmRSS") - before < 0.2 * grown
        """,
        large_beton,
    )


def test_a_file_larger_than_the_buffers_is_served_without_holding_its_pages(large_beton):
    run_alone(
        """
        with ViewLoader(path, batch_size=16, views=1, resolution=64, workers=2) as loader:
            next(iter(loader))
            before = {kind: resident(kind) for kind in ("RssAnon", "RssFile")}
            for _ in range(2):
                for i, _ in enumerate(loader):
                    if i % 10 == 0:
                        for kind, at_first in before.items():
                            assert resident(kind) - at_first < 60e6, kind  # of 600 MB that are read
        """,
        large_beton,
    )


def test_prefetched_ranges_and_no_others_are_read_from_the_disk(large_beton):
    run_alone(
        """
        import numpy as np
        from ffssl.data import read_beton
        from ffssl.data.beton.mapped import ImageFiles

        def bytes_read():
            with open("/proc/self/io") as file:
                return next(int(line.split()[1]) for line in file if line.startswith("read_bytes"))

        beton = read_beton(path)
        file = ImageFiles(beton.files)
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        chosen = np.random.default_rng(0).permutation(len(beton))[:40]
        begins, sizes = beton.images["data_ptr"][chosen], beton.image_sizes[chosen]
        before = bytes_read()
        file.prefetch(begins, sizes)
        parts = zip(begins.tolist(), sizes.tolist())
        total = sum(int(file.data[b : b + s].any()) for b, s in parts)
        assert total == 40
        assert bytes_read() - before < 1.2 * sizes.sum()
        """,
        large_beton,
    )


def test_fifty_epochs_left_early_keep_memory_threads_and_descriptors_flat(
    beton,
):
    run_alone(
        """
        def state():
            return resident("VmRSS"), threading.active_count(), len(os.listdir("/proc/self/fd"))

        def epochs(loader, first, last):
            for epoch in range(first, last):
                loader.set_epoch(epoch, resolution=(96, 64, 128)[epoch % 3])
                for batch in itertools.islice(loader, epoch % 4):
                    pass

        def loaders(first, last):
            for epoch in range(first, last):
                with ViewLoader(path, **options) as loader:
                    epochs(loader, epoch, epoch + 1)

        options = {"batch_size": 8, "views": 4, "resolution": 128, "workers": 2}
        with ViewLoader(path, **options) as loader:
            epochs(loader, 0, 20)
            memory, threads, files = state()
            epochs(loader, 20, 70)
            assert state()[1:] == (threads, files)
            # A batch lost an epoch would be 80 MB.
            assert state()[0] - memory < 4e6, state()[0] - memory
        loaders(0, 40)
        memory = state()[0]
        loaders(40, 90)
        assert state()[1:] == (threads - 2, files)  # a mapped file needs none
        assert state()[0] - memory < 16e6, state()[0] - memory  # their buffers are 240 MB
        """,
        beton,
    )


def test_nothing_is_compiled_again_when_the_kernels_are(beton):
    with ViewLoader(beton, batch_size=4, views=2, resolution=32) as loader:
        next(iter(loader))
    run_alone(
        """
        from ffssl.data.kernels.decode import render_samples
        next(iter(ViewLoader(path, batch_size=4, views=2, resolution=32)))
        assert render_samples.stats.cache_hits and not render_samples.stats.cache_misses
        """,
        beton,
    )


@pytest.mark.parametrize(
    "statement",
    [
        "import ffssl",
        "import ffssl.data",
        "import ffssl.data.memory, ffssl.data.beton.read",
        "import ffssl.study, ffssl.study.table_and_picture",
    ],
)
def test_light_imports_bring_neither_torch_nor_ffcv_nor_numba(statement):
    code = (
        f"import sys; {statement}; assert not {{'torch', 'ffcv', 'numba', 'torchvision'}} & "
        "set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("program", ["ffssl/train.py", "write_datasets.py"])
def test_help_is_printed_before_anything_slow_is_imported(program):
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as left:\n    assert not left.code\n"
        "assert not {'torch', 'ffcv', 'numba'} & set(sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", code, program, "--help"],
        check=True,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )


def test_names_of_the_package_are_those_of_its_modules_and_others_are_refused():
    import ffssl.data

    assert ffssl.data.ViewLoader is ViewLoader
    for name in ffssl.data.__all__:
        assert getattr(ffssl.data, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        ffssl.data.nonsense


# How much memory there is


def test_more_memory_than_the_machine_has_is_refused_before_it_is_taken(beton):
    with pytest.raises(
        UserError,
        match=r"images\.beton.*will hold [\d.]+ GB.*lower batch_size, views, batches_ahead",
    ):
        ViewLoader(beton, batch_size=10**7, views=32, resolution=1024, drop_last=False)


def test_a_single_large_image_is_named_with_what_helps(tmp_path, monkeypatch):
    folder, path = tmp_path / "photos", tmp_path / "photos.beton"
    folder.mkdir()
    for i, (width, height) in enumerate([(60, 40), (1600, 1200), (50, 50)]):
        PIL.Image.new("RGB", (width, height), "red").save(folder / f"{i}.jpg")
    convert(ImageFolder(folder), path, ConvertOptions(progress=False))
    words = {"batch_size": 2, "views": 1, "resolution": 16}
    size = 3 * 1600 * 1200
    monkeypatch.setattr(loader_module, "available_memory", lambda: 7 * size // 2)
    with pytest.raises(UserError) as caught:
        ViewLoader(path, **words, workers=16)
    assert (
        f"image 1 ({folder / '1.jpg'}) measures 1600 x 1200, "
        "which is 0.01 GB in each thread: lower workers to 3, or " in str(caught.value)
    )
    assert "--max-side" in str(caught.value) and "batch_size" not in str(caught.value)
    ViewLoader(path, **words, workers=3).close()
    monkeypatch.setattr(loader_module, "available_memory", lambda: size // 2)
    Path(f"{path}.json").unlink()
    with pytest.raises(
        UserError,
        match="image 1 measures 1600 x 1200, .* in each thread: write the file again with --max",
    ):
        ViewLoader(path, **words, workers=1)


def test_the_loaders_of_a_machine_share_its_memory_until_they_have_taken_theirs(beton, monkeypatch):
    words = {"batch_size": 8, "views": 2, "resolution": 64, "workers": 1}
    with ViewLoader(beton, **words) as loader:
        monkeypatch.setattr(loader_module, "available_memory", lambda: 2 * loader.memory_bytes)
        with ViewLoader(beton, **words, loaders_here=2) as second:
            monkeypatch.setattr(loader_module, "available_memory", lambda: loader.memory_bytes)
            next(iter(second))  # when the other has taken its half
        with pytest.raises(
            UserError, match=r"images\.beton.*threads on each of 2 processes; .* are available"
        ):
            ViewLoader(beton, **words, loaders_here=2)


def test_a_resolution_that_grows_beyond_the_memory_is_refused_when_its_epoch_begins(
    beton, monkeypatch
):
    monkeypatch.setattr(loader_module, "available_memory", lambda: 10**7)
    with ViewLoader(beton, batch_size=8, views=2, resolution=64) as loader:
        loader.set_epoch(0, resolution=512)
        with pytest.raises(UserError, match="0.01 GB are available"):
            next(iter(loader))
        monkeypatch.setattr(loader_module, "available_memory", lambda: None)
        assert next(iter(loader)).views.shape[-1] == 512


def test_the_memory_of_several_sizes_is_their_sum(beton):
    words = {"batch_size": 4, "views": (2, 6), "resolution": (32, 16), "workers": 1}
    with ViewLoader(beton, **words, max_resolution=(64, 16)) as loader:
        pixels = 3 * 4 * (2 * 64**2 + 6 * 16**2)
        assert loader.buffer_bytes == 3 * pixels
        assert (
            "3 batches of 4 x (2 views at 64 px and 6 views at 16 px)" in loader.describe_memory()
        )
        next(iter(loader))
        assert loader._buffer.numel() == 3 * pixels
        loader.set_epoch(0, resolution=(32, 32))
        assert loader.buffer_bytes == 3 * 3 * 4 * (2 * 64**2 + 6 * 32**2)


def machine(root, **files):
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = {"proc__meminfo": "MemTotal: 2000 kB\nMemAvailable: 1000 kB\nHugePages_Total: 0\n"}
VERSION_2 = {"proc__self__cgroup": "0::/jobs/mine\n"}


def test_available_memory_is_the_least_of_the_machines_and_of_every_control_group(tmp_path):
    assert available_memory(tmp_path / "elsewhere") is None
    assert available_memory(machine(tmp_path, **MEMINFO)) == 1_024_000
    group = {
        "sys__fs__cgroup__jobs__mine__memory.max": "max\n",
        "sys__fs__cgroup__jobs__mine__memory.current": "5\n",
    }
    assert available_memory(machine(tmp_path, **VERSION_2, **group)) == 1_024_000
    parent = {
        "sys__fs__cgroup__jobs__memory.max": "900000\n",
        "sys__fs__cgroup__jobs__memory.current": "400000\n",
        "sys__fs__cgroup__jobs__memory.stat": "anon 300000\nactive_file 60000\ninactive_file "
        "40000\n",
    }
    assert available_memory(machine(tmp_path, **parent)) == 600_000


def test_available_memory_inside_a_container_of_control_groups_1(tmp_path):
    files = {
        "proc__self__cgroup": "5:cpu,cpuacct:/a\n4:memory:/docker/of-the-host\n",
        "sys__fs__cgroup__memory__memory.limit_in_bytes": "500000\n",
        "sys__fs__cgroup__memory__memory.usage_in_bytes": "600000\n",
    }
    assert available_memory(machine(tmp_path, **MEMINFO, **files)) == 0


def test_what_was_read_leaves_the_process_and_comes_back(large_beton):
    def resident_of_files():
        with open("/proc/self/status") as status:
            return next(
                1024 * int(line.split()[1]) for line in status if line.startswith("RssFile")
            )

    file = ImageFiles(read_beton(large_beton).files)
    before = resident_of_files()
    total = file.data[10_000:60_000_000].sum()
    assert resident_of_files() - before > 55e6
    file.release()
    assert resident_of_files() - before < 2e6
    assert file.data[10_000:60_000_000].sum() == total
