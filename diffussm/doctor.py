"""Doctor.

Generated from book/93_doctor.md by `make export`: edit there.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import torch

from diffussm import features
from diffussm.bill import VAE_FILE, checkpoints_kept, published
from diffussm.guards import explain, refuse
from diffussm.latents import LatentStore, verify_store
from diffussm.options import Execution, Recipe, check_data
from diffussm.parallel import compiler_lacking
from diffussm.probe import probe_all_reduce
from diffussm.recipes import (
    check_outside,
    fit,
    open_data,
    open_decoder,
    open_held_out,
    takes_latents,
)
from diffussm.resources import memory_needed, parameter_count
from diffussm.run_folder import check_run
from diffussm.warm_start import check_warm_start

__all__ = ["Plan", "Finding", "examine", "amount", "written_to", "QUESTIONS"]

_T = TypeVar("_T")


@dataclass(frozen=True)
class Plan:
    """A run that is about to start; what is None will not be asked for.

    `free` are the options that the data may still decide. The other fields are the
    arguments of `diffussm doctor`.
    """

    recipe: Recipe
    execution: Execution
    device: torch.device
    processes: int
    out: Path = Path(".")
    vae: str | None = None
    weights: Path | None = None
    reference: Path | None = None
    limit: float = 120.0
    quick: bool = False
    trial: int = 0
    price: float = 0.0
    free: frozenset[str] = frozenset()
    init_from: Path | None = None
    other_data: bool = False

    @classmethod
    def here(
        cls,
        recipe: Recipe,
        execution: Execution,
        device: str | None = None,
        processes: int = 0,
        **others: Any,
    ) -> Self:
        """The plan for this machine; `others` are the other fields."""
        usual = "cuda" if torch.cuda.is_available() else "cpu"
        with explain(f"--device {device}", RuntimeError):
            asked = torch.device(device or usual)
        alone = asked.index is not None and "LOCAL_RANK" in os.environ
        refuse(alone, f"{asked} is one GPU for all processes; pass --device cuda")
        gpus = torch.cuda.device_count() if asked.type == "cuda" else 0
        if asked.type == "cuda":
            local = int(os.environ.get("LOCAL_RANK", 0))
            asked = torch.device("cuda", asked.index or local)
        count = int(os.environ.get("WORLD_SIZE", 0)) or processes or gpus
        if not count:  # a trial is of the run as it will be
            count = 1 if others.get("trial") else 2
        return cls(recipe, execution, asked, count, **others)


class Finding(NamedTuple):
    """A line of the report: "pass", "skip", "hint" or "FAIL", and what was seen."""

    what: str
    verdict: str
    told: str


class _Skip(Exception):
    """A question that does not arise here."""


def _skip_unless(value: _T | None, reason: str) -> _T:
    """The value, if there is one; else the question does not arise."""
    if not value:
        raise _Skip(reason)
    return value


def _judged(fine: bool, seen: str, cure: str) -> str:
    """What was seen; OSError, with the cure, if it is not fine."""
    if not fine:
        raise OSError(f"{seen}; {cure}")
    return seen


def examine(what: str, plan: Plan) -> Finding:
    """Ask one of `QUESTIONS`."""
    try:
        return Finding(what, "pass", QUESTIONS[what](plan))
    except _Skip as reason:
        return Finding(what, "skip", str(reason))
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        return Finding(what, "FAIL", " ".join(str(error).split()) or repr(error))


def _ask_memory(plan: Plan) -> str:
    """Does what each process needs fit what is free for it?"""
    _where_there_is_a_device(plan)
    count = plan.processes
    need = memory_needed(plan.recipe, plan.execution, count)["total"]
    if plan.device.type == "cuda":
        free = float(torch.cuda.mem_get_info(plan.device)[0])
    else:
        here = os.environ.get("LOCAL_WORLD_SIZE", count)
        free = _free_memory() / int(here)
    each = f"each process needs {amount(need)} (computed; processes: {count})"
    cure = "lower --micro_batch, or --activation_checkpointing all, --strategy fsdp"
    return _judged(need <= free, f"{each}, {amount(free)} free", cure)


def amount(count: float) -> str:
    """Bytes, as one reads them."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _free_memory() -> float:
    """Bytes of main memory that are free, as Linux says it."""
    with explain("this system does not say it", OSError, KeyError, error=_Skip):
        lines = Path("/proc/meminfo").read_text().splitlines()
        said = dict(line.split(":") for line in lines)["MemAvailable"]
    return 1024.0 * int(said.split()[0])


def _ask_compiler(plan: Plan) -> str:
    """Is there what torch.compile needs?"""
    _skip_unless(plan.execution.compile, "the recipe does not compile")
    lacking = compiler_lacking(plan.device)
    seen = f"no {lacking} here" if lacking else "found"
    return _judged(not lacking, seen, "install it, or pass --compile false")


def _ask_disk(plan: Plan) -> str:
    """Is there room for the checkpoints, and may we write there?"""
    _first_process_only()
    kept = checkpoints_kept(plan.recipe, plan.execution)
    need = kept * 4 * 4.0 * parameter_count(plan.recipe.model)
    there = written_to(plan.out)
    free = shutil.disk_usage(there).free
    both = f"{amount(need)} needed for {kept} checkpoints, {amount(free)} free"
    cure = "free some, raise --keep_every, or choose another --out"
    return _judged(need <= free, f"{both} for {plan.out}", cure)


def written_to(out: Path) -> Path:
    """The folder that is there already, at or above `out`; OSError if read-only."""
    above = (out.absolute(), *out.absolute().parents)
    there = next(path for path in above if path.is_dir())
    writable = os.access(there, os.W_OK)
    _judged(writable, f"{there} cannot be written to", "choose another --out")
    return there


def _ask_data(plan: Plan) -> str:
    """Are there data that this model can be trained on, every checksum right?"""
    found = open_data(plan.recipe, plan.free, plan.out.parent)
    check_data(found, fit(plan.recipe, found, plan.free))
    _first_process_only()
    told = f"{len(found):,} images in {found.num_classes} classes"
    if not isinstance(found, LatentStore) or plan.quick:
        return told
    problems = "; ".join(verify_store(found.path))
    _judged(not problems, problems, "encode again, with --verify")
    return f"{told}, every checksum right"


def _ask_folder(plan: Plan) -> str:
    """Is the folder of the run free, or of this very run?"""
    _skip_unless(plan.out != Path("."), "say with --out where the run will be written")
    _first_process_only()
    data = open_data(plan.recipe, plan.free, plan.out.parent)
    check_outside(plan.out, data, pictures=True)
    fitted = fit(plan.recipe, data, plan.free)
    known = check_run(plan.out, fitted, plan.execution, data, plan.other_data)
    return f"{plan.out} is {'free' if known is None else 'of this run: it goes on'}"


def _ask_start(plan: Plan) -> str:
    """Do the weights that the run begins with fit?"""
    other = _skip_unless(plan.init_from, "the run begins with random weights")
    _first_process_only()
    origin = check_warm_start(plan.out, plan.recipe, other)
    new = ", ".join(origin["new"]) or "nothing"
    return f"{len(origin['taken'])} tensors of {other}; new: {new}"


def _ask_held_out(plan: Plan) -> str:
    """Are there images that the run does not see, for its scores?"""
    execution, place = plan.execution, plan.out.parent
    _skip_unless(execution.score_every, "the run is not scored on the way")
    data = open_data(plan.recipe, plan.free, place)
    named = execution.held_out, plan.recipe, data.classes
    held_out = open_held_out(*named, place)
    check_outside(plan.out, held_out, pictures=True)
    return f"{len(held_out)} images"


def _ask_vae(plan: Plan) -> str:
    """Does the autoencoder decode what the model will draw?"""
    model = plan.recipe.model
    _skip_unless(takes_latents(model), "the recipe trains on pixels")
    lacking = "say with --vae what decodes the samples"
    seen = not plan.execution.sample_every or plan.vae is not None
    _judged(seen, "--sample_every draws samples on the way", lacking)
    vae = _skip_unless(plan.vae, lacking)
    _where_there_is_a_device(plan)
    known, place = plan.recipe.data, plan.out.parent
    found = open_data(plan.recipe, plan.free, place) if known else None
    decode, _ = open_decoder(vae, plan.device, getattr(found, "vae", None))
    h, w = model.height, model.width
    image = decode(torch.zeros(1, model.in_channels, h, w, device=plan.device))
    finite = bool(image.isfinite().all())
    _judged(finite, f"{vae} decodes to numbers that are not finite", "take another")
    height, width = image.shape[2:]
    return f"decodes {h} x {w} to {height} x {width} pixels{_whose(vae)}"


def _whose(vae: str) -> str:
    """Whose weights an autoencoder has, if they are published ones."""
    file = Path(vae) / VAE_FILE
    known = published(file) if _rank() == 0 and file.is_file() else None
    return f"; its weights are those of {known.url}" if known else ""


def _ask_gpu(plan: Plan) -> str:
    """Which cards are there?"""
    enough = "none is used; a CPU is enough for digits and openmoji"
    _skip_unless(plan.device.type == "cuda", enough)
    gpus, mine = torch.cuda.device_count(), plan.device.index
    _judged(gpus > 0, "torch sees no GPU", "ask nvidia-smi; is torch built for CUDA?")
    _judged(mine < gpus, f"process {mine} has no GPU: there are {gpus}", "start fewer")
    seen = [mine] if "LOCAL_RANK" in os.environ else range(gpus)
    cards = (torch.cuda.get_device_properties(i) for i in seen)
    return ", ".join(f"{c.name} with {amount(c.total_memory)}" for c in cards)


def _ask_bf16(plan: Plan) -> str:
    """Does the arithmetic of the recipe work here?"""
    precision, has_it = plan.recipe.precision, True
    _skip_unless(precision == "bf16", f"the recipe trains in {precision}")
    _where_there_is_a_device(plan)
    if plan.device.type == "cuda":
        torch.cuda.set_device(plan.device)
        has_it = torch.cuda.is_bf16_supported(including_emulation=False)
    x = torch.ones(8, 8, dtype=torch.bfloat16, device=plan.device)
    right = has_it and (x @ x).float().sum().item() == 512
    _judged(right, "bf16 does not work here", "train with --precision float32")
    return "works"


def _ask_inception(plan: Plan) -> str:
    """Are these the weights that the scores are defined by?"""
    weights = _skip_unless(plan.weights, "say with --weights where they lie")
    _first_process_only()
    features.check_weights(weights)
    return f"{weights} has the right checksum"


def _ask_reference(plan: Plan) -> str:
    """Is there something to compare with?"""
    hint = "say with --reference what evaluate compares with"
    reference = _skip_unless(plan.reference, hint)
    _first_process_only()
    _judged(reference.exists(), f"there is no {reference}", "see where it was put")
    known = published(reference) if reference.is_file() else None
    return f"{reference} is {'the published one' if known else 'there'}"


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


def _first_process_only() -> None:
    """Skip, in all processes but the first, what is the same for all of them."""
    _skip_unless(_rank() == 0, "the first process looks")


def _where_there_is_a_device(plan: Plan) -> None:
    """Skip what needs a GPU where torch sees none, which is said of "GPU"."""
    there = plan.device.type != "cuda" or torch.cuda.device_count() > 0
    _skip_unless(there, "torch sees no GPU")


def _ask_processes(plan: Plan) -> str:
    """Can the processes talk to each other?"""
    _where_there_is_a_device(plan)
    kind = "cuda" if plan.device.type == "cuda" else "cpu"
    return probe_all_reduce(kind, plan.processes, plan.limit)


QUESTIONS: dict[str, Callable[[Plan], str]] = {
    "GPU": _ask_gpu,
    "memory": _ask_memory,
    "bf16": _ask_bf16,
    "compiler": _ask_compiler,
    "processes": _ask_processes,
    "disk": _ask_disk,
    "data": _ask_data,
    "folder": _ask_folder,
    "start": _ask_start,
    "held-out": _ask_held_out,
    "autoencoder": _ask_vae,
    "Inception": _ask_inception,
    "reference": _ask_reference,
}
