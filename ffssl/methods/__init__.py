"""The methods by name.

A method is a file in this folder that contains a class with a `name`. The options of the method are
the keyword arguments of the class.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Mapping

from ffssl.backbones import Backbone
from ffssl.errors import UserError
from ffssl.methods.base import Method


def discover() -> dict[str, type[Method]]:
    """Return the named subclasses of Method in the modules of this package."""
    methods: dict[str, type[Method]] = {}
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        for value in vars(importlib.import_module(module.name)).values():
            if (
                inspect.isclass(value)
                and issubclass(value, Method)
                and value.__module__ == module.name
                and "name" in vars(value)
            ):
                methods[value.name] = value
    return methods


METHODS = discover()


def method_class(name: str) -> type[Method]:
    """Return the class of a method. Raise UserError for an unknown name."""
    if name not in METHODS:
        raise UserError(f"method.name: unknown method {name!r}; known are {', '.join(METHODS)}")
    return METHODS[name]


def build_method(name: str, backbone: Backbone, options: Mapping[str, object]) -> Method:
    """Return a method over `backbone`. Options that are None keep the method's default.

    Raise UserError for an unknown name, and for an option that the method does not have.
    """
    method = method_class(name)
    given = {option: value for option, value in options.items() if value is not None}
    known = [
        p for p in inspect.signature(method.__init__).parameters if p not in ("self", "backbone")
    ]
    for option in given:
        if option not in known:
            raise UserError(
                f"method.{option}: {name} has no such option; it has {', '.join(known)}"
            )
    return method(backbone, **given)
