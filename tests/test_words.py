"""Words that the book does not use, because readers search for the standard ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools.book import ROOT, prose

# A pattern, and what to write in its place. One idea has one name.
WORDS = {
    r"\bway back\b": "backward pass, reverse process, or inverse: three ideas",
    r"\bbackward process\b": "reverse process",
    r"\bnoising process\b": "forward process",
    r"\bhears?\b|\bheard\b(?! of)": "receives, depends on, sees; is told",
    r"\bturn(?:s|ed|ing)? round\b": "transpose, reverse; rise again",
    r"\bjourneys?\b": "memory traffic",
    r"\btravels? to memory\b|\bthe road between\b": "memory traffic, bandwidth",
    r"\bdearer\b": "costlier",
    r"\bdrawn anew\b": "recomputed, or sampled again",
    r"\ba beat\b": "a periodicity",
    r"\btwins?\b": "counterpart",
    r"\bawake\b|\bwakes?\b": "once trained",
    r"\bat the door\b": "on entry",
    r"\bfirst day\b": "at initialisation",
    r"\bthousand million\b|\bhundred-thousandths?\b": "billion, or a power of ten",
    r"\bleav(?:e|es|ing) \w+ away\b|\bleft away\b": "omit",
    r"\b(?:hold|holds|held) (?:it|this|them|these) against\b": "compare with",
    r"\btakes long for\b": "takes a long time for",
    r"\blibraries of messages\b": "communication backends",
    r"\bexchanges? (?:of )?gradients\b": "all-reduce",
    r"\bwho knows nothing\b": "of predicting the mean",
    r"\bis much\.": "is a lot",
    r"\bone off\b": "off by one",
    r"\bcomparisons and mixtures\b": "the products QK^T and AV",
    r"\bparts of (?:a|the) batch\b": "micro-batches",
    r"\bweather\b": "noise of the measurement",
    r"\bmanners\b|\bwisp\b|\bwishes\b|\bEurope\b": "what is meant",
    r"\bmachine that built\b|\bthis build\b": "nothing: no page quotes its machine",
    r"\bgrays?\b|\bcolors?\b|\bbehaviors?\b|\btime[ -]steps?\b": "grey, colour, "
    "behaviour, timestep: one spelling",
    r"\bstate-space model": "state space model",
    r"\b(?:un)?learnt\b": "learned",
    r"\bper cent\b": "percent",
    r"\ba (?=(?:FID|FFT|LMDB|SSM|MLP|EMA|MFU|XL|S4)\b)": "an, as it is read aloud",
    r"\bdata-?sets?\b|\bmicro ?batch|\btime-?steps? size": "data set, micro-batch",
    r"\bpytorch\b(?<!(?-i:PyTorch))": "PyTorch",
    r"\b(?:cooldown|warmup|finetun\w+|downsampling|upsampling)\b": "cool-down, "
    "warm-up, fine-tuning, down-sampling, up-sampling",
    r"\b(?!re|siz|caps|pr)\w+i(?:z)(?:e|es|ed|ing|ation|ations|er|ers)\b": "-ise, "
    "-isation; quotations keep theirs",
}
NEXT = "\n"
QUOTED = re.compile(r'"[^"\n]+(?:\n[^"\n]+)?"')


def blank(found: re.Match[str]) -> str:
    """The line breaks of what is not looked at."""
    return NEXT * found[0].count(NEXT)


TEXTS = [
    *sorted((ROOT / "book").glob("*.md")),
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
]


def faults(path: Path, root: Path = ROOT) -> list[str]:
    return [
        f"{path.name}, line {line + text.count(NEXT, 0, found.start())}: "
        f"{' '.join(found[0].split())!r}; write {instead}"
        for line, text in prose(path, root)
        for pattern, instead in WORDS.items()
        for found in re.finditer(
            pattern.replace(" ", r"\s+"), QUOTED.sub(blank, text), re.IGNORECASE
        )
    ]


def test_the_search_reads_prose_and_captions_and_no_code(tmp_path: Path) -> None:
    page = tmp_path / "11_alpha.md"
    page.write_text(
        "---\ntitle: journey\n---\n\nThe way back.\n\n```{code-cell} ipython3\n---\n"
        "mystnb:\n  figure:\n    caption: It hears.\n---\nx = 'journey'\n```\n\n"
        "```{note}\nA twin.\n```\n`dearer`, $a beat$ and\n"
        "[this](https://first.day/journey) he heard of.\nOne\noff.\n",
        encoding="utf-8",
    )
    found = [fault.split(";")[0] for fault in faults(page, tmp_path)]
    assert found == [
        "11_alpha.md, line 5: 'way back'",
        "11_alpha.md, line 17: 'twin'",
        "11_alpha.md, line 21: 'One off'",
        "11_alpha.md, line 13: 'hears'",
    ]


def test_spelling(tmp_path: Path) -> None:
    page = tmp_path / "11_alpha.md"
    page.write_text(
        "He learnt a FID in pytorch, per cent\nby warmup and normalization of size.\n"
        'He learned "an optimization" in PyTorch with `warmup`; a fid and an FID.\n',
        encoding="utf-8",
    )
    found = sorted(fault.split("'")[1] for fault in faults(page, tmp_path))
    expected = ["a", "a", "learnt", "normalization", "per cent", "pytorch", "warmup"]
    assert found == expected


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_words_that_are_not_used(path: Path) -> None:
    assert not faults(path)
