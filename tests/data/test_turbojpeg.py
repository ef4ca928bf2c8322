"""Where libjpeg-turbo is found, with ffcv and OpenCV and without."""

import ctypes
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ffssl.data import turbojpeg as module
from ffssl.data.convert.conversion import convert
from ffssl.data.convert.sources.embedded import Embedded
from ffssl.data.loader import ViewLoader
from ffssl.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def test_ffcvs_own_copy_comes_first_and_its_module_which_needs_opencv_last(tmp_path, monkeypatch):
    package = tmp_path / "ffcv"
    for path in ("ffcv/__init__.py", "_libffcv.x.so", "ffcv.libs/libturbojpeg-1a2b.so.0.4.0"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    found = SimpleNamespace(submodule_search_locations=[str(package)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    bundled, linked = tmp_path / "ffcv.libs/libturbojpeg-1a2b.so.0.4.0", tmp_path / "_libffcv.x.so"
    assert list(module._libraries()) == [str(bundled), "libturbojpeg.so.0", str(linked)]


def test_the_module_is_tried_where_nothing_else_is_there(monkeypatch):
    tried = []

    def load(path):
        tried.append(path)
        if "_libffcv" not in path:
            raise OSError("cannot open shared object file")
        return SimpleNamespace(**{name: SimpleNamespace() for name in FUNCTIONS})

    monkeypatch.setattr(ctypes, "CDLL", load)
    module.turbojpeg.__wrapped__()
    assert "_libffcv" in tried[-1] and tried[:-1] == ["libturbojpeg.so.0"]


FUNCTIONS = "tjInitDecompress tjInitTransform tjDecompress2 tjTransform tjFree tjDestroy".split()
FUNCTIONS += ["tjGetErrorStr2"]


def test_a_missing_library_is_an_error_that_says_what_to_install(monkeypatch):
    def missing(path):
        raise OSError("cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(UserError, match="libturbojpeg.so.0 was not found; .* libturbojpeg0-dev"):
        module.turbojpeg.__wrapped__()


@pytest.mark.parametrize("words", [["ffssl/train.py"], ["ffssl/__main__.py", "train"]])
def test_training_without_the_library_ends_in_a_line(words):
    program = (
        "import ctypes, runpy, sys\n"
        "def gone(path, *_, **__): raise OSError(path)\n"
        "ctypes.CDLL = gone\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    options = ["--data.train=a.beton", "--run.folder=runs/a"]
    result = subprocess.run(
        [sys.executable, "-c", program, *words, *options], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 2 and result.stderr.startswith("error: libturbojpeg.so.0 was not")
    assert result.stderr.count("\n") == 1


def test_views_are_the_same_without_ffcv_which_names_opencv_if_it_is_asked_for(tmp_path):
    path = tmp_path / "a.beton"
    convert(Embedded("train", 4), path)
    program = (
        "import sys; sys.modules['ffcv'] = None\n"
        "from ffssl.data import ViewLoader\n"
        "with ViewLoader(sys.argv[1], batch_size=4, views=2, resolution=32) as loader:\n"
        "    print([views.numpy().tobytes().hex() for views, _, _ in loader])\n"
        "try:\n"
        "    import ffssl.data.beton.ffcv_operation\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error)"
    )
    told = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    with ViewLoader(path, batch_size=4, views=2, resolution=32) as loader:
        assert told[0] == str([views.numpy().tobytes().hex() for views, _, _ in loader])
    assert told[1].startswith("UserError ffcv can't be loaded: ") and "libopencv-dev" in told[1]
