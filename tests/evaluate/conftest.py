from pathlib import Path

import pytest

from ffssl.data.convert import convert
from ffssl.data.sources.embedded import Embedded


@pytest.fixture(scope="session")
def betons(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("betons")
    paths = {split: folder / f"{split}.beton" for split in ("train", "val")}
    for split, path in paths.items():
        convert(Embedded(split, 96 if split == "train" else 40), path)
    return paths
