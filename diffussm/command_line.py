"""From words to a call.

Generated from book/94_command_line.md by `make export`: edit there.
"""

import argparse
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from jsonargparse import ArgumentParser

__all__ = [
    "Take",
    "Group",
    "told_of",
    "call",
    "refuse",
    "refuse_idle",
    "recipe_group",
    "preset_group",
    "sentence",
    "report",
    "interruptible",
    "nothing_kept",
    "start",
    "check_new",
    "check_at_least_one",
]

_DEVICE = "e.g. cpu or cuda; default: a GPU if there is one"
Take = Callable[[Any], dict[str, Any]]
Group = Callable[[ArgumentParser, list[str]], Take]


def told_of(command: Callable[..., int]) -> tuple[str, str, dict[str, str]]:
    """A command's line for the list, its description, and a line for each option."""
    text = inspect.getdoc(command) or ""
    title, _, rest = text.partition("\n\n")
    description, _, options = rest.partition("Args:\n")
    helps = re.findall(r"^ {4}(\w+): (.+)$", options.partition("\n\n")[0], re.M)
    return title, " ".join(description.split()), dict(helps)


def _parser_of(command: Callable[..., int]) -> ArgumentParser:
    """The parser that a command's signature and docstring describe."""
    _, description, helps = told_of(command)
    # without abbreviations, or --model.d_mode would be taken for --model.d_model
    parser = ArgumentParser(
        prog=f"diffussm {command.__name__}", description=description, allow_abbrev=False
    )
    parameters = inspect.signature(command).parameters
    for name, told in helps.items():
        _add_option(parser, parameters[name], told.replace("DEVICE", _DEVICE))
    return parser


def _add_option(
    parser: ArgumentParser, parameter: inspect.Parameter, told: str
) -> None:
    name, kind = parameter.name.rstrip("_"), parameter.annotation  # from_ is --from
    if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
        many: dict[str, Any] = {"nargs": "*"} if get_origin(kind) is list else {}
        kind = get_args(kind)[0] if many else kind
        parser.add_argument(name, type=kind, help=told, **many)
    elif parameter.default is False:
        parser.add_argument(f"--{name}", action="store_true", help=told)
    elif parameter.default is parameter.empty:
        parser.add_argument(f"--{name}", type=kind, required=True, help=told)
    else:
        default = parameter.default
        parser.add_argument(f"--{name}", type=kind, default=default, help=told)


def call(
    command: Callable[..., int], words: Sequence[str], group: Group | None = None
) -> int:
    """Run a command with the options that words give it; its exit code.

    `group` adds options, and says what parameters of the command they make. A command
    with a parameter `given` gets the names of the options that were typed.
    """
    parser, words = _parser_of(command), [_with_underscores(word) for word in words]
    take = group(parser, words) if group else None
    options = parser.parse_args(words)
    names = [name for name in told_of(command)[2] if name.rstrip("_") in options]
    values = {name: options[name.rstrip("_")] for name in names}
    if take is not None:
        values |= take(options)
    if "given" in inspect.signature(command).parameters:
        values["given"] = _typed(words)
    return command(**values)


def _with_underscores(word: str) -> str:
    """`--self-test` is `--self_test`; values are left as they are."""
    name, equals, value = word.partition("=")
    renamed = f"--{name[2:].replace('-', '_')}"
    return f"{renamed}{equals}{value}" if word.startswith("--") else word


def _typed(words: Sequence[str]) -> set[str]:
    """The names of the options among the words of a command."""
    return {word[2:].partition("=")[0] for word in words if word.startswith("--")}


_IDLE = {
    "beside --grid": "count labels batch_size",
    "beside --out": "per_class overwrite",
    "for a run without classes": "classes labels cfg_scale guidance_channels",
    "without guidance, at a cfg_scale of 1": "guidance_channels",
    "for a model of pixels": "vae",
    "where no samples are drawn": "vae",
    "for digits": "exif_rotate workers",
    "for stored latents": "exif_rotate workers",
    "for an LMDB, which has no classes": "no_classes",
    "for .npz files, whose pictures are as they are": "exif_rotate",
    "beside --self_test": "reference weights batch_size out device size exif_rotate",
    "under torchrun": "processes",
}


def refuse(when: bool, told: str) -> None:
    """ValueError with a sentence, in this case."""
    if when:
        raise ValueError(told)


def refuse_idle(given: set[str], situation: str) -> None:
    """ValueError that names the options among `given` without effect in a situation."""
    idle = [f"--{name}" for name in _IDLE[situation].split() if name in given]
    named = " and ".join(idle)
    refuse(bool(idle), f"{named} would have no effect {situation}; omit {named}")


def recipe_group(parser: ArgumentParser, words: list[str]) -> Take:
    """The recipe and, with its values for defaults, every option of a run."""
    from diffussm.options import RENAMED, Execution, Recipe, flat, from_flat
    from diffussm.recipes import read_recipe, recipe_files

    words[:] = _with_new_names(words, RENAMED)
    names = ", ".join(recipe_files())
    told = f"what to train: a YAML file, or one of {names}"
    parser.add_argument("recipe", type=str, help=told)
    told = "YAML file with any of the options below"
    parser.add_argument("--config", action="config", help=told)
    parser.add_class_arguments(Recipe, help="what is learnt")
    parser.add_class_arguments(Execution, help="how it is carried out", skip={"keep"})
    _add_keep(parser)
    _check_recipe_named(parser, words, names)
    if words and not words[0].startswith("-"):
        parser.set_defaults(_plain(flat(*read_recipe(words[0]))))

    def take(options: Any) -> dict[str, Any]:
        known = [field.name for part in (Recipe, Execution) for field in fields(part)]
        values = options.as_dict()
        recipe, execution = from_flat({name: values[name] for name in known})
        return {"recipe": recipe, "execution": execution}

    return take


def _add_keep(parser: ArgumentParser) -> None:
    """`--keep 400k,338M images`: a list without the brackets of YAML."""
    told = "checkpoints to keep: steps or images, as in 400k,338M images"
    parser.add_argument("--keep", type=str | list[str | int], default=[], help=told)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Lists for tuples, which YAML does not know."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def preset_group(parser: ArgumentParser, words: list[str]) -> Take:
    """The preset and, with its values for defaults, the options of a set of samples."""
    from diffussm.samples import SAMPLE_PRESETS, SampleSet
    from diffussm.sampling import Sampler

    known = Literal[tuple(SAMPLE_PRESETS)]  # type: ignore[valid-type]
    parser.add_argument("--preset", type=known, default="paper-fid")
    told = "options of the preset"
    parser.add_class_arguments(SampleSet, help=told, skip={"classes", "sampler"})
    parser.add_class_arguments(Sampler, help="how each is drawn", skip={"eta"})
    preset = SAMPLE_PRESETS.get(_preset_named(words), SampleSet())
    outer, inner = asdict(preset), asdict(preset.sampler)
    del outer["classes"], outer["sampler"], inner["eta"]
    parser.set_defaults(outer | inner)

    def take(options: Any) -> dict[str, Any]:
        sampler = Sampler(**{name: options[name] for name in inner})
        values = {name: options[name] for name in outer}
        wanted = SampleSet(**values, sampler=sampler)
        return {"wanted": wanted, "preset": options.preset}

    return take


def _preset_named(words: Sequence[str]) -> str:
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", nargs="?", default="paper-fid")
    return str(first.parse_known_args(words)[0].preset)


def _with_new_names(words: Sequence[str], renamed: dict[str, str]) -> list[str]:
    """The words of a command, each option's old name replaced, with a warning."""
    replaced = []
    for word in words:
        flag, equals, value = word.partition("=")
        new = renamed.get(flag[2:]) if flag.startswith("--") else None
        if new is not None:
            print(f"warning: {flag} is called --{new} now", file=sys.stderr)
        replaced.append(f"--{new}{equals}{value}" if new else word)
    return replaced


_TOLD = (ValueError, OSError, ImportError, FloatingPointError, MemoryError)


def sentence(error: BaseException) -> str | None:
    """What to tell whoever typed the command; None for a bug of ours."""
    if isinstance(error, KeyboardInterrupt):
        return f"interrupted; {error}" if error.args else "interrupted"
    if isinstance(error, _TOLD):
        return str(error)
    # torch has no class of its own for this on a CPU
    lost = ("out of memory", "can't allocate memory")
    if isinstance(error, RuntimeError) and any(words in str(error) for words in lost):
        return "out of memory; take a smaller batch (train: --micro_batch), see doctor"
    return None


def report(command: str, error: BaseException) -> int:
    """Say on the error stream what went wrong; the exit code. A bug: its traceback."""
    told, stopped = sentence(error), isinstance(error, KeyboardInterrupt)
    if told is None:
        traceback.print_exception(error)
    rank = int(os.environ.get("RANK", 0))
    process = f" [process {rank}]" if rank else ""
    begun = "\n" * stopped  # the terminal shows ^C without a new line
    line = f"{begun}diffussm {command}{process}: {told or repr(error)}"
    print(line, file=sys.stderr, flush=True)
    return 130 if stopped else 1


@contextmanager
def interruptible(kept: Callable[[], str]) -> Iterator[None]:
    """KeyboardInterrupt in here says what is kept."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(kept()) from None


def nothing_kept() -> str:
    """What is said where nothing is."""
    return "nothing is kept"


def start(
    command: str, device: str | None, *, stoppable: bool = False
) -> AbstractContextManager[Any]:
    """The processes of a command; ValueError for a device that there is not.

    `stoppable`: Ctrl-C and a queue's signals ask it to stop where nothing is lost.
    """
    _check_device(device)
    from diffussm.distributed import processes

    return processes(device, stoppable=stoppable, report=partial(report, command))


def _check_recipe_named(
    parser: ArgumentParser, words: Sequence[str], names: str
) -> None:
    asks = {"-h", "--help"} & set(words)
    first = f"name what to train first, as in: {parser.prog} digits"
    unnamed = not words or words[0].startswith("-")
    refuse(unnamed and not asks, f"{first}; the recipes are {names}")


def _check_device(device: str | None) -> None:
    import torch

    try:
        kind = torch.device(device or "cpu").type
    except RuntimeError:
        raise ValueError(
            f"--device {device}: no such kind of device; try cpu or cuda"
        ) from None
    lacking = f"--device {device}: this machine has no GPU that torch can use"
    lost = kind == "cuda" and not torch.cuda.is_available()
    refuse(lost, f"{lacking}; see diffussm doctor")


def check_new(path: Path | None, suffix: str) -> None:
    """ValueError unless a file of this kind can be made there, and is not there yet."""
    if path is None:
        return
    refuse(path.suffix != suffix, f"{path}: give a name that ends in {suffix}")
    refuse(path.exists(), f"{path} exists; give another name, or remove it yourself")
    missing = f"{path}: the folder {path.parent} does not exist"
    refuse(not path.parent.is_dir(), missing)


def check_at_least_one(**values: int | None) -> None:
    """ValueError that names all of these options if one of them is below 1."""
    *first, last = (f"--{name}" for name in values)
    small = any(value is not None and value < 1 for value in values.values())
    refuse(small, f"{', '.join(first)} and {last} are at least 1")
