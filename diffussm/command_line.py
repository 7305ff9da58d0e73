"""From words to a call.

Generated from book/94_command_line.md by `make export`: edit there.
"""

import argparse
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from diffussm.guards import expect_there, explain, refuse
from diffussm.parsing import Parser, parser_of, told_of

__all__ = [
    "Take",
    "Group",
    "call",
    "refuse_idle",
    "recipe_group",
    "tell",
    "preset_group",
    "sentence",
    "report",
    "interruptible",
    "nothing_kept",
    "start",
    "check_device",
    "check_new",
]

Take = Callable[[Any], dict[str, Any]]
Group = Callable[[Parser, list[str]], Take]


def call(
    command: Callable[..., int], words: Sequence[str], group: Group | None = None
) -> int:
    """Run a command with the options that words give it; its exit code.

    `group` adds options, and says what parameters they make; `given` are the names of
    the options that were typed. A command gets those that are in its signature.
    """
    words = [_with_underscores(word) for word in words]
    parser = parser_of(command, "run" if "pretrained" in _typed(words) else "")
    take = group(parser, words) if group else lambda options: {}
    options = parser.read(words)
    values = {name: options.get(name.rstrip("_")) for name in told_of(command)[2]}
    values |= take(options)
    wanted = inspect.signature(command).parameters
    if "given" in wanted:
        values["given"] = _typed(words)
    _say_loading()
    return command(**{name: values[name] for name in values if name in wanted})


def _with_underscores(word: str) -> str:
    """`--self-test` is `--self_test`; values are left as they are."""
    name, equals, value = word.partition("=")
    renamed = f"--{name[2:].replace('-', '_')}"
    return f"{renamed}{equals}{value}" if word.startswith("--") else word


def _typed(words: Sequence[str]) -> set[str]:
    """The names of the options among the words of a command."""
    return {word[2:].partition("=")[0] for word in words if word.startswith("--")}


def _say_loading() -> None:
    """Say on a terminal why there is nothing to see yet."""
    if "torch" not in sys.modules and sys.stderr and sys.stderr.isatty():
        print("loading PyTorch ...", file=sys.stderr, flush=True)


_IDLE = {
    "for a picture": "count labels batch_size compile convolution",
    "beside --out": "per_class overwrite seeds interpolate scheduler",
    "beside --pretrained": "step weights",
    "beside --pretrained, which has what decodes": "vae",
    "beside --seeds": "seed per_class",
    "beside --interpolate": "seed",
    "beside --scheduler": "method",
    "for a run without classes": "classes labels cfg_scale guidance_channels",
    "without guidance, at a cfg_scale of 1": "guidance_channels",
    "for a model of pixels": "vae",
    "where no samples are drawn": "vae",
    "without --score_every": "score_images held_out",
    "for digits": "exif_rotate workers",
    "for stored latents": "exif_rotate",
    "for an LMDB, which has no classes": "no_classes",
    "for .npz files, whose pictures are as they are": "exif_rotate",
    "beside --self_test": "reference weights batch_size out device size exif_rotate "
    "features held_out extrapolate acceptance",
    "beside --acceptance": "size exif_rotate features held_out extrapolate",
    "for a network's features": "held_out",
    "for features without a network": "weights batch_size device extrapolate",
    "under torchrun": "processes",
    "without --trial": "price",
    "without a pipeline": "vae",
    "where no graph is written": "batch",
}


def refuse_idle(given: set[str], situation: str, when: object = True) -> None:
    """ValueError that names the options among `given` without effect in a situation."""
    typed = [f"--{name}" for name in _IDLE[situation].split() if name in given]
    idle = " and ".join(typed)
    refuse(when and idle, f"{idle} would have no effect {situation}; omit {idle}")


def recipe_group(parser: Parser, words: list[str]) -> Take:
    """The recipe and, with its values for defaults, every option of a run."""
    from diffussm.options import RENAMED, flat
    from diffussm.recipes import read_recipe, recipe_files

    words[:] = _with_new_names(words, RENAMED)
    names = ", ".join(recipe_files())
    told = f"what to train: a YAML file, a run's config.json, or one of {names}"
    _add_run(parser, told)
    if words and not words[0].startswith("-"):
        parser.set_defaults(_plain(flat(*read_recipe(words[0]))))
    elif not {"-h", "--help"} & set(words):
        raise ValueError(f"name what to train first, a recipe: a file, or {names}")
    return partial(_run_of, parser, words)


def _add_run(parser: Parser, told: str) -> None:
    """The options of a run; `--keep 400k,338M images` is a list without brackets."""
    from diffussm.options import Execution, Recipe

    parser.add_argument("recipe", type=str, help=told)
    told = "YAML file with any of the options below"
    parser.add_argument("--config", action="config", help=told)
    parser.add_class_arguments(Recipe, help="what is learned")
    skip = {"keep", "activation_checkpointing"}
    parser.add_class_arguments(Execution, help="how it is carried out", skip=skip)
    told = "what the backward pass computes again of a block: none, elementwise or all"
    recompute: Any = Execution.__dataclass_fields__["activation_checkpointing"].type
    old = recompute | bool  # true and false are read too
    parser.add_argument(
        "--activation_checkpointing", type=old, default="none", help=told
    )
    told = "checkpoints to keep: steps or images, as in 400k,338M images"
    parser.add_argument("--keep", type=str | list[str | int], default=[], help=told)


def _run_of(parser: Parser, words: list[str], options: Any) -> dict[str, Any]:
    """The recipe and the execution that the options make, and what is left open."""
    from diffussm.options import Execution, Recipe, as_flags, from_flat
    from diffussm.recipes import decided, left_open

    given = parser.read(words, defaults=False)
    free = left_open(words[0]) - set(given.keys())
    known = [field.name for part in (Recipe, Execution) for field in fields(part)]
    values = options.as_dict()
    values = {name: values[name] for name in known}
    kept = decided(out, free) if (out := options.get("out")) else {}
    short = {} if kept else _shortened(words[0], values, free)
    recipe, execution = from_flat(values | kept | short)
    if short:
        tell(f"{recipe.steps} steps are few for {words[0]}: {as_flags(short)}")
    return {"recipe": recipe, "execution": execution, "free": free - kept.keys()}


def _shortened(
    name: str, values: dict[str, Any], free: frozenset[str]
) -> dict[str, int]:
    """What a short run changes in the options of a recipe."""
    from diffussm.recipes import read_recipe, shortened

    return shortened(values, read_recipe(name)[0].steps, free)


def tell(line: str) -> None:
    """Print a line, once for all processes."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(line, flush=True)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Lists for tuples, which YAML does not know."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def preset_group(parser: Parser, words: list[str]) -> Take:
    """The preset and, with its values for defaults, the options of a set of samples."""
    from diffussm.options import Execution
    from diffussm.sample_options import SAMPLE_PRESETS, Sampler, SampleSet

    known = Literal[tuple(SAMPLE_PRESETS)]  # type: ignore[valid-type]
    told = "whose defaults the options below have"
    parser.add_argument("--preset", type=known, default="paper-fid", help=told)
    parser.add_class_arguments(SampleSet, help="what is drawn", skip=_UNASKED)
    parser.add_class_arguments(Sampler, help="how each is drawn", skip=_UNASKED)
    skip = Execution.__dataclass_fields__.keys() - _FASTER
    parser.add_class_arguments(Execution, help="how it is carried out", skip=skip)
    preset = SAMPLE_PRESETS.get(_preset_named(words), SampleSet())
    values = asdict(preset) | asdict(preset.sampler)
    parser.set_defaults({name: values[name] for name in values.keys() - _UNASKED})
    return _set_of


_UNASKED = {"classes", "sampler", "eta", "cfg_scale"}
_FASTER = {"compile", "convolution"}  # of an execution, what sampling has use for


def _set_of(options: Any) -> dict[str, Any]:
    """The set that the options of a preset make, and how it is carried out."""
    from diffussm.options import Execution
    from diffussm.sample_options import SAMPLE_PRESETS

    preset = SAMPLE_PRESETS[options["preset"]]
    inner, outer = (
        {name: options[name] for name in part.__dataclass_fields__.keys() - _UNASKED}
        for part in (preset.sampler, preset)
    )
    wanted = replace(preset, **outer, sampler=replace(preset.sampler, **inner))
    execution = Execution(**{name: options[name] for name in _FASTER})
    return {"wanted": wanted, "execution": execution}


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


_TOLD = (
    argparse.ArgumentError,
    ValueError,
    OSError,
    ImportError,
    FloatingPointError,
    MemoryError,
)


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
    mistyped = isinstance(error, argparse.ArgumentError)
    return 130 if stopped else 1 + mistyped


@contextmanager
def interruptible(kept: Callable[[], str]) -> Iterator[None]:
    """KeyboardInterrupt in here says what is kept."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(kept()) from None


def nothing_kept() -> str:
    """What `interruptible` says where nothing is kept."""
    return "nothing is kept"


def start(
    command: str, device: str | None, *, stoppable: bool = False
) -> AbstractContextManager[Any]:
    """The processes of a command; ValueError for a device that there is not.

    `stoppable`: Ctrl-C and a queue's signals ask it to stop where nothing is lost.
    """
    check_device(device)
    from diffussm.distributed import processes

    return processes(device, stoppable=stoppable, report=partial(report, command))


def check_device(device: str | None) -> None:
    """ValueError for a device that torch does not know, or does not see here."""
    import torch

    with explain(f"--device {device}", RuntimeError):
        kind = torch.device(device or "cpu").type
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch sees no GPU; see diffussm doctor")


def check_new(path: Path, *suffixes: str, overwrite: bool | None = None) -> None:
    """ValueError unless a file of this kind can be made there, and is not there yet.

    `overwrite` None: there is no such option.
    """
    hint = ", or --overwrite" if overwrite is False else ""
    refuse(
        path.suffix not in suffixes, f"{path}: take a name that ends in {suffixes[0]}"
    )
    refuse(path.exists() and not overwrite, f"{path} exists; take another name{hint}")
    expect_there(path.parent, f"a folder for {path.name}")
