"""What pages import besides the package: classes over several cells, and a shell.

The exporter moves a function under ``@method_of(Class)`` into the body of the class;
here the class gets it as an attribute, so objects that were made before have it too.
Chapters import both in a cell that is not exported.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import io
import re
import shlex
import sys
import textwrap
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["as_typed", "method_of", "shell"]

Member = TypeVar("Member")


def method_of(cls: type) -> Callable[[Member], Member]:
    """Decorator, the first above a `def`: makes the function one of `cls`.

    The notebook's own name, a function ``sample`` beside a method ``sample``, keeps
    what it meant.
    """
    if not isinstance(cls, type):
        raise TypeError(
            f"@method_of({cls!r}): expected a class, as in @method_of(S4DKernel)"
        )

    def add(member: Member) -> Member:
        if getattr(member, "__name__", "") == "_overload_dummy":
            return member  # typing.overload: a word to type checkers only
        functions = list(_functions(member))
        if isinstance(member, type) or not functions:
            raise TypeError(
                f"@method_of({cls.__name__}) stands above {member!r}: expected a "
                "function"
            )
        name = functions[0].__name__
        for function in functions:
            function.__module__, function.__qualname__ = (
                cls.__module__,
                f"{cls.__qualname__}.{name}",
            )
        before = vars(cls).get(name)
        setattr(cls, name, member)
        if hasattr(type(member), "__set_name__"):
            type(member).__set_name__(member, cls, name)
        if name == "__post_init__" and dataclasses.is_dataclass(cls) and before is None:
            _call_after_init(cls)
        abc.update_abstractmethods(cls)
        kept = sys._getframe(1).f_globals.get(name, before)
        return member if kept is before else kept

    return add


def _functions(member: Any) -> list[Any]:
    """The functions in a property, a class method, or a decorator's wrapper."""
    inner = [
        getattr(member, a, None)
        for a in ("fget", "fset", "fdel", "func", "__func__", "__wrapped__")
    ]
    found = [
        function for part in inner if part is not None for function in _functions(part)
    ]
    if callable(member) and hasattr(member, "__qualname__"):
        found.append(member)
    return found


def _call_after_init(cls: Any) -> None:
    """Make a dataclass call the `__post_init__` that it gets late."""
    init = cls.__init__

    @functools.wraps(init)
    def with_post_init(self: Any, *arguments: Any, **named: Any) -> None:
        init(self, *arguments, **named)
        self.__post_init__()

    cls.__init__ = with_post_init


def as_typed(line: str) -> str:
    """A command as one types it; a long one goes on in the next line, at an option."""
    return " \\\n".join(
        textwrap.wrap(
            re.sub(" (?!--)", "\xa0", f"$ diffussm {line}"),
            76,
            subsequent_indent="    ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    ).replace("\xa0", " ")


def shell(line: str) -> None:
    """Type `diffussm` and a line, and show what is printed; it must succeed.

    In this process: most of the time of a short command is the import of torch.
    """
    from diffussm.cli import main

    print(as_typed(line))
    assert main(shlex.split(line)) == 0


def heard(line: str, work: Path) -> tuple[int, str, str]:
    """The exit code of `diffussm` and a line, what it says, and what is wrong.

    WORK stands for the folder `work` in all of them.
    """
    from diffussm.cli import main

    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(shlex.split(line.replace("WORK", str(work))))
    said = [stream.getvalue().replace(str(work), "WORK") for stream in (out, err)]
    return code, said[0], said[1]
