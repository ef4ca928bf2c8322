"""Accuracies of a backbone while it trains."""

import numpy as np
import torch
from torch import nn

from ffssl.config import Options
from ffssl.data.beton.read import UNLABELLED
from ffssl.data.beton.several import read_betons
from ffssl.errors import UserError
from ffssl.evaluate.features import extract_features, open_views
from ffssl.evaluate.knn import knn_accuracy
from ffssl.evaluate.labels import shared_classes
from ffssl.evaluate.linear import top_accuracies
from ffssl.training.classifier import OnlineClassifier


class OnlineKnn:
    """Classify the validation images by their neighbours among training images.

    At most `bank_samples` labelled training images serve, drawn at random. Views are centre crops
    at the largest training resolution.

    options: all sections; see the section evaluate.

    label_field is the training file's field of labels; labelled and images are its labelled images
    and all of them. Raise UserError if the two files' labels can't be compared, see
    `shared_classes`.
    """

    def __init__(self, options: Options, device: torch.device):
        self._options, self._device = options.evaluate, device
        bank, queries = (
            read_betons(path, options.data.label_field)
            for path in (options.data.train, options.data.validation)
        )
        try:
            shared_classes(bank, queries, partly=True)
        except UserError as error:
            raise UserError(f"{error}; or train without --data.validation") from error
        self.label_field = bank.label_field
        self._queries = open_views(options.data.validation, options.data, options.resolution.max)
        self._bank = open_views(
            options.data.train, options.data, options.resolution.max, broken=options.data.broken
        )
        labelled = np.flatnonzero(bank.labels != UNLABELLED)
        self.labelled, self.images = len(labelled), len(bank)
        if len(labelled) > options.evaluate.bank_samples:
            labelled = np.random.Generator(np.random.Philox(options.run.seed)).choice(
                labelled, options.evaluate.bank_samples, replace=False
            )
        self._bank.samples = np.sort(labelled)

    def accuracies(
        self,
        backbone: nn.Module,
        amp: torch.autocast,
        classifier: OnlineClassifier | None = None,
    ) -> dict[str, float]:
        """Return the shares (0..1) of validation images that are classified rightly.

        "knn": by their neighbours. "linear_top1", "linear_top5": by the classifier, once it has
        learned, see `top_accuracies`; the second if there are more than five classes.
        """
        bank, bank_labels = extract_features(backbone, self._bank, self._device, amp)
        queries, query_labels = extract_features(backbone, self._queries, self._device, amp)
        knn = knn_accuracy(
            bank,
            bank_labels,
            queries,
            query_labels,
            k=self._options.k,
            temperature=self._options.temperature,
        )
        found = {"knn": knn}
        if classifier is not None and classifier.trained:
            targets = classifier.targets(query_labels.cpu())
            shares = top_accuracies(classifier.layer, queries, targets)
            found |= {f"linear_{k}": share for k, share in shares.items() if share is not None}
        return found

    def close(self) -> None:
        self._queries.close()
        self._bank.close()
