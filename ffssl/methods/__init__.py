"""The methods by name. A method's options are the keyword arguments of its class."""

import inspect

from torch import nn

from ffssl.errors import UserError
from ffssl.methods.base import Method
from ffssl.methods.simclr import SimCLR
from ffssl.methods.simsiam import SimSiam

METHODS: dict[str, type[Method]] = {"simsiam": SimSiam, "simclr": SimCLR}


def build_method(name: str, backbone: nn.Module, options: dict) -> Method:
    """A method over `backbone`. `options` that are None keep the method's default.

    Raises UserError for an unknown name, and for an option that the method does not have.
    """
    if name not in METHODS:
        raise UserError(f"method.name: unknown method {name!r}; known are {', '.join(METHODS)}")
    given = {option: value for option, value in options.items() if value is not None}
    known = [p for p in inspect.signature(METHODS[name].__init__).parameters if p not in ("self", "backbone")]
    for option in given:
        if option not in known:
            raise UserError(f"method.{option}: {name} has no such option; it has {', '.join(known)}")
    return METHODS[name](backbone, **given)
