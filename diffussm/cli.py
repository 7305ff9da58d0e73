"""The command line.

Generated from book/98_cli.md by `make export`: edit there.
"""

import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

from diffussm import __version__
from diffussm.command_line import (
    Group,
    call,
    preset_group,
    recipe_group,
    report,
    sentence,
)
from diffussm.file_commands import encode, export, vae
from diffussm.guards import nearest
from diffussm.look_commands import demo, show
from diffussm.parsing import told_of
from diffussm.run_commands import doctor, train
from diffussm.sample_command import sample
from diffussm.score_commands import bound, evaluate, neighbours, statistics
from diffussm.study_command import study

__all__ = ["COMMANDS", "main"]


COMMANDS: dict[str, Callable[..., int]] = {
    "vae": vae,
    "encode": encode,
    "doctor": doctor,
    "train": train,
    "show": show,
    "sample": sample,
    "demo": demo,
    "export": export,
    "evaluate": evaluate,
    "statistics": statistics,
    "neighbours": neighbours,
    "bound": bound,
    "study": study,
}


def _dispatch(words: list[str]) -> int:
    """Run the command that the first word names; its exit code."""
    name, *others = words or ["help"]
    if name == "help" and others:  # help train is train --help
        name, others = others[0], ["--help"]
    if name in ("-h", "--help", "help"):
        print(_usage())
    elif name in ("-V", "--version", "version"):
        print(f"diffussm {__version__}")
    elif name not in COMMANDS:
        told = f"there is no command {name!r}; {nearest(name, COMMANDS)}"
        print(f"diffussm: {told}", file=sys.stderr)
        return 2
    else:
        return _run(name, others)
    return 0


_GROUPS: dict[str, Group] = {
    "doctor": recipe_group,
    "train": recipe_group,
    "sample": preset_group,
}


def _run(name: str, words: Sequence[str]) -> int:
    try:
        return call(COMMANDS[name], words, _GROUPS.get(name))
    except SystemExit as stop:  # of --help
        return stop.code if isinstance(stop.code, int) else 2
    except (Exception, KeyboardInterrupt) as error:
        if sentence(error) is None:
            raise
        return report(name, error)


def _usage() -> str:
    lines = [f"  {name:<12}{told_of(one)[0]}" for name, one in COMMANDS.items()]
    usage = "usage: diffussm COMMAND [options]"
    more = "(diffussm help COMMAND lists the options)"
    return "\n".join([f"{usage}    {more}", "", *lines])


_LOG = logging.getLogger("diffussm")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `diffussm`; returns its exit code (tab-cli-codes)."""
    if not sys.stderr or not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "30")  # seconds between two lines
        os.environ.setdefault("TQDM_MAXINTERVAL", "60")
    # imported here: tqdm reads them when it is imported
    from tqdm.contrib.logging import logging_redirect_tqdm

    out, err = (_Stream(s) if s else None for s in (sys.stdout, sys.stderr))
    words = list(sys.argv[1:] if arguments is None else arguments)
    with redirect_stdout(out), redirect_stderr(err), logging_redirect_tqdm([_LOG]):
        code = _dispatch(words)
        for stream in filter(None, (out, err)):
            stream.write("")  # a line that waits for its end
            stream.flush()
    return code


class _Stream:
    """A stream of output on which bars and lines do not mix."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._watched = bool(stream.isatty())
        self._held, self._after_bar, self._due = "", False, time.monotonic() + 30

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        bar, empty = text.startswith("\r"), text == "\n" and not self._held
        if bar:
            self._write_bar(text)
        elif not empty:
            self._write_line(text)
        elif self._watched or not self._after_bar:  # else it is the end of a bar
            self._put(text)
        if text:
            self._after_bar = bar
        return len(text)

    def _write_bar(self, text: str) -> None:
        if self._watched:
            self._put(text)
        elif text.strip() and time.monotonic() >= self._due:
            self._due = time.monotonic() + 30
            self._put(f"{text.strip()}\n")

    def _write_line(self, text: str) -> None:
        from tqdm import tqdm

        if not self._watched or all(bar.disable for bar in tqdm._instances):
            text, self._held = self._held + text, ""
            return self._put(text)
        whole, end, self._held = (self._held + text).rpartition("\n")
        if end:
            with tqdm.external_write_mode(file=self):
                self._put(whole + end)
        return None

    def _put(self, text: str) -> None:
        try:
            self._try(self._stream.write, text)
        except UnicodeEncodeError as error:
            shown = text.encode(error.encoding, "backslashreplace")
            self._try(self._stream.write, shown.decode(error.encoding))

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, do: Callable[..., Any], *words: str) -> None:
        """What is written goes nowhere if its reader has left."""
        try:
            do(*words)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            # what Python still holds for it goes there too
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
