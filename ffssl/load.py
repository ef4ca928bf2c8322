"""Load the network of a run from its folder."""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from ffssl.backbones import Backbone
from ffssl.config import Options, from_dict
from ffssl.errors import UserError
from ffssl.methods import Method
from ffssl.methods.teacher import TeacherMethod
from ffssl.run_folder import checkpoint
from ffssl.training.build import build
from ffssl.weights import is_run


class LoadedRun(NamedTuple):
    """A run, finished or not.

    options: all sections.
    method: with the trained weights, in evaluation mode.
    state: the checkpoint, as `ffssl.training.run.Run.state` returns it.
    """

    options: Options
    method: Method
    state: dict

    @property
    def steps(self) -> int:
        """Steps of the epoch under way that the weights have taken; 0 between epochs."""
        return len(self.state["totals"]["losses"]) if "totals" in self.state else 0


def checkpoint_path(run: str | Path) -> Path:
    """Return the path of a run's checkpoint.

    run: the run's folder, or the checkpoint itself.

    Raise UserError if there is none.
    """
    path = Path(run)
    if path.is_dir():
        path = path / checkpoint.NAME
        if not path.exists():
            raise UserError(
                f"{path.parent}: holds no {checkpoint.NAME}; name the folder of a run (its "
                "--run.folder)"
            )
    if not path.is_file():
        raise UserError(f"{path}: no such run; name its folder, or a checkpoint file")
    return path


def load_run(run: str | Path) -> LoadedRun:
    """Load a run, finished or not, onto the CPU.

    run: the run's folder, or a checkpoint file.

    Options that are newer than the run have their defaults. Raise UserError, naming the file, if
    there is no checkpoint, if it is not a run's, or if its weights do not fit its options.
    """
    path = checkpoint_path(run)
    return restored(path, checkpoint.read(path))


def restored(path: Path, state: Any) -> LoadedRun:
    """Return the run of a checkpoint that has been read from `path`. Raise as `load_run` does."""
    if not is_run(state):
        raise UserError(
            f"{path}: not the checkpoint of a run; ffssl train writes one as "
            f"{checkpoint.NAME} in its --run.folder"
        )
    try:
        options = from_dict(state["options"])
        method = build(options, torch.device("cpu"))
    except UserError as error:
        raise UserError(
            f"{path}: its options are not those of this version of FFSSL: {error}"
        ) from error
    try:
        method.load_state_dict(state["method"])
    except RuntimeError as error:
        trained = f"{options.method.name} over {options.model.backbone}"
        raise UserError(
            f"{path}: its weights do not fit its options ({trained}): "
            f"{' '.join(str(error).split()):.300}"
        ) from error
    return LoadedRun(options, method.eval(), state)


def backbone_of(method: Method, network: str) -> Backbone:
    """Return the backbone of the "student" or of the "teacher".

    Raise UserError for the teacher of a method without one.
    """
    if network == "student":
        return method.backbone
    if not isinstance(method, TeacherMethod):
        raise UserError(f"--network: {method.name} has no teacher; choose student")
    return cast(Backbone, method.teacher.layers[0])  # images pass the backbone first


def fingerprint(network: nn.Module) -> str:
    """Return 16 hexadecimal digits that identify the weights of a network.

    Measurements of a network are filed under them.
    """
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
