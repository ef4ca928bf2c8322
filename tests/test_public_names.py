"""What `import ffssl` offers, and what it costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ffssl

PROGRAM = """
import sys, time
start = time.process_time()
import ffssl
print(time.process_time() - start, *sorted({"torch", "numpy", "numba"} & set(sys.modules)))
"""


def test_the_import_takes_no_time_and_no_torch():
    # Seconds of this process alone; the least of three, since a cold disk counts too.
    printed = [
        subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, check=True).stdout
        for _ in range(3)
    ]
    assert all(len(line.split()) == 1 for line in printed)  # none of the heavy modules
    assert min(float(line.split()[0]) for line in printed) < 0.1


def test_editors_see_the_names_that_are_imported_on_first_use():
    tree = ast.parse(Path(ffssl.__file__).read_text())
    [seen] = [node for node in tree.body if isinstance(node, ast.If)]
    assert seen.test.id == "TYPE_CHECKING"
    modules = {
        alias.asname: node.module for node in seen.body for alias in node.names if alias.name
    }
    assert modules == {name: f"ffssl.{module}" for name, module in ffssl._MODULES.items()}
    assert set(ffssl.__all__) <= set(dir(ffssl))


def test_each_name_is_there_and_says_what_it_is():
    for name in ffssl.__all__:
        value = getattr(ffssl, name)
        assert value.__name__ == name and value.__doc__
    with pytest.raises(AttributeError, match="'ffssl' has no attribute 'hardest_view'"):
        _ = ffssl.hardest_view
