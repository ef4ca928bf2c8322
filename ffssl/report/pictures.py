"""Pictures of a run's data.

Each function returns what `page.html.jinja` shows of a run in a section, for the macro of the same
name. It raises UserError if that can't be computed. `place` is the run's index among the runs. The
pictures are added to the gallery too.
"""

import math
import re

import numpy as np
import torch

from ffssl.data.beton.read import UNLABELLED
from ffssl.methods import Method
from ffssl.plots import COLOURS
from ffssl.report import samples
from ffssl.report.charts import draw_points, draw_shares
from ffssl.report.gallery import Gallery
from ffssl.report.images import contact_sheet
from ffssl.report.runs import ReportedRun

# CSS pixels that the largest views may take. Smaller ones are enlarged a whole number of times.
SHOWN_SIDE = 104


def show_views(run: ReportedRun, method: Method, place: int, gallery: Gallery) -> dict:
    epochs, sheet = [], []
    for one in samples.views_by_epoch(run, method):
        pairs = [[]] * len(one.views) if one.chosen is None else one.chosen.tolist()
        images = [
            [(view, v in pair) for v, view in enumerate(views)]
            for views, pair in zip(one.views, pairs)
        ]
        epochs.append((one, images))
        sheet.append([cell for of_image in images for cell in (*of_image, None)][:-1])
    gallery.add(contact_sheet(sheet), _file_name("views", run, place))
    count = max(one.views.shape[1] for one, _ in epochs)
    largest = max(one.resolution for one, _ in epochs)
    return {
        "epochs": epochs,
        "count": count,
        "largest": largest,
        "across": math.ceil(count**0.5),
        "zoom": max(1, SHOWN_SIDE // largest),
        "done": run.epoch,
        "select": run.options.hard_augment.select,
        "side": run.options.hard_augment.resolution,
    }


def show_choice(run: ReportedRun, method: Method, place: int, gallery: Gallery) -> dict:
    """Show how good the cheap choice is, and whether it prefers some positions."""
    choice = samples.examine_choice(run, method)
    candidates = choice.candidates.tolist()
    ranks, positions = (
        torch.bincount(found, minlength=len(candidates)).numpy() / len(found)
        for found in (choice.ranks, choice.positions)
    )
    drawn = [
        (
            ranks,
            [str(rank + 1) for rank in range(len(ranks))],
            "rank",
            f"rank of the chosen pair at {choice.resolution} px (1: hardest)",
        ),
        (
            positions,
            [f"{a + 1}, {b + 1}" for a, b in candidates],
            "position",
            "which views are chosen",
        ),
    ]
    drawings = []
    for shares, names, what, x_label in drawn:
        title = f"chosen pairs (%) by {what}"
        figure = draw_shares(shares, names, title, x_label, COLOURS[place % len(COLOURS)])
        drawings.append(gallery.draw(figure, _file_name(f"choice-{what}", run, place), title))
    return {
        "choice": choice,
        "right": ranks[0],
        "epoch": max(run.epoch, 1),
        "drawings": drawings,
    }


def show_embedding(run: ReportedRun, method: Method, place: int, gallery: Gallery) -> dict:
    embedding = samples.embed(run, method)
    labels = embedding.labels.numpy()
    names = {
        label: samples.class_name(embedding.class_names, label)
        for label in np.setdiff1d(labels, UNLABELLED).tolist()
    }
    by = "UMAP" if embedding.explained is None else "PCA"
    title = f"features by {by}"
    figure = draw_points(embedding.points.numpy(), labels, names, title)
    return {
        "drawing": gallery.draw(figure, _file_name("embeddings", run, place), title),
        "images": len(labels),
        "shown": len(names),
        "classes": embedding.classes,
        "path": samples.evaluation_path(run),
        "by": by,
        "explained": embedding.explained,
    }


def show_neighbours(run: ReportedRun, method: Method, place: int, gallery: Gallery) -> list[list]:
    """Return rows of (image, caption, whether of another class), the image asked for first."""
    near = samples.nearest_neighbours(run, method)
    rows = []
    for i, own in enumerate(near.query_labels.tolist()):
        found = zip(near.found[i], near.found_labels[i].tolist(), near.cosines[i].tolist())
        rows.append(
            [
                (near.queries[i], _class(near, own) or "image", False),
                *(
                    (
                        image,
                        f"{_class(near, label)} {cosine:.2f}",
                        UNLABELLED not in (own, label) and label != own,
                    )
                    for image, label, cosine in found
                ),
            ]
        )
    sheet = [
        [(query, False), None, *((image, False) for image, *_ in found)]
        for (query, *_), *found in rows
    ]
    gallery.add(contact_sheet(sheet), _file_name("neighbours", run, place))
    return rows


def _class(near: samples.Neighbours, label: int) -> str:
    return samples.class_name(near.class_names, label) if label != UNLABELLED else ""


def _file_name(what: str, run: ReportedRun, place: int) -> str:
    """Return a name that the run's index makes unique."""
    return f"{what}-{place + 1}-{re.sub(r'[^A-Za-z0-9]+', '-', run.name).strip('-')[:40] or 'run'}"
