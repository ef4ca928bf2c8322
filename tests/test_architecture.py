"""The package's order of dependency: a part imports only parts that come before it."""

import ast
import symtable
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ORDER = [
    *("errors", "files", "printable", "slowed", "tables", "schedules", "plots"),
    *("config", "parallel", "backbones", "weights"),
    *("methods", "run_folder"),
    *("data.turbojpeg", "data.kernels", "data.order", "data.memory"),
    *("data.policy", "data.normalise", "data.beton"),
    *("data.convert", "data.loader"),
    *("hard_augment", "levers", "lightning", "training"),
    *("cost", "load", "evaluate"),
    *("prepare", "train", "lr_range"),
    *("export", "encoder", "embed", "study", "benchmark"),
    *("report", "demo"),
    "__main__",
]
EXCEPTIONS = {
    # The number by which a beton file marks raw pixels; the format is beton.read's to define.
    ("ffssl.data.kernels.decode", "ffssl.data.beton.read.MODE_RAW"),
}


def imported(source: str) -> Iterator[str]:
    """Yield what `source` imports anywhere, functions included: module.name of each."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules() -> Iterator[tuple[str, str]]:
    """Yield the name and the source of each module of the package."""
    for path in sorted(ROOT.glob("ffssl/**/*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts).removesuffix(".__init__"), path.read_text()


def part_of(name: str) -> str:
    """Return the part of ORDER that a dotted name belongs to: "ffssl.data.order.x", data.order."""
    first, *rest = name.split(".")[1:]
    return ".".join([first, *rest[:1]]) if first == "data" else first


def test_imports_are_found_wherever_they_stand():
    source = "import ffssl.train\ndef f():\n    from ffssl.data.beton import read, write as w\n"
    found = list(imported(source))
    assert found == ["ffssl.train", "ffssl.data.beton.read", "ffssl.data.beton.write"]
    assert [part_of(name) for name in found] == ["train", "data.beton", "data.beton"]


def test_what_is_imported_is_there():
    # An import inside a function fails only when that function runs.
    there = dict(modules())
    for name, source in there.items():
        for target in imported(source):
            if target.startswith("ffssl.") and target not in there:
                module, _, wanted = target.rpartition(".")
                symbols = symtable.symtable(there[module], module, "exec").get_symbols()
                assert wanted in {s.get_name() for s in symbols if s.is_local()}, (name, target)


def test_the_order_names_every_part():
    assert {part_of(name) for name, _ in modules() if name not in ("ffssl", "ffssl.data")} == {
        *ORDER
    }


def test_no_part_imports_a_later_one():
    pairs = {
        (name, target)
        for name, source in modules()
        if name != "ffssl"  # it offers names of all parts, and imports none before they are used
        for target in imported(source)
        if target.startswith("ffssl.") and target != "ffssl.__version__"
    }
    rank = ORDER.index
    against = {pair for pair in pairs if rank(part_of(pair[0])) < rank(part_of(pair[1]))}
    assert against == EXCEPTIONS


def test_losses_kernels_and_schedules_know_no_options_and_no_files():
    for name, source in modules():
        if name.startswith(
            ("ffssl.methods", "ffssl.data.kernels", "ffssl.schedules", "ffssl.levers")
        ):
            for target in imported(source):
                assert not target.startswith(("argparse", "ffssl.files")), (name, target)
                if target.startswith("ffssl.config"):
                    assert target.startswith("ffssl.config.checks."), (name, target)
