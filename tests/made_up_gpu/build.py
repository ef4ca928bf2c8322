"""Builds the made-up GPU against the libraries of this environment's torch, in a second or two, and
runs Python with it.
"""

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGES = Path(sysconfig.get_paths()["purelib"])


class NotHere(Exception):
    """Why this machine can't build it."""


def build(folder: Path) -> dict[str, str]:
    """The environment in which Python finds the made-up GPU, which is built in `folder`.

    Raises NotHere.
    """
    for tool in ("g++", "nm"):
        if not shutil.which(tool):
            raise NotHere(f"{tool} is not installed")
    runtime = next(PACKAGES.glob("nvidia/*/lib/libcudart.so.*"), None)
    driver_header = PACKAGES / "triton/backends/nvidia/include/cuda.h"
    if runtime is None or not driver_header.exists():
        raise NotHere("torch is installed without CUDA")
    include = runtime.parent.parent / "include"
    if not (include / "cuda_runtime_api.h").exists():
        raise NotHere(f"{include} lacks cuda_runtime_api.h")
    folder.mkdir(parents=True, exist_ok=True)
    wanted = set()
    for library, names in (
        (runtime, "(__)?cuda"),
        *(
            (next(runtime.parent.glob(f"lib{one}.so.*")), f"{one}[A-Z]")
            for one in ("cublas", "cublasLt")
        ),
    ):
        found = {name.split("@")[0] for name in symbols(library, "-D")}
        wanted |= {name for name in found if re.match(names, name)}
    includes = [f"-I{driver_header.parent}", f"-I{include}"]
    libcudart, libcuda = folder / "libcudart-made-up.so", folder / "libcuda.so.1"
    link(HERE / "runtime.cc", wanted, libcudart, runtime.name, includes)
    declared = set(re.findall(r"CUDAAPI (cu[A-Z]\w*)", driver_header.read_text()))
    link(HERE / "driver.cc", declared, libcuda, libcuda.name, [])
    return {
        "LD_PRELOAD": f"{libcudart}:{libcuda}",
        "LD_LIBRARY_PATH": str(folder),
        "TRITON_LIBCUDA_PATH": str(folder),
        "OMP_NUM_THREADS": "1",
    }


def link(source: Path, wanted: set[str], output: Path, name: str, includes: list[str]) -> None:
    """A library from `source` in which all `wanted` functions are: those that it lacks return 0."""
    compiled, rest = output.with_suffix(".o"), output.with_suffix(".c")
    call("g++", "-std=c++17", "-O1", "-fPIC", "-w", "-c", source, "-o", compiled, *includes)
    lacking = sorted(wanted - symbols(compiled))
    rest.write_text("".join(f"int {one}(void) {{ return 0; }}\n" for one in lacking))
    call("gcc", "-O1", "-fPIC", "-w", "-c", rest, "-o", rest.with_suffix(".rest.o"))
    call(
        "g++",
        "-shared",
        "-o",
        output,
        f"-Wl,-soname,{name}",
        compiled,
        rest.with_suffix(".rest.o"),
        "-ldl",
    )


def symbols(binary: Path, *options: str) -> set[str]:
    """The functions that a library or an object file defines."""
    lines = call("nm", "--defined-only", *options, binary).splitlines()
    return {line.split()[-1] for line in lines if line.split()[-2] in ("T", "W", "i")}


def call(*command) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        raise NotHere(f"{command[0]} failed: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout
