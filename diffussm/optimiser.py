"""How the weights move.

Generated from book/35_optimiser.md by `make export`: edit there.
"""

from typing import Any

import torch
from torch import Tensor, nn

from diffussm.options import Recipe

__all__ = [
    "learning_rate_factor",
    "DYNAMICS",
    "parameter_groups",
    "describe_groups",
    "update_ema",
    "ema_decay_at",
]


def learning_rate_factor(step: int, recipe: Recipe) -> float:
    """The share of `recipe.lr` at a step (from 0), in (0, 1]: eq-optimiser-rate."""
    rising = (step + 1) / max(recipe.warmup, 1)
    falling = (recipe.steps - step) / max(recipe.cooldown, 1)
    return min(1.0, rising, falling)


DYNAMICS = ("log_dt", "log_A_real", "A_imag")


def _group_of(name: str) -> str:
    """The group of a parameter: "dynamics", "matrices" or "vectors"."""
    leaf = name.rsplit(".", 1)[-1]
    if leaf in DYNAMICS:
        return "dynamics"
    return "matrices" if leaf == "weight" and "embed_y" not in name else "vectors"


def parameter_groups(
    model: nn.Module, lr: float, ssm_lr: float, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """The parameters as an optimiser takes them, each in exactly one group."""
    groups: dict[str, dict[str, Any]] = {
        "dynamics": {"lr": min(lr, ssm_lr), "weight_decay": 0.0},
        "vectors": {"lr": lr, "weight_decay": 0.0},
        "matrices": {"lr": lr, "weight_decay": weight_decay},
    }
    for name, group in groups.items():
        group.update(name=name, params=[], param_names=[], base_lr=group["lr"])
    for name, parameter in model.named_parameters():
        groups[_group_of(name)]["params"].append(parameter)
        groups[_group_of(name)]["param_names"].append(name)
    return list(groups.values())


def describe_groups(groups: list[dict[str, Any]]) -> str:
    """One line per group: its parameters, its learning rate and decay."""
    lines = [f"{'group':<9}{'parameters':>11}{'lr':>9}{'decay':>6}"]
    for group in groups:
        numbers = sum(parameter.numel() for parameter in group["params"])
        lines.append(
            f"{group['name']:<9}{numbers:>11,}"
            f"{group['base_lr']:>9.1e}{group['weight_decay']:>6g}"
        )
    return "\n".join(lines)


@torch.no_grad()
def update_ema(
    ema: nn.Module, model: nn.Module, decay: float, fine: Tensor | None = None
) -> None:
    """In place: ema <- decay ema + (1 - decay) model (eq-training-ema).

    `fine`, a bool on the device, says whether to do it; None: yes.
    """
    pairs = zip(ema.parameters(), model.parameters(), strict=True)
    ours, theirs = zip(*((_local(a), _local(b)) for a, b in pairs), strict=True)
    if fine is None:
        torch._foreach_lerp_(ours, theirs, 1 - decay)
    else:
        weight = torch.where(fine, 1 - decay, 0.0)
        torch._foreach_lerp_(ours, theirs, [weight] * len(ours))


def _local(parameter: Tensor) -> Tensor:
    # a parameter that processes share out is averaged by each for its own part
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def ema_decay_at(step: int, decay: float, warmup: bool = True) -> float:
    """The decay of the average at a step (from 0): eq-training-ema-warmup."""
    return min(decay, (1 + step) / (10 + step)) if warmup else decay
