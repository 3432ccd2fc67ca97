"""Swap the transposed convolutions of a model for dgrad's, and back."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from types import CodeType
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch.nn.utils.parametrize import is_parametrized

from ._words import shown
from .config import Flags
from .modules import ConvTranspose2d

_TORCH = torch.nn.ConvTranspose2d
_ORIGINAL = "_dgrad_original"  # of a class made here: the subclass that it stands for
_made: WeakKeyDictionary[type, ref[type]] = WeakKeyDictionary()  # by that subclass

Filter = str | Callable[[str, torch.nn.Module], bool]


class Conversion(list[str]):
    """The qualified names of the layers that were turned ("" is the model itself).

    Attributes:
        left (dict[str, str]): the names of the model's other transposed convolutions, each with
            the reason why it was left as it is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.left: dict[str, str] = {}


class _LeftError(Exception):
    """A layer stays as it is. The message says why."""


def convert(
    model: torch.nn.Module, *, only: Filter | None = None, subclasses: bool = False
) -> Conversion:
    """Turn every :class:`torch.nn.ConvTranspose2d` of ``model`` into
    :class:`dgrad.ConvTranspose2d`, in place.

    The modules stay the same objects: parameters, buffers, hooks, mode, names, optimizers and
    whatever else refers to them go on as before. A second time changes nothing.

    Args:
        model: any module.
        only: a regular expression, searched for in each layer's qualified name, or a function of
            the name and the module that says whether to turn it. Default None, every layer.
        subclasses: also turn layers of classes derived from :class:`torch.nn.ConvTranspose2d`; what
            they call by ``super().forward`` is dgrad's then. A class whose forward does not name
            ``super`` and ``forward`` in its own code stays: it calls something else, or does so out
            of sight. Such a layer can be pickled whole again after :func:`restore`, its state_dict
            at any time. Default False. Layers with parametrizations, such as weight_norm, need no
            asking for.

    A layer whose ``forward`` was set on the layer itself, as some tools do to hook it, stays too:
    that one would go on calling PyTorch's.

    Returns:
        The names of what was turned, and in ``left`` the names of what was not, with reasons.

    Raises:
        TypeError: ``model`` is no module, or ``only`` neither text nor a function.
        ValueError: ``only`` is no regular expression, or one that none of the model's transposed
            convolutions has in its name. Nothing was turned then.
    """
    return _turn(model, lambda module: _ours(module, subclasses), only)


def restore(model: torch.nn.Module, *, only: Filter | None = None) -> Conversion:
    """Undo :func:`convert`, in place; ``only``, the result and the errors are as there.

    A layer whose ``forward`` was set on the layer itself stays: that one may call dgrad's.
    """
    return _turn(model, _theirs, only)


def _turn(
    model: torch.nn.Module, class_for: Callable[[torch.nn.Module], type], only: Filter | None
) -> Conversion:
    _check(model, only)
    done = Conversion()
    classes: list[tuple[torch.nn.Module, type]] = []  # all or none, should something raise
    names: dict[int, tuple[torch.nn.Module, list[str]]] = {}  # a shared layer has several
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _TORCH) or _scripted_as(module) == _TORCH.__name__:
            names.setdefault(id(module), (module, []))[1].append(name)
    if isinstance(only, str) and names:
        every = [name for _, each in names.values() for name in each]
        if not any(re.search(only, name) for name in every):
            raise ValueError(
                f"only is {shown(only)}, expected a regular expression that is found in the name "
                f"of one of the model's transposed convolutions: {shown(every)}"
            )
    for module, (name, *others) in names.values():
        try:
            if not any(_is_wanted(each, module, only) for each in (name, *others)):
                raise _LeftError("only leaves it out")
            classes.append((module, class_for(module)))
            done.append(name)
        except _LeftError as reason:
            done.left[name] = str(reason)
    before = [type(module) for module, _ in classes]
    try:
        for module, cls in classes:
            # The classes have the same attributes, and all that refers to the module stays right.
            module.__class__ = cls
    except BaseException:  # of a __setattr__ of the module's own
        for (module, cls), was in zip(classes, before, strict=True):
            if type(module) is cls:
                object.__setattr__(module, "__class__", was)
        raise
    return done


def _check(model: object, only: object) -> None:
    if not isinstance(model, torch.nn.Module):
        hint = f": an instance, {model.__name__}(...)" if isinstance(model, type) else ""
        raise TypeError(
            f"model is {shown(model)} of type {type(model).__name__}, expected a torch.nn.Module"
            f"{hint}"
        )
    if isinstance(only, str):
        try:
            re.compile(only)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(
                f"only is {shown(only)}, expected a regular expression, such as '^decoder': {error}"
            ) from error
    elif only is not None and (isinstance(only, type) or not callable(only)):
        raise TypeError(
            f"only is {shown(only)} of type {type(only).__name__}, expected a regular expression "
            "as text, such as '^decoder', or a function of a layer's name and the layer"
        )


def _is_wanted(name: str, module: torch.nn.Module, only: Filter | None) -> bool:
    if only is None:
        return True
    return re.search(only, name) is not None if isinstance(only, str) else only(name, module)


def _scripted_as(module: torch.nn.Module) -> str | None:
    try:
        return getattr(module, "original_name", None)
    except Exception:  # of a __getattr__ of the module's own
        return None


def _ours(module: torch.nn.Module, subclasses: bool) -> type:
    """The class that runs a layer on dgrad; _LeftError for one that stays."""
    if isinstance(module, ConvTranspose2d):
        raise _LeftError("it is dgrad's already")
    if not isinstance(module, _TORCH):
        raise _LeftError("it is compiled by TorchScript: convert the model before")
    if isinstance(module, torch.nn.modules.lazy.LazyModuleMixin):
        raise _LeftError("its sizes are not known yet: run the model once before")
    _refuse_own_forward(module, "convert")
    try:
        flags = getattr(module, "flags", None)
    except Exception as error:  # a property runs somebody's code
        raise _LeftError(f"its attribute flags cannot be read: {error!r}") from error
    if not isinstance(flags, Flags | None):
        raise _LeftError("it has an attribute flags of its own, which is dgrad's name")

    def ours(cls: type) -> type:
        if cls is _TORCH:
            return ConvTranspose2d
        if not subclasses:
            raise _LeftError(f"{cls.__name__} is a subclass: subclasses=True turns it too")
        for base in cls.__mro__[: cls.__mro__.index(_TORCH)]:
            if "forward" in vars(base) and not _calls_super(vars(base)["forward"]):
                raise _LeftError(
                    f"{base.__name__}.forward is not seen to call super().forward, "
                    "so it might never come to dgrad's"
                )
        made = _made[cls]() if cls in _made else None
        if made is None:
            fields = {_ORIGINAL: cls, "__module__": cls.__module__}
            try:
                made = type(cls.__name__, (cls, ConvTranspose2d), fields)
            except Exception as error:  # a metaclass and __init_subclass__ run somebody's code
                raise _LeftError(
                    f"no class can be derived from {cls.__name__}: {error!r}"
                ) from error
            _made[cls] = ref(made)
        return made

    return _rebased(module, ours)


def _refuse_own_forward(module: torch.nn.Module, action: str) -> None:
    # What was set there is called whatever the class, and often calls the class's that was.
    if "forward" in vars(module):
        raise _LeftError(
            "its forward was set on the layer itself: "
            f"{action} before that is done, or after del layer.forward"
        )


def _calls_super(forward: Any) -> bool:
    """Whether the code of a method, the innermost of a decorated one, names super and forward."""
    codes = [getattr(inspect.unwrap(forward), "__code__", None)]
    names: set[str] = set()
    while codes:
        code = codes.pop()
        if code is not None:
            names.update(code.co_names)
            codes += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
    return {"super", "forward"} <= names


def _theirs(module: torch.nn.Module) -> type:
    """The class that a layer had before :func:`_ours`; _LeftError for one that stays."""
    if not isinstance(module, ConvTranspose2d):
        raise _LeftError("it is not dgrad's")
    _refuse_own_forward(module, "restore")

    def theirs(cls: type) -> type:
        if cls is ConvTranspose2d:
            return _TORCH
        original: type | None = vars(cls).get(_ORIGINAL)
        if original is None:
            raise _LeftError(
                f"{cls.__name__} is a subclass of dgrad's, and convert did not make it"
            )
        return original

    return _rebased(module, theirs)


def _rebased(module: torch.nn.Module, change: Callable[[type], type]) -> type:
    """The module's class changed; under parametrizations, which make a class of their own for each
    module, the class that this one is derived from."""
    cls = type(module)
    if not is_parametrized(module):
        return change(cls)
    if len(cls.__bases__) > 1 or not cls.__name__.startswith("Parametrized"):
        raise _LeftError(f"{cls.__name__} was put over its parametrizations")
    own: dict[str, Any] = dict(vars(cls))
    for name in ("__dict__", "__weakref__"):  # made for each class anew
        own.pop(name, None)
    return type(cls.__name__, (change(cls.__bases__[0]),), own)
