"""Pictures of a run's data.

Each function returns a run's part of a section. It raises UserError if that can't be computed.
`place` is the run's index among the runs. The pictures are added to the gallery too.
"""

import math
import re
from html import escape

import numpy as np
import torch

from ffssl.data.beton.read import UNLABELLED
from ffssl.methods import Method
from ffssl.plots import COLOURS
from ffssl.report import samples
from ffssl.report.charts import draw_points, draw_shares
from ffssl.report.gallery import Gallery
from ffssl.report.images import contact_sheet, data_uri
from ffssl.report.runs import ReportedRun

# CSS pixels that the largest views may take. Smaller ones are enlarged a whole number of times.
SHOWN_SIDE = 104
VIEWS = (
    "The views of a few images, as the training sees them in a few of its epochs, "
    "as large beside each other as they are in pixels. "
    "Framed: the pair that Hard Augment chooses, with the weights of the checkpoint."
)
NEIGHBOURS = (
    "Images, and the training images whose features are nearest to theirs by the cosine, "
    "nearest first. Dashed: those of another class."
)


def show_views(run: ReportedRun, method: Method, place: int, gallery: Gallery) -> str:
    epochs = samples.views_by_epoch(run, method)
    count = max(one.views.shape[1] for one in epochs)
    largest = max(one.resolution for one in epochs)
    across = math.ceil(count**0.5)
    zoom = max(1, SHOWN_SIDE // largest)
    rows, sheet = [], []
    for one in epochs:
        chosen = (
            [set(pair) for pair in one.chosen.tolist()]
            if one.chosen is not None
            else [set()] * len(one.views)
        )
        cells = ""
        for views, pair in zip(one.views, chosen):
            images = "".join(_view(view, chosen=v in pair) for v, view in enumerate(views))
            cells += f'<div class="views">{images}</div>'
        to_come = "<small>to come</small>" if one.epoch >= run.epoch else ""
        rows.append(
            f'<div class="epoch"><div><b>epoch {one.epoch + 1}</b>'
            f"<small>{one.resolution} px</small><small>magnitude {one.magnitude:.3g}</small>"
            f"{to_come}</div>"
            f'<div class="images" style="--share: {one.resolution / largest:.4f}">{cells}</div>'
            "</div>"
        )
        groups = [
            [*((view, v in pair) for v, view in enumerate(views)), None]
            for views, pair in zip(one.views, chosen)
        ]
        sheet.append([cell for group in groups for cell in group][:-1])
    gallery.add(contact_sheet(sheet), _file_name("views", run, place))
    enlarged = f" Enlarged {zoom} times." if zoom > 1 else ""
    select = run.options.hard_augment.select
    side = run.options.hard_augment.resolution
    words = {
        "hard": f"{count} views of each image; the pair is chosen at {side} px.",
        "random": f"{count} views of each image, of which a pair is drawn at random in every step.",
        "off": f"{count} views of each image.",
    }[select]
    return (
        f'<p class="muted">{words}{enlarged}</p>'
        f'<div class="card epochs{" pixels" if zoom > 1 else ""}" '
        f'style="--side: {zoom * largest}px; --across: {across}">{"".join(rows)}</div>'
    )


def _view(view: torch.Tensor, *, chosen: bool) -> str:
    marks = ' alt="chosen view" class="chosen"' if chosen else ' alt="view"'
    return f'<img src="{data_uri(view)}"{marks}>'


def show_choice(run: ReportedRun, method: Method, place: int, gallery: Gallery) -> str:
    """Show how good the cheap choice is, and whether it prefers some positions."""
    choice = samples.examine_choice(run, method)
    candidates = choice.candidates.tolist()
    ranks, positions = (
        torch.bincount(found, minlength=len(candidates)).numpy() / len(found)
        for found in (choice.ranks, choice.positions)
    )
    colour = COLOURS[place % len(COLOURS)]
    same = choice.selection_resolution == choice.resolution
    words = (
        f"Of {len(candidates)} pairs, the pass at {choice.selection_resolution} px chooses "
        f"the one that is the hardest at {choice.resolution} px, where it is trained on, "
        f"for {ranks[0]:.0%} of the images; at random it would be {1 / len(candidates):.0%}. "
        f"Mean loss at {choice.resolution} px: {choice.losses['chosen']:.3f} of the chosen pairs, "
        f"{choice.losses['hardest']:.3f} of the hardest, "
        f"{choice.losses['random']:.3f} of all."
        + (" Both resolutions are the same in this epoch." if same else "")
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
    cards = ""
    for shares, names, what, x_label in drawn:
        title = f"chosen pairs (%) by {what}"
        cards += gallery.draw(
            draw_shares(shares, names, title, x_label, colour),
            _file_name(f"choice-{what}", run, place),
            title,
        )
    return (
        f'<div class="charts">{cards}<div class="words">{words}<br><br>'
        f"{len(choice.ranks)} images with the views of epoch {max(run.epoch, 1)} "
        "and the weights of the checkpoint. The dashed line is a choice at random.</div></div>"
    )


def show_embedding(run: ReportedRun, method: Method, place: int, gallery: Gallery) -> str:
    embedding = samples.embed(run, method)
    labels = embedding.labels.numpy()
    names = {
        label: samples.class_name(embedding.class_names, label)
        for label in np.setdiff1d(labels, UNLABELLED).tolist()
    }
    by = "UMAP" if embedding.explained is None else "PCA"
    figure = draw_points(embedding.points.numpy(), labels, names, f"features by {by}")
    card = gallery.draw(figure, _file_name("embeddings", run, place), f"features by {by}")
    of_classes = (
        f" of {len(names)} of {embedding.classes} classes" if len(names) < embedding.classes else ""
    )
    words = (
        f"Normalised features of {len(labels)} images{of_classes} of "
        f"{escape(samples.evaluation_path(run))}, in the plane by {by}"
    )
    if embedding.explained is not None:
        words += (
            f", whose two directions hold {embedding.explained:.0%} of the variance: "
            "classes that lie on one another here may be apart in others. "
            "With umap-learn installed, this is a UMAP"
        )
    return f'{card}<p class="caption">{words}.</p>'


def show_neighbours(run: ReportedRun, method: Method, place: int, gallery: Gallery) -> str:
    near = samples.nearest_neighbours(run, method)
    rows, sheet = [], []
    for i, query_label in enumerate(near.query_labels.tolist()):
        figures = [_thumbnail(near.queries[i], _class(near, query_label) or "image", "")]
        for image, label, cosine in zip(
            near.found[i], near.found_labels[i].tolist(), near.cosines[i].tolist()
        ):
            other = UNLABELLED not in (query_label, label) and label != query_label
            figures.append(
                _thumbnail(
                    image, f"{_class(near, label)} {cosine:.2f}", ' class="other"' if other else ""
                )
            )
        rows.append(f'<div class="row">{"".join(figures)}</div>')
        sheet.append([(near.queries[i], False), None, *((image, False) for image in near.found[i])])
    gallery.add(contact_sheet(sheet), _file_name("neighbours", run, place))
    return f'<div class="card neighbours">{"".join(rows)}</div>'


def _class(near: samples.Neighbours, label: int) -> str:
    return samples.class_name(near.class_names, label) if label != UNLABELLED else ""


def _thumbnail(image: torch.Tensor, caption: str, attributes: str) -> str:
    return (
        f'<figure{attributes}><img src="{data_uri(image)}" '
        f'alt=""><figcaption>{escape(caption)}</figcaption></figure>'
    )


def _file_name(what: str, run: ReportedRun, place: int) -> str:
    """Return a name that the run's index makes unique."""
    return f"{what}-{place + 1}-{re.sub(r'[^A-Za-z0-9]+', '-', run.name).strip('-')[:40] or 'run'}"
