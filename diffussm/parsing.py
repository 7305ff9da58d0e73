"""One line for a mistake.

Generated from book/93_parsing.md by `make export`: edit there.
"""

import inspect
import json
import re
from argparse import SUPPRESS, Action, ArgumentError
from collections.abc import Callable, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace
from jsonargparse.typing import (
    NonNegativeInt,
    OpenUnitInterval,
    PositiveFloat,
    PositiveInt,
)

from diffussm.guards import meant, named

__all__ = ["in_words", "Parser", "told_of", "parser_of"]


_KINDS: dict[Any, str] = {
    PositiveInt: "an integer of at least 1",
    NonNegativeInt: "an integer of at least 0",
    PositiveFloat: "a number above 0",
    OpenUnitInterval: "a number between 0 and 1",
    Path: "a path",
}


def in_words(kind: Any) -> str:
    """The type of an option, as whoever types it would say."""
    if get_origin(kind) in (Union, UnionType):
        given = [one for one in get_args(kind) if one is not NoneType]
        return " or ".join(map(in_words, given))
    return _KINDS.get(kind) or named(kind)


class _Help(DefaultHelpFormatter):
    """What `--help` says."""

    def _get_help_string(self, action: Action) -> str:
        notes, kind = ["required"] * action.required, in_words(_kind_of(action))
        if kind.split()[1:2] in (["integer"], ["number"]):
            notes.append(kind)
        if action.option_strings and action.nargs != 0:
            given = action.default not in (None, "", [], SUPPRESS)
            notes += [f"default: {_typed(action.default)}"] * given
        noted = f" ({'; '.join(notes)})" if notes else ""
        told = (action.help or "").rstrip(".")
        return re.sub("^[A-Z](?=[a-z])", lambda one: one[0].lower(), told) + noted

    def _format_usage(self, usage: Any, actions: Any, *_: Any) -> str:
        first = [one for one in actions if not one.option_strings]
        needed = first + [one for one in actions if one.option_strings and one.required]
        words = [self._prog, *map(_as_given, needed), "[options]"]
        return f"usage: {' '.join(words)}\n\n"

    def _format_action_invocation(self, action: Action) -> str:
        names, takes = ", ".join(_names_of(action)), action.nargs != 0
        if not takes or not names:
            return names or action.dest.upper()
        return (
            f"{names} {self._format_args(action, action.dest.split('.')[-1].upper())}"
        )


def _kind_of(action: Action) -> Any:
    """The type of an option; None for a flag."""
    return getattr(action, "_typehint", None) or action.type


def _typed(value: Any) -> str:
    """A value as one would type it."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _as_given(action: Action) -> str:
    """An argument as a synopsis has it."""
    value = action.dest.upper()
    value = f"[{value} ...]" if action.nargs == "*" else value
    return " ".join([*action.option_strings[:1], value])


def _names_of(action: Action) -> list[str]:
    """The names of an option; `--keep+`, which adds to a list, is not shown."""
    return [name for name in action.option_strings if not name.endswith("+")]


class Parser(ArgumentParser):
    """A parser that refuses in one line."""

    def __init__(self, prog: str, description: str) -> None:
        how: dict[str, Any] = {"allow_abbrev": False, "exit_on_error": False}
        how |= {"formatter_class": _Help, "description": description}
        super().__init__(prog=prog, **how)

    def read(self, words: Sequence[str], **how: Any) -> Namespace:
        """What words say; ArgumentError with one line if it is nothing."""
        self._check_names(words)
        try:
            return self.parse_args(list(words), **how)
        except ArgumentError as error:
            told = self._reworded(str(error), words)
            raise ArgumentError(None, told) from None

    def _check_names(self, words: Sequence[str]) -> None:
        """ArgumentError for an option that there is not, with those that are close."""
        known = [name for action in self._actions for name in _names_of(action)]
        for word in words:
            name = word.partition("=")[0].removesuffix("+")
            if name.startswith("--") and name not in ["--", *known]:
                told = f"there is no option {name}; {meant(name, known)}"
                raise ArgumentError(None, f"{told}{self.prog} --help lists all")

    def _reworded(self, told: str, words: Sequence[str]) -> str:
        """What the library says of a mistake, as one line in our words."""
        if missing := re.search("arguments are required: (.*)", told):
            return "; ".join(map(self._lacking, missing[1].split(", ")))
        if more := re.search("unrecognized arguments: (.*)", told, re.DOTALL):
            return f"{more[1]!r} is more than {self.prog} takes; see its --help"
        if name := re.match(r'(?:Parser key "|argument --)([\w.]+)', told):
            return self._unfit(name[1], words, told)
        return " ".join(told.split())

    def _lacking(self, name: str) -> str:
        """What is said of an argument that is missing."""
        action = self._action_of(name)
        shown = _as_given(action) if action else name
        return f"{shown} is missing" + (f": {action.help}" if action else "")

    def _unfit(self, name: str, words: Sequence[str], told: str) -> str:
        """What is said of a value of the wrong kind."""
        action, typed = self._action_of(name), _typed_as(name, words)
        if action is None:
            return " ".join(told.split())
        if action.nargs == 0:
            return f"{typed}: this option takes no value"
        kind, read = _kind_of(action), f"{name}, in a file of options"
        wanted = in_words(kind) if kind else "a file of options"
        return f"{typed or read}: expected {wanted}"

    def _action_of(self, name: str) -> Action | None:
        found = [action for action in self._actions if action.dest == name]
        return found[0] if found else None


def _typed_as(name: str, words: Sequence[str]) -> str | None:
    """An option with its value, as they were typed, if they were."""
    for i, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag == f"--{name}":
            values = takewhile(lambda one: not one.startswith("--"), words[i + 1 :])
            return f"{flag} {value}" if equals else " ".join([flag, *values])
    return None


def told_of(command: Callable[..., int]) -> tuple[str, str, dict[str, str]]:
    """A command's line for the list, its description, and a line for each option."""
    text = inspect.getdoc(command) or ""
    title, _, rest = text.partition("\n\n")
    description, _, options = rest.partition("Args:\n")
    helps = re.findall(r"^ {4}(\w+): (.+)$", options.partition("\n\n")[0], re.M)
    return title, " ".join(description.split()), dict(helps)


_DEVICE = "e.g. cpu or cuda; default: a GPU if there is one"


def parser_of(command: Callable[..., int], without: str = "") -> Parser:
    """The parser that a command's signature and docstring describe.

    `without`: the name of an argument that is not to be given.
    """
    _, description, helps = told_of(command)
    parser = Parser(f"diffussm {command.__name__}", description)
    parameters = inspect.signature(command).parameters
    for name, told in helps.items():
        if name == without:
            continue
        add = partial(parser.add_argument, help=told.replace("DEVICE", _DEVICE))
        _add_option(add, parameters[name])
    return parser


def _add_option(add: Callable[..., Any], parameter: inspect.Parameter) -> None:
    name, kind = parameter.name.rstrip("_"), parameter.annotation  # from_ is --from
    if parameter.default is False:
        add(f"--{name}", action="store_true")
    elif list[str] in get_args(kind):  # or None
        add(f"--{name}", type=str, nargs="+")
    elif parameter.kind is parameter.KEYWORD_ONLY:
        needed = parameter.default is parameter.empty
        default = {"required": True} if needed else {"default": parameter.default}
        add(f"--{name}", type=kind, **default)
    elif get_origin(kind) is list:
        add(name, type=get_args(kind)[0], nargs="*")
    else:
        add(name, type=kind)
