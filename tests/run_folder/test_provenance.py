import json
import subprocess

import pytest
import torch

from ffssl.errors import UserError
from ffssl.run_folder import machine
from ffssl.run_folder.provenance import NAME, git_revision, read_starts, record_start


def test_every_start_is_kept(tmp_path):
    assert read_starts(tmp_path) == []
    for _ in range(2):
        record_start(tmp_path, torch.device("cpu"))
    first, second = read_starts(tmp_path)
    assert first["started"] <= second["started"] and first["device"] == "cpu"
    assert torch.__version__.split("+")[0] in first["machine"]
    assert json.loads((tmp_path / NAME).read_text()) == [first, second]
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_a_damaged_record_is_put_aside_and_a_full_disk_told(tmp_path, capsys):
    record_start(tmp_path, torch.device("cpu"))
    damaged = (tmp_path / NAME).read_text()[:50]
    (tmp_path / NAME).write_text(damaged)
    with pytest.raises(UserError, match=f"{tmp_path / NAME}: not a readable record"):
        read_starts(tmp_path)
    record_start(tmp_path, torch.device("cpu"))
    assert len(read_starts(tmp_path)) == 1 and (tmp_path / f"{NAME}.damaged").read_text() == damaged
    assert capsys.readouterr().err.startswith(f"warning: {tmp_path / NAME}: not a readable record")
    (tmp_path / f".{NAME}.partial").symlink_to("/dev/full")
    with pytest.raises(
        UserError,
        match=f"{tmp_path / NAME}: the record of the run can't be written: No space left on device",
    ):
        record_start(tmp_path, torch.device("cpu"))
    assert len(read_starts(tmp_path)) == 1


def git(folder, *words):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *words], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_the_git_revision_is_the_checkouts_and_tells_of_changed_files(tmp_path):
    git(tmp_path, "init")
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-m", "a")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert git_revision(tmp_path) == commit[:12]
    (tmp_path / "a").write_text("2")
    assert git_revision(tmp_path) == f"{commit[:12]}-dirty"
    (tmp_path / "installed").mkdir()
    assert git_revision(tmp_path / "installed") is None
    (tmp_path / "installed" / ".git").write_text("gitdir: nowhere")
    assert git_revision(tmp_path / "installed") == "unknown"


def test_the_machine_names_its_gpus(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        '#!/bin/sh\n[ "$*" = "--query-gpu=name --format=csv,noheader" ] && printf "NVIDIA '
        'A100\\nNVIDIA A100\\nTesla T4\\n"\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert "cores, 2 x NVIDIA A100, 1 x Tesla T4; Python" in machine.describe_machine(())
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert "cores; Python" in machine.describe_machine(())
