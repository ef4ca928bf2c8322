"""The set-up: pins, and scripts/setup.sh run against stand-ins of apt-get, sudo, pkg-config and
uv.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = [
    line
    for line in (ROOT / "requirements.txt").read_text().splitlines()
    if not line.startswith("#")
]
SOURCES = ["requirements.txt", "pyproject.toml", "setup.py", "scripts/setup.sh"]
SCRIPTS = ["scripts/setup.sh", "scripts/wheelhouse.sh", "scripts/common.sh", ".ci/run"]


def test_requirements_are_pins_and_nothing_else():
    assert REQUIREMENTS
    for line in REQUIREMENTS:
        assert re.fullmatch(r"[a-z0-9-]+==[\w.+]+( ; [\w.'<>!= ()]+)?", line), line


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_every_dependency_is_pinned_within_its_range(version):
    on = {"python_version": version, "python_full_version": version + ".0", "sys_platform": "linux"}
    pins = {}
    for pin in map(Requirement, REQUIREMENTS):
        if pin.marker is None or pin.marker.evaluate(on):
            assert pin.name not in pins, f"{pin.name} is pinned twice"
            [specifier] = pin.specifier
            pins[pin.name] = specifier.version
    extras = PYPROJECT["optional-dependencies"]
    # Left to those who want them: the benchmark's peers are hundreds of megabytes, and wandb is a
    # service's client.
    wanted = PYPROJECT["dependencies"] + [
        need for extra in extras if extra not in ("bench", "wandb") for need in extras[extra]
    ]
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(pins[requirement.name]), requirement


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_parse(script):
    subprocess.run(["bash", "-n", ROOT / script], check=True)
    sourced = script.endswith("common.sh")
    assert os.access(ROOT / script, os.X_OK) != sourced


class Machine:
    """A copy of what setup.sh reads, on a machine whose Python, apt-get, sudo, pkg-config and uv
    are stand-ins.
    """

    def __init__(self, folder):
        self.checkout, self.bin, self.log = folder / "check out", folder / "bin", folder / "log"
        self.python = self.checkout / ".venv/bin/python"
        for name in [*SOURCES, "scripts/common.sh"]:
            (self.checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.checkout / name)
        self.bin.mkdir()
        self.stand_in("id", "echo 1000")
        self.stand_in("g++", "")
        self.stand_in("pkg-config", "")
        self.stand_in("sudo", 'shift; exec "$@"')
        self.stand_in("apt-get", 'echo "apt-get $*" >>"$LOG"')
        self.stand_in(
            "python",
            f"""
            case "$*" in
                *_base_executable*) echo "$0" ;;
                *Python.h* | *ffcv*) ;;
                *) exec '{sys.executable}' "$@" ;;
            esac""",
        )
        self.stand_in(
            "uv",
            """
            case "$1" in
                venv)
                    mkdir -p .venv/bin && ln -s "$BIN/python" .venv/bin/python &&
                        echo venv >>"$LOG" ;;
                pip) echo "install ${@: -1}" >>"$LOG" ;;
            esac""",
        )

    def stand_in(self, name, script):
        (self.bin / name).write_text("#!/usr/bin/env bash\n" + script + "\n")
        (self.bin / name).chmod(0o755)

    def setup(self):
        """Run setup.sh; returns its exit status, what it said, and what was asked of apt-get and
        uv.
        """
        self.log.write_text("")
        path = f"{self.bin}:{os.environ['PATH']}"
        more = {
            "PATH": path,
            "HOME": str(self.bin),
            "BIN": str(self.bin),
            "LOG": str(self.log),
            "PYTHON": "python",
        }
        run = subprocess.run(
            [self.checkout / "scripts/setup.sh"],
            env=os.environ | more,
            text=True,
            capture_output=True,
        )
        return run.returncode, run.stderr, self.log.read_text().splitlines()


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


ALL = ["venv", "install requirements.txt", "install ."]


def test_setup_installs_once(machine):
    assert machine.setup()[::2] == (0, ALL)
    assert machine.setup() == (0, "", [])


@pytest.mark.parametrize("changed", SOURCES)
def test_setup_updates_the_environment_when_its_sources_change(machine, changed):
    machine.setup()
    with (machine.checkout / changed).open("a") as file:
        file.write("\n# changed\n")
    assert machine.setup()[::2] == (0, ALL[1:])


def test_setup_makes_a_moved_environment_good(machine):
    machine.setup()
    machine.checkout = machine.checkout.rename(machine.checkout.with_name("elsewhere"))
    assert machine.setup()[::2] == (0, ALL[1:])


def test_setup_makes_a_half_made_environment_anew(machine):
    uv = (machine.bin / "uv").read_text()
    machine.stand_in("uv", uv + '[[ "$1" != pip ]]')
    status, _, log = machine.setup()
    assert status != 0 and log == ALL[:2]
    machine.stand_in("uv", uv)
    assert machine.setup()[::2] == (0, ALL)


def test_setup_keeps_an_environment_made_by_hand(machine):
    machine.python.parent.mkdir(parents=True)
    machine.python.symlink_to(machine.bin / "python")
    assert machine.setup()[::2] == (0, ALL[1:])


def test_setup_without_permission_prints_the_command_and_stops(machine):
    machine.stand_in("pkg-config", "exit 1")
    machine.stand_in("sudo", "exit 1")
    status, said, log = machine.setup()
    assert status == 1 and log == [] and not machine.python.exists()
    packages = "libopencv-dev libturbojpeg0-dev"
    assert (
        f"sudo sh -c 'apt-get update && apt-get install -y --no-install-recommends {packages}'"
        in said
    )


def test_setup_installs_missing_system_packages(machine):
    machine.stand_in(
        "pkg-config", 'grep -q "^apt-get install .* libopencv-dev libturbojpeg0-dev$" "$LOG"'
    )
    status, _, log = machine.setup()
    assert status == 0
    assert log[0].startswith("apt-get update") and log[1].startswith("apt-get install")
    assert log[2:] == ALL


def test_setup_refuses_another_python(machine):
    machine.stand_in("python", "exit 1")
    status, said, log = machine.setup()
    assert status == 1 and log == []
    assert "PYTHON=python is not a Python 3.11, 3.12 or 3.13" in said
