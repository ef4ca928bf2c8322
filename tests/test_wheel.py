"""The wheel: built offline, installed beside nothing of the checkout, used from an empty folder."""

import email
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import ffssl

ROOT = Path(__file__).resolve().parent.parent
SOURCES = "LICENSE README.md ffssl pyproject.toml rn50_configs setup.py".split()


def pip(*words: str) -> None:
    quiet = ["--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", words[0], *quiet, *words[1:]], check=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, for setuptools leaves its own traces in the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy(ROOT / name, folder / name)
    pip("wheel", "--no-build-isolation", "--wheel-dir", str(folder / "dist"), str(folder))
    [wheel] = (folder / "dist").glob("*.whl")
    return wheel


class Installed:
    """A folder with the wheel's content alone, and an empty folder to work in."""

    def __init__(self, wheel: Path, folder: Path):
        self.packages, self.here = folder / "packages", folder / "empty"
        self.here.mkdir()
        pip("install", "--no-compile", "--target", str(self.packages), str(wheel))

    def start(self, *words: str) -> subprocess.CompletedProcess:
        # Before the environment's own packages, one of which is this checkout.
        environment = os.environ | {"PYTHONPATH": str(self.packages), "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            words, cwd=self.here, env=environment, capture_output=True, text=True, timeout=1200
        )

    def ffssl(self, *words: str, status: int = 0) -> str:
        """Run the command `ffssl`; return what it printed: of a failure, its standard error."""
        result = self.start(str(self.packages / "bin" / "ffssl"), *words)
        assert result.returncode == status, result.stderr
        return result.stderr if status else result.stdout


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Installed:
    return Installed(wheel, tmp_path_factory.mktemp("installed"))


def test_the_wheel_holds_every_source_and_config_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
        [metadata] = (name for name in file.namelist() if name.endswith("dist-info/METADATA"))
        fields = email.message_from_bytes(file.read(metadata))
        [licence] = (name for name in file.namelist() if name.endswith("licenses/LICENSE"))
        assert file.read(licence) == (ROOT / "LICENSE").read_bytes()
    sources = {f"{path.relative_to(ROOT)}" for path in ROOT.glob("ffssl/**/*.py")}
    configs = {
        f"ffssl/configs/{path.relative_to(ROOT / 'rn50_configs')}"
        for path in ROOT.glob("rn50_configs/**/*.yaml")
    }
    page = {f"ffssl/report/page.{kind}" for kind in ("css", "html.jinja")}
    assert len(configs) > 40 and names == sources | configs | page | {"ffssl/py.typed"}
    assert fields["Version"] == ffssl.__version__
    assert fields["License-Expression"] == "Apache-2.0"
    assert fields["Author"] == "FFSSL contributors"


def test_the_citation_and_the_changelog_are_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == ffssl.__version__ and citation["license"] == "Apache-2.0"
    [paper] = citation["references"]
    assert [author["family-names"] for author in paper["authors"]] == [
        *("Koçyiğit", "Hospedales", "Bilen"),
    ]
    assert (
        (ROOT / "CHANGELOG.md").read_text().startswith(f"# Changelog\n\n## {ffssl.__version__}\n")
    )


def test_what_runs_is_the_wheels(installed):
    result = installed.start(sys.executable, "-c", "import ffssl; print(ffssl.__file__)")
    assert Path(result.stdout.strip()).is_relative_to(installed.packages)


def test_help_and_configs(installed):
    text = installed.ffssl("--help")
    for name in "convert train evaluate export report cost lr-range benchmark study demo".split():
        assert f"\n  {name} " in text
    text = installed.ffssl("configs")
    assert str(installed.packages / "ffssl" / "configs") in text
    for path in (ROOT / "rn50_configs").glob("*.yaml"):
        told = path.read_text().partition("\n")[0].removeprefix("# ")
        assert f"\n  {path.name} " in text and told in text
    assert installed.ffssl("--version") == f"ffssl {ffssl.__version__}\n"


@pytest.mark.parametrize(
    "words, told",
    [
        (["trian"], "error: 'trian': unknown command; did you mean train?"),
        (["train", "--config", "eficient.yaml"], "error: eficient.yaml: "),
        (["train", "--config", "eficient.yaml"], "; did you mean efficient?"),
        (["study", "lever"], "; did you mean levers?"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(installed, words, told):
    error = installed.ffssl(*words, status=2)
    assert told in error and error.count("\n") == 1


def test_configs_are_found_by_name_with_the_parts_they_are_built_on(installed):
    code = (
        "from ffssl.config import read_options; import sys\n"
        "options = read_options(sys.argv[1:])\n"
        "print(options.model.backbone, options.training.epochs)"
    )
    own = ["--data.train=a.beton", "--run.folder=runs/a"]
    for name in ("imagenette_efficient.yaml", "imagenette_efficient"):
        result = installed.start(sys.executable, "-c", code, "--config", name, *own)
        assert result.stdout == "resnet50 480\n", result.stderr
    # A file of one's own comes first, and may be built on one of FFSSL's.
    mine = installed.here / "efficient.yaml"
    mine.write_text("base: imagenette_efficient.yaml\nmodel: {backbone: resnet18}\n")
    result = installed.start(sys.executable, "-c", code, "--config", mine.name, *own)
    mine.unlink()
    assert result.stdout == "resnet18 480\n", result.stderr


@pytest.mark.slow
def test_images_to_an_exported_encoder_from_an_empty_folder(installed):
    for split, size in (("train", 96), ("val", 32)):
        words = ["--split", split, "--size", str(size), "--output", f"{split}.beton"]
        assert f"{split}.beton: {size} samples" in installed.ffssl("convert", "embedded", *words)
    small = "--training.epochs=2 --training.batch_size=32 --evaluate.k=5 --run.device=cpu".split()
    data = ["--data.train=train.beton", "--data.validation=val.beton", "--run.folder=runs/small"]
    installed.ffssl("train", "--config", "demo_efficient.yaml", *data, *small)
    installed.ffssl("export", "runs/small", "--to", "safetensors", "--output", "a.safetensors")
    assert {path.name for path in installed.here.iterdir()} == {
        *("train.beton", "train.beton.json", "val.beton", "val.beton.json"),
        *("runs", "a.safetensors", "a.safetensors.md"),
    }
    load = (
        "import safetensors.torch, torch; from pathlib import Path\n"
        "from ffssl.load import load_run\n"
        "kept = safetensors.torch.load_file('a.safetensors')\n"
        "net = load_run(Path('runs/small')).method.backbone.state_dict()\n"
        "assert kept.keys() == net.keys() and all(torch.equal(kept[k], net[k]) for k in kept)"
    )
    result = installed.start(sys.executable, "-c", load)
    assert result.returncode == 0, result.stderr
    command = (installed.here / "runs" / "small" / "run.json").read_text()
    assert "ffssl train --config demo_efficient.yaml" in command


@pytest.mark.slow
def test_a_study_runs_from_an_empty_folder(installed):
    words = "--training.epochs=1 --training.batch_size=32".split()
    study = installed.here / "mine.yaml"
    study.write_text(
        "embedded: {train: 64, validation: 32}\nruns: {a: {config: demo_baseline.yaml}}\n"
    )
    told = installed.ffssl("study", "mine.yaml", *words, "--evaluate.k=5", "--run.device=cpu")
    assert "$ ffssl train " in told and (installed.here / "runs/mine/table.md").exists()
