"""What the parser says: one line for a mistake, a sentence for each option."""

import typing
from pathlib import Path
from typing import Any, Literal

import pytest
from commands import diffussm
from jsonargparse.typing import NonNegativeInt, OpenUnitInterval, PositiveInt

from diffussm import cli, command_line
from diffussm.guards import named
from diffussm.parsing import Parser, in_words


class Read(Exception):
    """Carries a parser that was about to read words."""


@pytest.fixture
def parsers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Parser]:
    """The parser of every command, with the options of its recipe or preset."""

    def caught(parser: Parser, *_: object, **__: object) -> None:
        raise Read(parser)

    found = {}
    for name, command in cli.COMMANDS.items():
        with monkeypatch.context() as patch, pytest.raises(Read) as seen:
            patch.setattr(Parser, "read", caught)
            command_line.call(command, ["--help"], cli._GROUPS.get(name))
        found[name] = seen.value.args[0]
    return found


def test_every_option_has_a_sentence_and_its_choices(
    parsers: dict[str, Parser], capsys: pytest.CaptureFixture[str]
) -> None:
    assert parsers.keys() == cli.COMMANDS.keys()
    for name, parser in parsers.items():
        for action in parser._actions:
            what = f"{name}: {action.dest}"
            assert action.help and len(action.help.split()) > 1, what
            kind = getattr(action, "_typehint", None)
            options = [kind, *typing.get_args(kind)]
            limited = [one for one in options if typing.get_origin(one) is Literal]
            if limited or kind is bool:
                words = [
                    str(w).lower() for one in limited for w in typing.get_args(one)
                ]
                shown = f"{action.metavar} {action.help}"
                assert all(word in shown for word in words or ["true", "false"]), what
        parser.print_help()
        said = capsys.readouterr().out
        assert not [
            poor for poor in ("null", "<class", "Literal", "typing") if poor in said
        ]
        assert said.startswith(f"usage: diffussm {name} ") and "+" not in said


def test_dashes_and_underscores_are_one_in_every_option(
    parsers: dict[str, Parser],
) -> None:
    for parser in parsers.values():
        names = [name for action in parser._actions for name in action.option_strings]
        for name in {*names} - {"--help", "-h"}:
            dashed = f"--{name[2:].replace('_', '-')}=a-b_c"
            assert command_line._with_underscores(dashed) == f"{name}=a-b_c"


def test_a_type_is_said_in_words() -> None:
    assert in_words(PositiveInt | None) == "an integer of at least 1"
    assert in_words(NonNegativeInt | Literal["all"]) == (
        "an integer of at least 0 or 'all'"
    )
    assert in_words(OpenUnitInterval) == "a number between 0 and 1"
    assert in_words(int | tuple[int, int]) == "an integer or a list of 2 integers"
    assert named(tuple[Any, ...]) == "a list" and named(Any) == "anything"
    assert named(tuple[str, ...]) == "a list of texts"


MISTAKES = [
    (
        "trian digits",
        "diffussm: there is no command 'trian'; did you mean 'train'? (known: vae, ",
    ),
    ("help trian", "diffussm: there is no command 'trian'; did you mean 'train'? "),
    (
        "train digit --out x",
        "no recipe 'digit', and no such file; did you mean 'digits'",
    ),
    (
        "train digits --out x --stepz 3",
        "diffussm train: there is no option --stepz; did you mean '--steps' or ",
    ),
    ("train digits --out x --model.dmodel=3", "did you mean '--model.d_model' or "),
    ("train digits --out x --batch-sise 3", "did you mean '--batch_size'"),
    (
        "train digits --out x --quux",
        "no option --quux; diffussm train --help lists all",
    ),
    ("train digits --out x --lr fast", "diffussm train: --lr fast: expected a number"),
    ("train digits --out x --lr", "diffussm train: --lr: expected a number"),
    ("train digits --out x --flip=so", "--flip so: expected true or false"),
    ("train digits --out x --precision half", "expected 'float32' or 'bf16'"),
    ("train digits --out x --no_grid=1", "--no_grid 1: this option takes no value"),
    ("train digits --out x --steps 0", "steps=0: expected an integer of at least 1"),
    ("train digits --out x --config x.yaml", "--config x.yaml: expected a file of "),
    (
        "train digits --out x --config {t}/all.yaml",
        "steps, in a file of options: expected an integer",
    ),
    (
        "train digits --out x --model.input_size [1,2,3]",
        "--model.input_size [1,2,3]: expected an integer or a list of 2 integers",
    ),
    ("train digits", "diffussm train: --out OUT is missing: folder of the run"),
    ("vae a b --size 0", "diffussm vae: --size 0: expected an integer of at least 1"),
    ("vae a b --lr 2", "--lr 2: expected a number between 0 and 1"),
    ("vae a", "OUT is missing: folder to write, which --vae then takes"),
    ("vae a b c", "'c' is more than diffussm vae takes; see its --help"),
    ("encode a b", "--vae VAE is missing: folder of an "),
    (
        "export a b --batch x",
        "--batch x: expected an integer of at least 1 or 'dynamic'",
    ),
    ("sample --from a --grid x.png --method dim", "expected 'ddpm' or 'ddim'"),
]


@pytest.mark.parametrize(("command", "told"), MISTAKES, ids=range(len(MISTAKES)))
def test_a_mistake_gets_one_line(tmp_path: Path, command: str, told: str) -> None:
    (tmp_path / "all.yaml").write_text("steps: many\n")
    said = diffussm(command, (1, 2), t=tmp_path)
    assert told in said and said.count("\n") == 1 and "Parser key" not in said, said


def test_help_and_version_have_the_names_that_people_try() -> None:
    assert diffussm("help vae") == diffussm("vae --help") == diffussm("vae -h")
    assert diffussm("help") == diffussm("--help") == diffussm("-h") == diffussm("")
    assert diffussm("version") == diffussm("--version") == diffussm("-V")


def test_a_list_takes_several_words_or_one_with_commas() -> None:
    seen = []

    def command(*, classes: list[str] | None = None, seed: int = 0) -> int:
        """take a list

        Args:
            classes: some names
            seed: a number
        """
        seen.append((classes, seed))
        return 0

    for words in ("--classes 3 5 --seed 1", "--seed 1 --classes 3,5", "--seed 1"):
        command_line.call(command, words.split())
    assert seen == [(["3", "5"], 1), (["3,5"], 1), (None, 1)]
