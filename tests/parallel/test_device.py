import pytest
import torch

from ffssl.parallel import device


@pytest.mark.parametrize(
    "flags, has",
    [
        ("flags\t\t: fpu avx512f avx512_bf16 avx512vbmi", True),
        ("flags\t\t: fpu avx512f amx_bf16", True),
        ("Features\t: fp asimd bf16 i8mm", True),
        ("flags\t\t: fpu avx512f avx512vbmi amx_int8", False),
        ("Features\t: fp asimd", False),
        ("model name\t: A CPU with bf16\nflags\t\t: fpu", False),
        (None, False),
    ],
)
def test_a_cpus_flags_say_whether_it_has_bf16(flags, has, tmp_path, monkeypatch):
    info = tmp_path / "cpuinfo"
    if flags is not None:
        info.write_text(f"processor\t: 0\n{flags}\nbugs\t\t: none\n\nprocessor\t: 1\n")
    monkeypatch.setattr(device, "CPU_INFO", info)
    assert device.has_bf16(torch.device("cpu")) == has
