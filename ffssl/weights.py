"""Read files of weights, and load them into backbones.

The files are those that `ffssl.export` writes, and the state dicts of torchvision and timm. No code
in a file is run.
"""

import errno
import math
import pickle
import re
import warnings
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ffssl.backbones import RESNETS, ResizableViT, TimmModel
from ffssl.errors import UserError
from ffssl.parallel.device import is_out_of_memory

# Under these keys training programs keep a state dict beside other things.
_WRAPPERS = ("state_dict", "model")
# Put before the names by DistributedDataParallel and by torch.compile.
_PREFIXES = ("module.", "_orig_mod.")


class Fit(NamedTuple):
    """How a file's tensors went into a backbone. All are names of tensors.

    loaded: those that the backbone has now.
    resampled: those of `loaded` that were position embeddings of another resolution.
    heads: those of a classifier, which backbones don't have.
    ignored: those of the file that the backbone has no place for.
    left: those of the backbone that stay as they were.
    shapes: those that both have, in different shapes. They are in `ignored` and in `left` too.
    """

    loaded: list[str]
    resampled: list[str]
    heads: list[str]
    ignored: list[str]
    left: list[str]
    shapes: list[str]


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict from a safetensors file (by its suffix) or from one of torch.save.

    Raise UserError if the file can't be read, is damaged, or holds anything else.
    """
    if path.is_dir():
        raise UserError(
            f"{path}: is a folder; name a file of weights in it, or write a run's backbone to a "
            "file first: ffssl export"
        )
    content = read_file(path)
    if is_run(content):
        raise UserError(
            f"{path}: is the checkpoint of a run; write its backbone to a file first: ffssl export"
        )
    return state_dict_in(path, content)


def state_dict_in(path: Path, content: object) -> dict[str, Tensor]:
    """Return the state dict in what `read_file` found in the file.

    Raise UserError, naming the file, if there is none.
    """
    for key in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not (
        isinstance(content, Mapping)
        and content
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())
    ):
        raise UserError(f"{path}: holds no state dict, that is tensors by name")
    return {_bare(name): tensor for name, tensor in content.items()}


def is_run(content: object) -> bool:
    """Return whether what a file holds is the checkpoint of a run."""
    return isinstance(content, Mapping) and (
        {"epoch", "spent", "options", "method"} <= content.keys()
    )


def read_file(path: Path) -> object:
    """Return what a safetensors file, or one of torch.save, holds, in the host's memory.

    Raise UserError if the file can't be read, is damaged, or names objects that could run code.
    """
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what matters is raised
            if path.suffix == ".safetensors":
                return safetensors.torch.load_file(path)
            if zipfile.is_zipfile(file):
                require_whole(file)
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file may raise anything
        if failure := disk_failure(error):
            raise UserError(f"{path}: can't be read: {failure}") from error
        named = re.search(r"GLOBAL (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and named:
            raise UserError(
                f"{path}: not loaded: it holds {named[1]}, which could run code; save its state "
                "dict alone"
            ) from error
        raise UserError(
            f"{path}: damaged, or not a file of weights ({type(error).__name__}); copy it again"
        ) from error


def require_whole(file: BinaryIO) -> None:
    """Raise BadZipFile if a byte of an archive of torch.save has changed.

    torch.load doesn't look at the checksums.
    """
    with zipfile.ZipFile(file) as archive:
        if bad := archive.testzip():
            raise zipfile.BadZipFile(f"{bad} has changed")


def disk_failure(error: Exception) -> str | None:
    """Return what the disk says, if it has failed under a read, and None if the content is bad.

    Raise the error itself if memory is short: then nothing is known of the file.
    """
    if isinstance(error, MemoryError) or is_out_of_memory(error):
        raise error
    # An OSError without a number or with EINVAL comes from the archive, others from the disk.
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
        return error.strerror or str(error)
    return None


def _bare(name: str) -> str:
    while name.startswith(_PREFIXES):
        name = name.split(".", 1)[1]
    return name


def native_network(backbone: nn.Module) -> nn.Module:
    """Return the network whose names of tensors are those of its library.

    torchvision and timm use the same names for ResNets.
    """
    return backbone.network if isinstance(backbone, TimmModel) else backbone


def load_weights(
    backbone: nn.Module, name: str, tensors: Mapping[str, Tensor], *, partial: bool = False
) -> Fit:
    """Load tensors into a backbone by their names in torchvision or timm; say what became of them.

    name: of the backbone, see `build_backbone`.
    partial: load what fits. Otherwise all must fit but a classifier.

    Position embeddings of a vision transformer for another resolution are interpolated. Raise
    UserError if tensors do not fit, or if none does.
    """
    network = native_network(backbone)
    own = network.state_dict()
    tensors = dict(tensors)
    resampled = _resample_positions(backbone, own, tensors)
    heads = [
        key for key in tensors if key.startswith(_classifiers(backbone, name)) and key not in own
    ]
    shapes = [key for key in own if key in tensors and own[key].shape != tensors[key].shape]
    fitting = {key: tensors[key] for key in own if key in tensors and key not in shapes}
    # BatchNorm's counters are in no old file, and nothing reads them.
    counters = {key for key in own if key.endswith(".num_batches_tracked")}
    ignored = [key for key in tensors if key not in own and key not in heads]
    fit = Fit(
        loaded=list(fitting),
        resampled=resampled,
        heads=heads,
        ignored=ignored + shapes,
        left=[key for key in own if key not in fitting and key not in counters],
        shapes=shapes,
    )
    if not fitting.keys() - counters:
        raise UserError(f"none of its {len(tensors)} tensors fits {name}: {_some(tensors)}")
    if not partial and (fit.ignored or fit.left):
        raise UserError(f"does not fit {name}: {_mismatches(fit, own, tensors)}")
    network.load_state_dict(fitting, strict=False)
    return fit


def _classifiers(backbone: nn.Module, name: str) -> tuple[str, ...]:
    """Return the beginnings of the names that a classifier's tensors have."""
    if name in RESNETS:
        return ("fc.",)
    if not isinstance(backbone, TimmModel):
        return ()
    pretrained: Any = backbone.network.pretrained_cfg
    names = pretrained.get("classifier") or ()
    return tuple(f"{each}." for each in ((names,) if isinstance(names, str) else names))


def _resample_positions(
    backbone: nn.Module, own: Mapping[str, Tensor], tensors: dict[str, Tensor]
) -> list[str]:
    """Interpolate the position embeddings in `tensors`, if they are of another square grid.

    Return the names of those that were interpolated.
    """
    key = "pos_embed"
    if not isinstance(backbone, ResizableViT) or key not in own or key not in tensors:
        return []
    from timm.layers import resample_abs_pos_embed

    ours, theirs = own[key], tensors[key]
    grid = backbone.network.patch_embed.grid_size
    prefix = ours.shape[1] - math.prod(grid)
    if theirs.ndim != 3 or theirs.shape == ours.shape or theirs.shape[2] != ours.shape[2]:
        return []
    patches = theirs.shape[1] - prefix
    if patches < 1 or math.isqrt(patches) ** 2 != patches:
        return []
    tensors[key] = resample_abs_pos_embed(theirs.float(), list(grid), num_prefix_tokens=prefix)
    return [key]


def _mismatches(fit: Fit, own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> str:
    parts = []
    if fit.shapes:
        first = fit.shapes[0]
        there, here = tuple(tensors[first].shape), tuple(own[first].shape)
        parts.append(f"{len(fit.shapes)} of other shapes ({first} is {there}, not {here})")
    for names, what in ((fit.left, "not in it"), (fit.ignored, "not in the network")):
        if others := [name for name in names if name not in fit.shapes]:
            parts.append(f"{len(others)} {what} ({_some(others)})")
    return f"of its tensors {len(fit.loaded)} fit; {', '.join(parts)}"


def _some(names: Collection[str], most: int = 2) -> str:
    shown = ", ".join(list(names)[:most])
    return f"{shown}, ..." if len(names) > most else shown
