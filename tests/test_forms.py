"""One form each for questions, exercises, answers, and what the paper says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools.book import ROOT, reading_order

PAGES = [ROOT / f"{name}.md" for name in reading_order()]
KINDS = ("A proof", "A reading", "An open experiment")
# An exercise of one of these kinds that does not say so in the same way.
OTHER = (
    r"(?!\*\*An open experiment\.\*\* )\*?\*?"
    r"(?:A proof|A reading|(?:An )?[Oo]pen|Prove|Show that)\b"
)
TITLE = "Paper says / we do / why"
BOX = r"^```\{(\w+)\} ([^\n]*)\n(.*?)^```$"
HEADER = ":class: note\n\n"
TABLE = "| | paper | here | why |\n|---|---|---|---|\n"


def part(text: str, title: str) -> str:
    """What stands between a title and the next one, without the code."""
    found = re.search(rf"^## {title}$\n(.*?)(?=^#|\Z)", _code_out(text), re.M | re.S)
    return found[1] if found else ""


def _code_out(text: str) -> str:
    return re.sub(r"^```\{code-cell\}.*?^```$", "", text, flags=re.M | re.S)


def questions(text: str) -> list[str]:
    """What is not a box with a question for its title and an answer inside."""
    box = r"^```\{dropdown\} [^\n`]+\?[^\n`]*\n(?!:|```)\S.*?^```$"
    rest = re.sub(box, "", part(text, "Questions"), flags=re.M | re.S)
    return [f"not a question with its answer in a box: {rest.strip()[:60]!r}"] * bool(
        rest.strip()
    )


def exercises(text: str) -> list[str]:
    """Wrong numbers, other names of the three kinds, and what has no answer."""
    section = part(text, "Exercises")
    boxes = re.findall(BOX, section, re.M | re.S)
    given = dict(re.findall(r"^(\d+)\. (.*)", section, re.M))
    faults = [f"more than one box: {title!r}" for _, title, _ in boxes[1:]]
    outside = re.sub(BOX, "", section, flags=re.M | re.S)
    opens = re.findall(r"(?:\A|\n\n)((?!\d+\. |[ *-])\S.*)", outside)
    faults += [f"an answer stands open: {words[:40]!r}" for words in opens]
    if list(given) != [str(number + 1) for number in range(len(given))]:
        faults.append(f"exercises are numbered {list(given)}")
    answered: list[str] = []
    for directive, title, body in boxes:
        answered = re.findall(r"\d+", title)
        if directive != "dropdown" or title != name_of(answered):
            faults.append(f"a box {{{directive}}} {title!r}")
        starts = re.findall(r"^\*\*(\d+)\.\*\* ", body, re.M)
        if starts != (answered if len(answered) > 1 else []):
            faults.append(f"{title}: paragraphs begin with {starts}")
    for number, asked in given.items():
        if re.match(r"\*\*A (?:proof|reading)\.\*\* ", asked):
            if number not in answered:
                faults.append(f"exercise {number} has no answer: {asked[:40]!r}")
        elif re.match(OTHER, asked):
            faults.append(f"exercise {number} is of a kind: {asked[:40]!r}")
    return faults


def name_of(numbers: list[str]) -> str:
    """`Answer to 2`, `Answers to 2, 3 and 5`."""
    if len(numbers) == 1:
        return f"Answer to {numbers[0]}"
    return f"Answers to {', '.join(numbers[:-1])} and {(numbers or ['?'])[-1]}"


def tables(text: str) -> list[str]:
    """Another box or another header for what the paper says."""
    boxes = re.findall(rf"^([^\n]*){TITLE}\n(.*?)^```$", text, re.M | re.S)
    return [
        f"{opening}{body[:60]!r}"
        for opening, body in boxes
        if opening != "```{admonition} "
        or not re.match(
            re.escape(HEADER) + r"(?:Paper: [^\n|]+\.\n\n)?" + re.escape(TABLE), body
        )
    ] + re.findall(r"^\| (?:the )?paper .*|^\| \| the paper .*", text, re.M)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_page_has_the_forms_of_the_book(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not questions(text) + exercises(text) + tables(text)


def test_a_chapter_has_one_exercise_of_each_kind() -> None:
    lack = {}
    for path in (page for page in PAGES if page.stem[0].isdigit()):
        section = part(path.read_text(encoding="utf-8"), "Exercises")
        missing = [kind for kind in KINDS if f"**{kind}.**" not in section]
        if missing:
            lack[path.stem] = missing
    assert not lack


ITEM = "## Exercises\n\n1. **A proof.** Show that it is.\n2. Count.\n"
ANSWER = "\n```{dropdown} Answer to 1\nThus.\n```\n"


@pytest.mark.parametrize(
    ("check", "text", "expected"),
    [
        (questions, "## Questions\n\n```{dropdown} Why 1?\nSo.\n```\n", None),
        (questions, "## Questions\n\n1. Why?\n", "not a question"),
        (
            questions,
            "## Questions\n\n```{admonition} Answers\n:class: dropdown\n1. So.\n```\n",
            "not a question",
        ),
        (questions, "## Questions\n\n```{dropdown} Why `f`?\nSo.\n```\n", "not a"),
        (exercises, ITEM + ANSWER, None),
        (exercises, ITEM, "exercise 1 has no answer"),
        (exercises, ITEM + ANSWER.replace("Answer to 1", "The proof"), "'The proof'"),
        (exercises, ITEM + ANSWER + ANSWER, "more than one"),
        (exercises, f"{ITEM}\nIt is two.\n{ANSWER}", "stands open: 'It is two.'"),
        (
            exercises,
            ITEM.replace("**A proof.**", "*A proof.*") + ANSWER,
            "1 is of a kind",
        ),
        (exercises, ITEM.replace("**A proof.** ", "") + ANSWER, "1 is of a kind"),
        (exercises, ITEM.replace("1. **A", "**1. A") + ANSWER, "numbered"),
        (exercises, ITEM.replace("Count", "*Open.* Count") + ANSWER, "2 is of a kind"),
        (exercises, ITEM.replace("2.", "4.") + ANSWER, "numbered"),
        (
            tables,
            f"```{{admonition}} {TITLE}\n{HEADER}{TABLE}| a | b | c | d |\n```\n",
            None,
        ),
        (
            tables,
            f"```{{admonition}} {TITLE}\n{TABLE}| a | b | c | d |\n```\n",
            "admon",
        ),
        (
            tables,
            f"```{{note}} {TITLE}\n{HEADER}{TABLE}| a | b | c | d |\n```\n",
            "note",
        ),
        (tables, "| paper says | we do | why |\n|---|---|---|\n", "paper says"),
    ],
)
def test_other_forms_are_found(check, text: str, expected: str | None) -> None:
    found = check(text)
    if expected is None:
        assert not found
    else:
        assert found and re.search(expected, " ".join(found))
