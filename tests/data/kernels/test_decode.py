"""Decoding, the two ways to the same views (our loader and stock ffcv's), and what compiles
when.
"""

import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numba
import numpy as np
import PIL.Image
import pytest
from support.damage import without_segments
from support.sample_images import jpeg_bytes, smooth_image, write_beton

import ffssl.data.kernels
from ffssl.data.beton.read import MODE_JPEG, MODE_RAW
from ffssl.data.beton.write import BetonWriter
from ffssl.data.kernels.decode import decode, render_samples
from ffssl.data.loader import ViewLoader
from ffssl.data.policy import POLICIES, ViewPolicy

IDENTITY = ViewPolicy(crop_scale=(1, 1), crop_ratio=(1, 1), flip=0, jitter=0, grey=0, blur=0)

# ffcv's loader waits for ever when something goes wrong, so it runs in a process that can be
# killed.
STOCK_LOADER = """
import sys, numpy as np
# First: it spares ffcv's import what takes seconds to compile.
from ffssl.data.beton.ffcv_operation import ViewDecoder
from ffssl.data.policy import POLICIES
from ffcv.loader import Loader, OrderOption
from ffcv.transforms import ToTensor
from ffcv.pipeline import PipelineSpec

path, out = sys.argv[1:]
served = {}
for os_cache in (True, False):
    decoder = ViewDecoder(views=3, resolution=40, policy=POLICIES["byol"], seed=7)
    image = PipelineSpec("image", decoder=decoder, transforms=[ToTensor()])
    loader = Loader(
        path,
        batch_size=8,
        num_workers=2,
        order=OrderOption.SEQUENTIAL,
        os_cache=os_cache,
        drop_last=False,
        pipelines={"image": image, "label": None},
    )
    for epoch, resolution, magnitude in [(0, 40, 5.0), (3, 24, 6.5)]:
        decoder.set_epoch(epoch, resolution, magnitude)
        served[f"{os_cache} {epoch}"] = np.concatenate([views.numpy().copy() for views, in loader])
np.savez(out, **served)
"""


def test_stock_ffcv_loader_serves_the_same_views(images, tmp_path):
    images = [*images, smooth_image(600, 500, seed=9)]  # the last is decoded at a scale
    path = tmp_path / "images.beton"
    with BetonWriter(path, len(images)) as writer:
        for i, image in enumerate(images):
            data, mode = (
                (image.tobytes(), MODE_RAW) if i % 3 == 0 else (jpeg_bytes(image), MODE_JPEG)
            )
            writer.add(data, mode, image.shape[1], image.shape[0], i)
    subprocess.run(
        [sys.executable, "-c", STOCK_LOADER, path, tmp_path / "views.npz"], check=True, timeout=600
    )
    stock = np.load(tmp_path / "views.npz")
    with ViewLoader(
        path,
        batch_size=5,
        views=3,
        resolution=40,
        policy=POLICIES["byol"],
        seed=7,
        shuffle=False,
        drop_last=False,
    ) as loader:
        for epoch, resolution, magnitude in [(0, 40, 5.0), (3, 24, 6.5)]:
            loader.set_epoch(epoch, resolution, magnitude)
            ours = np.concatenate([batch.views.numpy().copy() for batch in loader])
            for os_cache in (True, False):
                np.testing.assert_array_equal(ours, stock[f"{os_cache} {epoch}"])


def assert_decodes_as_pillow_does(image):
    """But for the fast cosine transform, which ffcv chose: 1 level on average, a few at most."""
    data = jpeg_bytes(image)
    pixels = np.zeros(3 * image.shape[0] * image.shape[1] + 5, np.uint8)
    assert decode(np.frombuffer(data, np.uint8), 0, *image.shape[:2], pixels)
    difference = np.abs(
        pixels[:-5].astype(int)
        - np.asarray(PIL.Image.open(io.BytesIO(data)).convert("RGB")).reshape(-1)
    )
    assert difference.mean() < 1.5 and difference.max() <= 8
    assert not pixels[-5:].any()
    return pixels[:-5].reshape(-1, 3)


@pytest.mark.parametrize("size", [(48, 64), (37, 91), (1, 1), (1, 50), (50, 1), (17, 8)])
def test_jpegs_decode_to_the_pixels_that_pillow_finds(size):
    assert_decodes_as_pillow_does(smooth_image(*size, seed=1))


def test_a_greyscale_jpeg_decodes_to_three_equal_channels():
    pixels = assert_decodes_as_pillow_does(smooth_image(33, 20, seed=2)[..., 0])
    assert (pixels == pixels[:, :1]).all()


def test_damaged_jpegs_and_raw_images_of_a_wrong_length_do_not_decode():
    data = jpeg_bytes(smooth_image(64, 64, seed=3))
    pixels = np.zeros(3 * 64 * 64, np.uint8)
    for damaged in (
        data[: len(data) // 2],
        b"\0" * len(data),
        data[:200] + b"\0" * (len(data) - 200),
    ):
        assert not decode(np.frombuffer(damaged, np.uint8), 0, 64, 64, pixels)
    assert not decode(pixels[1:], MODE_RAW, 64, 64, pixels.copy())


@pytest.mark.parametrize(
    "height, width", [(48, 65), (47, 64), (96, 128), (24, 32), (64, 48), (60000, 60000)]
)
@pytest.mark.parametrize("denominator", [1, 4])
def test_a_jpeg_of_another_size_than_is_asked_for_does_not_decode(height, width, denominator):
    data = np.frombuffer(jpeg_bytes(smooth_image(48, 64, seed=3)), np.uint8)
    pixels = np.zeros(3 * 100 * 130, np.uint8)
    assert decode(data, MODE_JPEG, 48, 64, pixels, denominator)
    pixels[:] = 0
    assert not decode(data, MODE_JPEG, height, width, pixels, denominator)
    assert not pixels.any()


@pytest.mark.parametrize("marker", [0xDB, 0xC4])
def test_a_jpeg_without_its_tables_does_not_decode_with_the_last_images(marker):
    buffer = io.BytesIO()
    PIL.Image.fromarray(smooth_image(48, 64, seed=3)).save(
        buffer, "JPEG", quality=90, optimize=True
    )
    pixels = np.zeros(3 * 48 * 64, np.uint8)
    assert decode(np.frombuffer(buffer.getvalue(), np.uint8), MODE_JPEG, 48, 64, pixels)
    assert not decode(
        np.frombuffer(without_segments(buffer.getvalue(), marker), np.uint8),
        MODE_JPEG,
        48,
        64,
        pixels,
    )


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("size", [(24, 24), (1, 1), (1, 30), (30, 1), (2, 3)])
def test_images_of_any_shape_give_views(tmp_path, size, raw):
    path = write_beton(tmp_path / "one.beton", [smooth_image(*size, seed=4)], raw=raw)
    with ViewLoader(
        path, batch_size=1, views=4, resolution=24, policy=POLICIES["simclr"]
    ) as loader:
        (batch,) = loader
        assert batch.views.shape == (1, 4, 3, 24, 24)


def test_a_view_that_changes_nothing_is_the_stored_image(tmp_path):
    image = smooth_image(24, 24, seed=5)
    path = write_beton(tmp_path / "one.beton", [image], raw=True)
    with ViewLoader(path, batch_size=1, views=2, resolution=24, policy=IDENTITY) as loader:
        (batch,) = loader
        for view in batch.views[0]:
            np.testing.assert_array_equal(view.numpy().transpose(1, 2, 0), image)


def test_policies_are_dealt_out_to_the_views_in_turn(tmp_path):
    image = smooth_image(24, 24, seed=6)
    path = write_beton(tmp_path / "one.beton", [image], raw=True)
    solarised = ViewPolicy(
        crop_scale=(1, 1), crop_ratio=(1, 1), flip=0, jitter=0, grey=0, blur=0, solarise=1
    )
    with ViewLoader(
        path, batch_size=1, views=5, resolution=24, policy=(IDENTITY, solarised)
    ) as loader:
        (batch,) = loader
        changed = [
            bool((view.numpy().transpose(1, 2, 0) != image).any()) for view in batch.views[0]
        ]
    assert changed == [False, True, False, True, False]


def test_changing_resolution_magnitude_views_or_batch_compiles_nothing(beton):
    with ViewLoader(beton, batch_size=2, views=2, resolution=32) as loader:
        next(iter(loader))
    compiled = len(render_samples.overloads)
    for views, batch_size in ((2, 2), (6, 5)):
        with ViewLoader(
            beton, batch_size=batch_size, views=views, resolution=32, policy=POLICIES["byol"]
        ) as loader:
            for epoch, resolution in enumerate((32, 16, 48)):
                loader.set_epoch(epoch, resolution, magnitude=4 + epoch)
                next(iter(loader))
    assert len(render_samples.overloads) == compiled


def import_compiled(folder):
    spec = importlib.util.spec_from_file_location("compiled_copy", folder / "jit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_compiled_files_are_dropped_when_any_kernel_module_has_changed(tmp_path):
    folder = tmp_path / "kernels"
    shutil.copytree(
        Path(ffssl.data.kernels.__path__[0]), folder, ignore=shutil.ignore_patterns("__pycache__")
    )
    cache = folder / "__pycache__"
    cache.mkdir()
    kept = cache / "render.cpython-311.pyc"
    stale = [
        cache / f"{name}.f-10.py311.{end}"
        for name in ("operations", "draw", "render", "decode")
        for end in ("nbi", "1.nbc")
    ]

    def put_files():
        for file in (kept, *stale):
            file.touch()

    put_files()
    import_compiled(folder)  # of unknown origin
    assert kept.exists() and not any(file.exists() for file in stale)
    put_files()
    import_compiled(folder)
    assert all(file.exists() for file in (kept, *stale))
    for name in ("operations", "draw", "render", "decode", "jit"):
        put_files()
        with open(folder / f"{name}.py", "a") as file:
            file.write("# changed\n")
        import_compiled(folder)
        assert kept.exists() and not any(file.exists() for file in stale), name


def test_compiled_files_that_lie_elsewhere_are_dropped_too(tmp_path):
    folder, elsewhere = tmp_path / "kernels", tmp_path / "elsewhere"
    shutil.copytree(
        Path(ffssl.data.kernels.__path__[0]), folder, ignore=shutil.ignore_patterns("__pycache__")
    )
    code = (
        "import importlib.util as u; s = u.spec_from_file_location('jit', 'jit.py'); m = "
        "u.module_from_spec(s)\n"
        "s.loader.exec_module(m)"
    )

    def import_elsewhere():
        environment = os.environ | {"NUMBA_CACHE_DIR": str(elsewhere)}
        subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, check=True)

    import_elsewhere()
    (stamp,) = elsewhere.rglob("kernels.sha256")
    stale = stamp.parent / "render.render-1.py311.1.nbc"
    stale.touch()
    import_elsewhere()
    assert stale.exists()
    with open(folder / "operations.py", "a") as file:
        file.write("# changed\n")
    import_elsewhere()
    assert not stale.exists()


def test_importing_the_ffcv_decoder_leaves_torchs_and_numbas_threads_alone():
    code = (
        "import torch, numba; torch.set_num_threads(2); before = torch.get_num_threads(), "
        "numba.get_num_threads()\n"
        "import ffssl.data.beton.ffcv_operation\n"
        "assert (torch.get_num_threads(), numba.get_num_threads()) == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_library_that_decodes_is_not_loaded_for_all_of_the_process():
    """Of the libraries that it is linked to, torch would take the BLAS for its own, and be 30 times
    slower.
    """
    code = (
        "import ctypes; process = ctypes.CDLL(None)\n"
        "import ffssl.data.kernels.decode\n"
        "for symbol in ('sgemm_', 'tjDecompress2'): assert not hasattr(process, symbol), symbol"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """A copy of the kernels that Numba can't keep compiled files beside, and no user's cache; even
    for root, files are no folders.
    """
    folder = tmp_path / "kernels"
    shutil.copytree(
        Path(ffssl.data.kernels.__path__[0]), folder, ignore=shutil.ignore_patterns("__pycache__")
    )
    (folder / "__pycache__").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/cache")
    monkeypatch.setenv("NUMBA_CACHE_DIR", "")
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return folder


def test_compiled_files_that_nothing_keeps_go_to_a_temporary_folder_told_once(
    nowhere, tmp_path, capsys
):
    own = tmp_path / f"ffssl-{os.getuid()}"
    for told in (
        f"compiled code can be kept neither beside {nowhere} nor in the user's cache: it is kept "
        f"in {own}; NUMBA_CACHE_DIR",
        "",
    ):
        import_compiled(nowhere)
        error = capsys.readouterr().err
        assert error.startswith(told) and error.count("\n") == bool(told)
        # What goes there is found again.
        assert [path.name for path in own.rglob("*") if path.is_file()] == ["kernels.sha256"]
        assert os.environ["NUMBA_CACHE_DIR"] == str(own) and own.stat().st_mode & 0o777 == 0o700
        numba.config.CACHE_DIR = ""  # as in another process


@pytest.mark.parametrize(
    "taken",
    [
        lambda own: (own.mkdir(), own.chmod(0o777)),
        lambda own: own.symlink_to("/tmp"),
        lambda own: own.touch(),
    ],
)
def test_a_folder_that_others_may_write_to_is_not_trusted(nowhere, tmp_path, capsys, taken):
    taken(tmp_path / f"ffssl-{os.getuid()}")
    module = import_compiled(nowhere)
    assert "is not this user's alone" in capsys.readouterr().err
    function = module.compiled(lambda x: x + 1)
    assert function(1) == 2 and function.stats.cache_path is None


def test_kernels_are_compiled_where_numba_is_told_not_to(beton):
    code = (
        "import sys\nfrom ffssl.data import "
        "ViewLoader\nprint(next(iter(ViewLoader(sys.argv[1], batch_size=4, views=2, "
        "resolution=24))).views.sum())"
    )
    words, environment = (
        [sys.executable, "-c", code, beton],
        os.environ | {"NUMBA_DISABLE_JIT": "1"},
    )
    told = subprocess.run(
        words, env=environment, check=True, capture_output=True, text=True, timeout=600
    ).stdout
    with ViewLoader(beton, batch_size=4, views=2, resolution=24) as loader:
        assert told == f"tensor({next(iter(loader)).views.sum().item()})\n"
