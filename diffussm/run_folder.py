"""A folder belongs to one run.

Generated from book/45_run_folder.md by `make export`: edit there.
"""

import errno
import json
import os
import socket
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from diffussm.batches import BATCHES
from diffussm.checkpoints import checkpoints_of, find_checkpoint, step_of
from diffussm.data import Dataset
from diffussm.distributed import on_rank_zero
from diffussm.files import UNSUPPORTED, read_json, write_json
from diffussm.guards import differences, expect_same, explain
from diffussm.model import DiffuSSM
from diffussm.optimiser import learning_rate_factor
from diffussm.options import Execution, Recipe, from_flat, warn
from diffussm.parallel import chooser

__all__ = [
    "RunConfig",
    "read_run",
    "held",
    "locked",
    "open_run",
    "check_run",
    "encoder_of",
    "load_run",
]


class RunConfig(NamedTuple):
    """What the config.json of a run's folder says."""

    recipe: Recipe
    execution: Execution
    data: dict[str, Any]
    random: int = BATCHES

    def write(self, run: Path) -> None:
        """Write it, whole or not at all."""
        recipe, execution = asdict(self.recipe), asdict(self.execution)
        parts = self._asdict() | {"recipe": recipe, "execution": execution}
        write_json(run / "config.json", parts)


def read_run(run: Path, name: str = "config.json") -> RunConfig:
    """The configuration of the run in a folder.

    Raises:
        ValueError: its file is damaged, or of something else.
    """
    file = run / name
    values = read_json(file, "the configuration")
    with explain(f"{file} is not of a training run", KeyError, TypeError):
        if "dataset" in values:
            values = _in_parts(values)
        options = from_flat({**values["recipe"], **values["execution"]})
        return RunConfig(*options, dict(values["data"]), values.get("random", 1))


def _in_parts(values: dict[str, Any]) -> dict[str, Any]:
    data, random = values.pop("dataset"), values.pop("random", 1)
    return {"recipe": values, "execution": {}, "data": data, "random": random}


@contextmanager
def held(run: Path) -> Iterator[None]:
    """Hold the run's folder; ValueError if another process does."""
    release = _lock(run)
    try:
        yield
    finally:
        release()


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """As `held`, for processes that work together: the first holds it for all."""
    with ExitStack() as stack:
        on_rank_zero(lambda: stack.enter_context(held(run)))
        yield


def _lock(run: Path) -> Callable[[], None]:
    """Take the run's lock and return what lets go of it."""
    try:
        import fcntl
    except ImportError:  # Windows
        return _lock_by_file(run, "this system has no flock")
    handle = (run / ".lock").open("w")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return handle.close
    except BlockingIOError:
        handle.close()
        raise ValueError(f"another process holds {run}: wait, or stop it") from None
    except OSError as error:
        handle.close()
        return _lock_without_flock(run, error)


_THIS_PROCESS = uuid.uuid4().hex  # a number such as 7 may come again in a container

_NO_FLOCK = UNSUPPORTED | {errno.ENOLCK}  # network disks, FUSE and Lustre


def _lock_without_flock(run: Path, error: OSError) -> Callable[[], None]:
    if error.errno not in _NO_FLOCK:
        raise error
    return _lock_by_file(run, f"this disk has no flock: {error.strerror}")


def _lock_by_file(run: Path, reason: str) -> Callable[[], None]:
    path, host = run / ".lock.json", socket.gethostname()
    warn(
        f"{reason}; {path.name} in the run's folder takes its place, which a killed "
        "process leaves behind"
    )
    holder = {"host": host, "process": os.getpid(), "token": _THIS_PROCESS}
    for _ in range(2):
        with suppress(FileExistsError), path.open("x") as file:
            json.dump(holder, file)
            return lambda: path.unlink(missing_ok=True)
        _remove_if_stale(path, host)
    raise ValueError(f"another process has taken {path} just now: wait for it")


def _remove_if_stale(path: Path, host: str) -> None:
    owner, process, token = _holder_of(path)
    if owner is None:  # let go of in this moment
        return
    if owner != host or _alive(process, token):  # of other machines we know nothing
        raise ValueError(
            f"{path} is held by process {process} of the machine {owner!r}: wait, or "
            "stop it; if it was killed, remove that file"
        )
    warn(
        f"{path} was left by process {process} of this machine, which is no more; it "
        "is removed"
    )
    aside = path.with_name(f"{path.name}.{_THIS_PROCESS}")  # another may judge the same
    with suppress(FileNotFoundError):
        path.rename(aside)
        if json.loads(aside.read_text()).get("token") != token:  # new: not ours
            with suppress(FileExistsError):
                os.link(aside, path)
        aside.unlink()


def _holder_of(path: Path) -> tuple[str | None, int, str]:
    """Host, process and token that a lock names; None if there is no lock."""
    try:
        holder = json.loads(path.read_text())
        return str(holder["host"]), int(holder["process"]), holder["token"]
    except FileNotFoundError:
        return None, 0, ""
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown", 0, ""


def _alive(process: int, token: str) -> bool:
    if process == os.getpid():
        return token == _THIS_PROCESS
    if os.name != "posix":  # where the question would end the process
        return True
    with suppress(ProcessLookupError):
        with suppress(PermissionError):  # another user's
            os.kill(process, 0)
        return True
    return False


def open_run(
    run: Path,
    recipe: Recipe,
    execution: Execution,
    dataset: Dataset,
    other_data: bool = False,
) -> None:
    """Claim the folder `run` for a recipe and data, or check that it is this run.

    `other_data` lets it go on with other data, which its configuration then records.

    Raises:
        ValueError: another run, a run of other data, or files that are no run.
    """
    claim = run, recipe, execution, dataset, other_data
    now = check_run(*claim)
    if now is None:
        run.mkdir(parents=True, exist_ok=True)
    if now is None or now != read_run(run):
        with held(run):
            now = check_run(*claim)
            (now or RunConfig(recipe, execution, dataset.identity)).write(run)
    if (encoder := getattr(dataset, "vae", None)) is not None:
        write_json(run / "vae.json", encoder_of(run) or encoder)


def check_run(
    run: Path,
    recipe: Recipe,
    execution: Execution,
    dataset: Dataset,
    other_data: bool = False,
) -> RunConfig | None:
    """What the run in a folder becomes, None: none is there; refuses as `open_run`."""
    chooser(execution.convolution)
    if not run.exists() or (run.is_dir() and not any(run.glob("[!.]*"))):
        return None
    if not (run / "config.json").is_file():
        raise ValueError(f"{run} holds no training run, but files: name another")
    theirs, ours = read_run(run), RunConfig(recipe, execution, dataset.identity)
    _compare_recipe(run, recipe, theirs.recipe)
    _compare_rates(run, recipe, theirs.recipe)
    _compare_encoder(run, getattr(dataset, "vae", None))
    _warn_of_age(run, ours, theirs)
    data = _compare_data(run, ours, theirs, other_data)
    free = {name: getattr(recipe, name) for name in ("data", *_PHASES)}
    return theirs._replace(recipe=replace(theirs.recipe, **free), data=data)


_PHASES = ("steps", "warmup", "cooldown")


def _compare_recipe(run: Path, ours: Recipe, theirs: Recipe) -> None:
    now, then = (
        {k: v for k, v in asdict(recipe).items() if k not in {"data", *_PHASES}}
        for recipe in (ours, theirs)
    )
    expect_same(
        f"{run} holds another run, which differs in", now, then, "Name a new folder."
    )


def _first_other_rate(ours: Recipe, theirs: Recipe, done: int) -> int | None:
    """The first of the steps done that has another learning rate in `ours`."""
    both = (replace(recipe, steps=max(recipe.steps, done)) for recipe in (ours, theirs))
    now, then = (partial(learning_rate_factor, recipe=recipe) for recipe in both)
    return next((step for step in range(done) if now(step) != then(step)), None)


def _compare_rates(run: Path, ours: Recipe, theirs: Recipe) -> None:
    now, then = ({name: getattr(r, name) for name in _PHASES} for r in (ours, theirs))
    if now == then:
        return
    done = max(map(step_of, checkpoints_of(run)), default=0)
    if (step := _first_other_rate(ours, theirs, done)) is None:
        return
    begun = done > theirs.steps - theirs.cooldown + 1
    told = "its cool-down has begun, and " if begun else ""
    raise ValueError(
        f"{run} is at step {done}: {told}its step {step + 1} would have had another "
        f"learning rate; {'; '.join(differences(now, then))}. Omit what differs, or "
        f"go on from its weights in a new folder, by --init_from {run}"
    )


def _compare_data(
    run: Path, ours: RunConfig, theirs: RunConfig, other_data: bool
) -> dict[str, Any]:
    """What is to be remembered of the data."""
    now, then = _comparable(ours.data, theirs.data)
    if other_data and now != then:
        before = {k: v for k, v in theirs.data.items() if k != "earlier"}
        return {**ours.data, "earlier": [*theirs.data.get("earlier", []), before]}
    expect_same(
        f"{run}: other data, which differ in", now, then, "Give those, or --other_data."
    )
    return theirs.data


def _comparable(*facts: dict[str, Any]) -> list[dict[str, Any]]:
    unknown = None in [one.get("fingerprint") for one in facts]
    names = facts[0].keys() - ({"fingerprint"} if unknown else set())
    return [{f"data.{name}": one.get(name) for name in names} for one in facts]


def encoder_of(run: Path, data: str | Path | None = None) -> dict[str, Any] | None:
    """Which autoencoder's encoder made the latents of a run; None if unknown.

    A run that does not remember it: the latent store `data` is asked, if it is there.
    """
    if (run / "vae.json").is_file():
        return dict(read_json(run / "vae.json"))
    if data and (manifest := Path(data) / "manifest.json").is_file():
        with suppress(KeyError, TypeError):  # a manifest of something else
            return dict(read_json(manifest)["vae"])
    return None


def _compare_encoder(run: Path, encoder: dict[str, Any] | None) -> None:
    if encoder is None:
        return
    now, then = (
        {name: made_by.get(name) for name in ("encoder_sha256", "scaling_factor")}
        for made_by in (encoder, encoder_of(run) or encoder)
    )
    expect_same(
        f"{run} has another encoder, which differs in", now, then, "Name a new folder."
    )


def _warn_of_age(run: Path, ours: RunConfig, theirs: RunConfig) -> None:
    if theirs.random != BATCHES:
        others = "which digits are held out, order, flips, dropped labels and noise"
        changed = "the noise of each image" if theirs.random == 2 else others
        warn(
            f"{run} was begun by a version that drew its random numbers in another "
            f"way: it goes on, but {changed} will be others than that version's"
        )
    known, found = (config.data.get("fingerprint") for config in (theirs, ours))
    if known is None and found is not None:
        warn(
            f"{run} holds no fingerprint of its data: only their number and their "
            "classes were compared"
        )


def load_run(
    run: str | Path, weights: str = "ema", step: int | None = None
) -> tuple[DiffuSSM, Recipe, list[str]]:
    """The trained network of a run, its recipe and its class names.

    `weights` is "ema" (what one samples from) or "model"; `step` asks for the
    checkpoint of that step instead of the newest.

    Raises:
        FileNotFoundError: no run, no valid checkpoint yet, or none of that step.
        ValueError: its network is not a plain `DiffuSSM`, but a variant of it.
    """
    run = Path(run)
    if not (run / "config.json").is_file():
        raise FileNotFoundError(f"{run} is not a training run: no config.json")
    trained = read_run(run)
    checkpoint = find_checkpoint(run, step)
    if checkpoint is None:
        raise FileNotFoundError(f"{run} has no valid checkpoint yet: train it longer")
    model = DiffuSSM.from_pretrained(checkpoint / weights)
    return model, trained.recipe, trained.data.get("classes", [])
