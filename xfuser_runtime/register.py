"""Which wrapper stands for which upstream class: one table per kind of class."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, TypeVar

from xfuser_runtime.base_wrapper import upstream_class, xFuserBaseWrapper

T = TypeVar("T", bound=type)


class WrapperRegister:
    """Maps upstream classes to wrappers; each subclass has a table of its own.

    Attributes:
        kind: how messages call the registered classes.
    """

    kind: ClassVar[str]
    _wrappers: ClassVar[dict[str, type]]

    def __init_subclass__(cls) -> None:
        cls._wrappers = {}

    @classmethod
    def register(cls, original: type) -> Callable[[T], T]:
        """Class decorator: the decorated wrapper stands for `original`.

        Raises:
            TypeError: when the wrapper is no subclass of `original`, since wrapping swaps
                the class of existing objects.
        """

        def add(wrapper: T) -> T:
            if not issubclass(wrapper, original):
                raise TypeError(
                    f"{wrapper.__name__} is no subclass of {original.__name__}, "
                    "expected one; derive the wrapper from the class it wraps"
                )
            cls._wrappers[_key(original)] = wrapper
            return wrapper

        return add

    @classmethod
    def find(cls, original: type) -> type | None:
        """The wrapper class for `original` (or for what `original` wraps), or None."""
        if issubclass(original, xFuserBaseWrapper):
            original = upstream_class(original)
        return cls._wrappers.get(_key(original))

    @classmethod
    def get_class(cls, original: type) -> type:
        """The wrapper class for `original`.

        Raises:
            ValueError: when none is registered (the manual's message).
        """
        found = cls.find(original)
        if found is None:
            raise ValueError(
                f"{cls.kind} {original.__name__} is not supported by xFuser"
            )
        return found


def _key(cls: type) -> str:
    # Generated modules can be loaded twice in one process (two output folders): the name
    # of a class outlives its identity.
    return f"{cls.__module__}.{cls.__qualname__}"
