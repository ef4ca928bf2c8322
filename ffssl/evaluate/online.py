"""kNN accuracy of a backbone while it trains."""

import numpy as np
import torch
from torch import nn

from ffssl.config import Options
from ffssl.data.beton.read import read_beton
from ffssl.errors import UserError
from ffssl.evaluate.features import extract_features, open_views
from ffssl.evaluate.knn import knn_accuracy
from ffssl.evaluate.labels import shared_classes


class OnlineKnn:
    """Classify the validation images by their neighbours among training images.

    At most `bank_samples` training images serve, drawn at random. Views are centre crops at the
    largest training resolution.

    options: all sections; see the section evaluate. label_field: the training file's field of
    labels. Raise UserError if the two files' labels can't be compared, see `shared_classes`.
    """

    def __init__(self, options: Options, device: torch.device):
        self._options, self._device = options.evaluate, device
        bank, queries = (
            read_beton(path, options.data.label_field)
            for path in (options.data.train, options.data.validation)
        )
        try:
            shared_classes(bank, queries)
        except UserError as error:
            raise UserError(f"{error}; or train without --data.validation") from error
        self.label_field = bank.label_field
        self._queries = open_views(options.data.validation, options.data, options.resolution.max)
        self._bank = open_views(
            options.data.train, options.data, options.resolution.max, broken=options.data.broken
        )
        total = len(self._bank.samples)
        if total > options.evaluate.bank_samples:
            chosen = np.random.Generator(np.random.Philox(options.run.seed)).choice(
                total, options.evaluate.bank_samples, replace=False
            )
            self._bank.samples = np.sort(chosen)

    def accuracy(self, backbone: nn.Module, amp: torch.autocast) -> float:
        """Return the share (0..1) of validation images that are classified rightly."""
        bank, bank_labels = extract_features(backbone, self._bank, self._device, amp)
        queries, query_labels = extract_features(backbone, self._queries, self._device, amp)
        return knn_accuracy(
            bank,
            bank_labels,
            queries,
            query_labels,
            k=self._options.k,
            temperature=self._options.temperature,
        )

    def close(self) -> None:
        self._queries.close()
        self._bank.close()
