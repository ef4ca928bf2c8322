"""Check that the labels of a training and a validation file mean the same classes."""

import numpy as np

from ffssl.data.beton.description import class_names
from ffssl.data.beton.read import UNLABELLED, Beton, describe_fields
from ffssl.errors import UserError


def shared_classes(
    train: Beton,
    validation: Beton,
    option: str = "--data.label_field",
    *,
    partly: bool = False,
) -> np.ndarray:
    """Return the labels of the training images, each once, ascending: int64 (classes,).

    They may be any numbers, as ids are.

    partly: only some of the training images need a label, as in STL-10.

    Raise UserError if an image has no label (the message names `option`, which chooses the field),
    if the files' class names differ, if a validation image is of a class that no training image
    has, or if there is only one class.
    """
    for beton in (train, validation):
        if beton.labels is None:
            raise UserError(
                f"{beton.name}: an evaluation needs labels, and it is not clear which field of "
                f"this file holds them, if any: {describe_fields(beton.fields)}; "
                f"name it with {option}, convert class folders, or take another file"
            )
        missing = int((beton.labels == UNLABELLED).sum())
        if missing and not (partly and beton is train and missing < len(beton)):
            raise UserError(
                f"{beton.name}: an evaluation needs labels, and {missing} of {len(beton)} images "
                f"have none ({UNLABELLED}); convert class folders, or take another file"
            )
    differ = f"{validation.name}: its classes are not those of {train.name}"
    names = [class_names([file.path for file in beton.files]) for beton in (train, validation)]
    if None not in names and names[0] != names[1]:
        alone = sorted(set(names[0]) ^ set(names[1]))
        how = f"{alone[0]!r} is in one of them only" if alone else "the order is another"
        raise UserError(f"{differ}: {how}; convert both alike")
    classes = np.unique(train.labels[train.labels != UNLABELLED])
    unknown = np.setdiff1d(validation.labels, classes)
    if len(unknown):
        label = int(unknown[0])
        name = f" ({names[0][label]!r})" if names[0] and 0 <= label < len(names[0]) else ""
        raise UserError(f"{differ}: label {label}{name} has no training image")
    if len(classes) < 2:
        raise UserError(
            f"{train.name}: all images have one label; an evaluation needs two classes or more"
        )
    return classes
