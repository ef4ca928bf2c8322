"""The dataset that comes with FFSSL and needs no download."""

import numpy as np

from ffssl.data.convert.sources.base import Source
from ffssl.errors import UserError


class Embedded(Source):
    """`EmbeddedDataset` as a source of uint8 pixels (height, width, 3)."""

    def __init__(self, split: str, size: int, seed: int = 0):
        from ffssl.data.convert.embedded import EmbeddedDataset

        try:
            self._dataset = EmbeddedDataset(split, size, seed)
        except ValueError as error:
            raise UserError(str(error)) from error
        self._split = split
        self.origin = f"embedded, {split}, {size} images, seed {seed}"
        self.class_names = list(self._dataset.class_names)

    def __len__(self) -> int:
        return len(self._dataset)

    def name(self, index: int) -> str:
        return f"embedded {self._split} sample {index}"

    def load(self, index: int) -> tuple[np.ndarray, int]:
        image, label = self._dataset[index]
        return image, int(label)
