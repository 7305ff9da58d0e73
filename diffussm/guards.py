"""Guards.

Generated from book/01_guards.md by `make export`: edit there.
"""

import dataclasses
import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

__all__ = [
    "T",
    "expect",
    "named",
    "expect_int",
    "expect_number",
    "expect_one_of",
    "nearest",
    "meant",
    "expect_real",
    "readable",
    "expect_indices",
    "NotFinite",
    "expect_finite",
    "refuse",
    "expect_there",
    "expect_empty",
    "explain",
    "bounded",
    "check_fields",
    "from_dict",
    "differences",
    "expect_same",
]

T = TypeVar("T")


def expect(name: str, x: Any, pattern: str, **sizes: int) -> tuple[int, ...]:
    """The sizes of `x`, in order: `B, L, D = expect("u", u, "B L D", D=64)`.

    Raises:
        TypeError: `x` has no shape.
        ValueError: its shape is not the pattern's.
    """
    words = pattern.split()
    if not hasattr(x, "shape"):
        raise TypeError(
            f"{name} is {_short(x)}: expected a tensor ({', '.join(words)})"
        )
    given, known = tuple(x.shape), dict(sizes)
    _fits = len(given) == len(words) and all(
        size == (int(word) if word.isdigit() else known.setdefault(word, size))
        for word, size in zip(words, given, strict=True)
        if word != "_"
    )
    if not _fits:
        shown = [f"{w}={sizes[w]}" if w in sizes else w for w in words]
        raise ValueError(f"{name} has shape {given}: expected ({', '.join(shown)})")
    return given


@dataclasses.dataclass(frozen=True)
class _Range:
    """Limits of a number; None is none."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def holds(self, value: Any) -> bool:
        """Whether all limits are kept; NaN keeps none."""
        return (
            (self.least is None or bool(value >= self.least))
            and (self.most is None or bool(value <= self.most))
            and (self.above is None or bool(value > self.above))
            and (self.below is None or bool(value < self.below))
        )

    def text(self) -> str:
        """The limits in words, to follow a noun."""
        if self.least is not None and self.most is not None:
            return f" from {self.least} to {self.most}"
        words = {"least": "of at least", "most": "of at most"}
        given = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        said = [f"{words.get(key, key)} {value}" for key, value in given.items()]
        return f" {' and '.join(said)}" if said else ""


def _required(field: Any) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, UnionType)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value has an annotation's type; a bool is no number, an int a float."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any or _is_union(kind):
        return kind is Any or any(_fits(value, one) for one in arguments)
    if origin is Literal:
        return value in arguments
    if isinstance(value, bool) and kind is not bool:
        return False
    if kind is float:
        return isinstance(value, int | float)
    if origin is tuple and isinstance(value, tuple):
        if arguments[1:] == (...,):
            return all(_fits(one, arguments[0]) for one in value)
        return len(value) == len(arguments) and all(map(_fits, value, arguments))
    return isinstance(value, origin or kind)


def _read(value: Any, kind: Any, key: str) -> Any:
    """What JSON and YAML cannot say: a nested configuration, and a tuple."""
    kinds = get_args(kind) if _is_union(kind) else (kind,)
    for one in kinds:
        if dataclasses.is_dataclass(one) and isinstance(value, Mapping):
            return from_dict(one, value, key)  # type: ignore[arg-type]
        if get_origin(one) is tuple and isinstance(value, list):
            return tuple(value)
    return value


_WORDS: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a text",
    NoneType: "none",
    Any: "anything",
}


def named(kind: Any) -> str:
    """A type in words."""
    if _is_union(kind):
        kinds = sorted(get_args(kind), key=lambda one: one is not NoneType)
        return " or ".join(map(named, kinds))
    if get_origin(kind) is Literal:
        return " or ".join(repr(one) for one in get_args(kind))
    if get_origin(kind) is tuple:
        one, *others = get_args(kind)
        many = "" if others == [...] else f"{1 + len(others)} "
        noun = named(one).split()[-1]
        return "a list" if one is Any else f"a list of {many}{noun}s"
    return _WORDS.get(kind) or str(getattr(kind, "__name__", kind))


def _short(value: object) -> str:
    """A value in at most 60 characters, a SHA-256 in twelve of its digits."""
    text, digits = repr(value), "0123456789abcdef"
    if isinstance(value, str) and len(value) == 64 and not value.strip(digits):
        return f"'{value[:12]}...'"
    return text if len(text) <= 60 else f"{text[:57]}..."


def expect_int(
    name: str, value: Any, least: int | None = None, most: int | None = None
) -> int:
    """`value` as an int, if it is an integer in the range."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name}={_short(value)}: expected an integer")
    limits = _Range(least=least, most=most)
    if not limits.holds(value):
        raise ValueError(f"{name}={value}: expected an integer{limits.text()}")
    return int(value)


def expect_number(name: str, value: Any, **limits: float | None) -> float:
    """`value` as a float, if finite and in the range (see `bounded`)."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name}={_short(value)}: expected a number")
    allowed = _Range(**limits)
    if not (math.isfinite(value) and allowed.holds(value)):
        raise ValueError(f"{name}={value}: expected a finite number{allowed.text()}")
    return float(value)


def expect_one_of(name: str, value: T, allowed: Iterable[T]) -> T:
    """`value`, if it is one of those allowed; else refused with the nearest."""
    known = list(allowed)
    if value not in known:
        raise ValueError(f"{name}={_short(value)}: {nearest(value, known)}")
    return value


def nearest(word: object, known: Iterable[object]) -> str:
    """What may have been meant, and all that there is."""
    words = [str(one) for one in known]
    every, close = ", ".join(words), meant(word, words)
    return f"{close}(known: {every})" if close else f"expected one of {every}"


def meant(word: object, known: Iterable[str]) -> str:
    """What may have been meant, as a question; nothing if nothing is close."""
    close = difflib.get_close_matches(str(word), known, n=2)
    return f"did you mean {' or '.join(map(repr, close))}? " if close else ""


def expect_real(**tensors: Any) -> None:
    """Refuse, by name, what is not a real floating-point tensor."""
    for name, x in tensors.items():
        floating = getattr(x, "is_floating_point", None)
        if floating is None or not floating():
            kind = getattr(x, "dtype", None) or type(x).__name__
            raise TypeError(f"{name} is {kind}: expected a real floating-point tensor")


def readable(x: Any) -> bool:
    """Whether a look at values is cheap: not on a GPU, not in a compiled graph."""
    from torch.compiler import is_compiling

    return x.device.type == "cpu" and not is_compiling()


def expect_indices(name: str, x: Any, count: int) -> None:
    """Refuse a tensor that holds anything else than integers from 0 to `count` - 1."""
    kind = str(x.dtype).removeprefix("torch.")
    if not kind.startswith(("int", "uint")):
        raise TypeError(f"{name} is {kind}: expected integers from 0 to {count - 1}")
    if (
        readable(x)
        and x.numel()
        and not 0 <= (low := int(x.min())) <= int(x.max()) < count
    ):
        raise ValueError(
            f"{name} reaches from {low} to {int(x.max())}: expected 0 to {count - 1}"
        )


class NotFinite(ValueError):
    """Numbers that are NaN or infinite, as a model draws that has diverged."""


def expect_finite(
    name: str, x: Any, advice: str, error: type[Exception] = NotFinite
) -> None:
    """Refuse a batch (B, ...) with NaN or infinite values; say in which of its B."""
    if not bool(x.isfinite().all()):
        bad = (~x.isfinite()).reshape(len(x), -1).any(1).nonzero().flatten().tolist()
        raise error(
            f"{name}: numbers that are not finite in {len(bad)} of {len(x)} "
            f"(at {', '.join(map(str, bad[:10]))}); {advice}"
        )


def refuse(when: object, message: str, error: type[Exception] = ValueError) -> None:
    """Raise `error(message)` where the condition holds."""
    if when:
        raise error(message)


def expect_there(path: Path, what: str) -> Path:
    """`path`, if a file or a folder is there; `what` says what it should be."""
    refuse(not path.exists(), f"there is no {path}: expected {what}", FileNotFoundError)
    return path


def expect_empty(folder: Path, what: str = "no empty folder") -> None:
    """FileExistsError if a new folder would replace something, or where we work."""
    full = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    told = f"{folder} exists and is {what}: nothing was written, take another name"
    refuse(full, told, FileExistsError)
    left = f"{folder} is where this program works: nothing was written, name a new one"
    refuse(folder.exists() and folder.samefile(Path.cwd()), left, FileExistsError)


@contextmanager
def explain(
    what: str, *kinds: type[Exception], error: type[Exception] = ValueError
) -> Iterator[None]:
    """Errors of these kinds in the block become `error("what: and what they said")`."""
    try:
        yield
    except kinds as cause:
        raise error(f"{what}: {str(cause) or type(cause).__name__}") from cause


def bounded(default: Any, *, note: str = "", **limits: float | None) -> Any:
    """A dataclass field with a range: `least`, `most`, `above`, `below`.

    `note` ends the sentence that refuses a value: what the field is for, or an example.
    """
    metadata = {"range": _Range(**limits), "note": note}
    return dataclasses.field(default=default, metadata=metadata)


def check_fields(config: Any) -> None:
    """Check types and ranges of all fields; the first line of `__post_init__`."""
    types = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), types[field.name]
        limits = field.metadata.get("range", _Range())
        numeric = isinstance(value, int | float) and not isinstance(value, bool)
        if not _fits(value, kind) or (numeric and not limits.holds(value)):
            note = field.metadata.get("note", "")
            raise ValueError(
                f"{field.name}={_short(value)}: expected {named(kind)}{limits.text()}"
                f"{'; ' if note else ''}{note}"
            )


def from_dict(cls: type[T], values: Any, what: str) -> T:
    """The dataclass that a mapping describes; absent keys keep their defaults.

    A dictionary for a field that is a dataclass itself is read in the same way.

    Raises:
        ValueError: no mapping, an unknown or missing key, a value that `cls` refuses.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{what} is {_short(values)}: expected names with values")
    known = dataclasses.fields(cls)  # type: ignore[arg-type]
    fields = {field.name: field for field in known}
    for key in values:
        if key not in fields:
            raise ValueError(f"unknown key {key!r} in {what}; {nearest(key, fields)}")
    if missing := [name for name in fields.keys() - values if _required(fields[name])]:
        raise ValueError(f"{what} lacks {', '.join(sorted(missing))}")
    types = get_type_hints(cls)
    return cls(**{key: _read(value, types[key], key) for key, value in values.items()})


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """One entry for each key whose values differ, there and asked."""
    found = []
    for key in sorted({*ours, *theirs}):
        asked, there = ours.get(key), theirs.get(key)
        if isinstance(asked, Mapping) and isinstance(there, Mapping):
            found += [f"{key}.{inner}" for inner in differences(asked, there)]
        elif asked != there:
            found.append(f"{key} (there {_short(there)}, asked {_short(asked)})")
    return found


def expect_same(
    what: str, ours: Mapping[str, Any], theirs: Mapping[str, Any], advice: str
) -> None:
    """Refuse two records that differ: `what` ends before the list of differences."""
    if found := differences(ours, theirs):
        raise ValueError(f"{what} {'; '.join(found)}. {advice}")
