"""The model.

Generated from book/22_model.md by `make export`: edit there.
"""

import difflib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import safetensors
import safetensors.torch
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from diffussm.convolution import without_autocast
from diffussm.hourglass import HourglassBlock

__all__ = [
    "DiffuSSMConfig",
    "PRESETS",
    "timestep_features",
    "Labels",
    "as_labels",
    "DiffuSSM",
    "sincos_positions",
    "CONFIG_FILE",
    "WEIGHTS_FILE",
    "apply_umask",
]


@dataclass(frozen=True)
class DiffuSSMConfig:
    """Everything that decides the shape of a :class:`DiffuSSM`. Checked when made; wrong values are refused.

    Args:
        input_size: Side of the square input, or (H, W), in pixels of the latent.
        in_channels: C, channels of the input.
        num_classes: Classes; 0 makes an unconditional model.
        d_model: D, width of the residual stream.
        n_blocks: Hourglass blocks.
        d_state: N, real state size of each channel, even.
        downsample: M, neighbours that share a place in the stream; divides L and 2D.
        patch_size: P, side of the patches that become one position; 1 is none. Divides H and W.
        label_dropout: Probability with which :meth:`DiffuSSM.drop_labels` replaces a label by "no class".
        pos_embed: "none", or "sincos" to tell every place of the stream its row and column.

    Raises:
        ValueError: a value has the wrong type or range, or two do not fit together.

    Source: chapter 5; sections 3.2 and 4.1 of the paper.
    """

    input_size: int | tuple[int, int] = 32
    in_channels: int = 4
    num_classes: int = 1000
    d_model: int = 1152
    n_blocks: int = 29
    d_state: int = 64
    downsample: int = 2
    patch_size: int = 1
    label_dropout: float = 0.1
    pos_embed: Literal["none", "sincos"] = "none"

    def __post_init__(self) -> None:
        size: Any = self.input_size
        if isinstance(size, list):  # as JSON and YAML write a pair
            size = tuple(size)
            object.__setattr__(self, "input_size", size)
        sides = size if isinstance(size, tuple) else (size, size)
        if len(sides) != 2 or not all(_is_int(side) and side >= 1 for side in sides):
            raise ValueError(
                f"input_size={size!r}: expected a positive integer or a pair (H, W) of them"
            )
        for name, least in (
            ("in_channels", 1),
            ("num_classes", 0),
            ("d_model", 1),
            ("n_blocks", 1),
            ("d_state", 2),
            ("downsample", 1),
            ("patch_size", 1),
        ):
            value = getattr(self, name)
            if not _is_int(value) or value < least:
                raise ValueError(
                    f"{name}={value!r}: expected an integer of at least {least}"
                )
        if self.d_state % 2:
            raise ValueError(
                f"d_state={self.d_state} is odd: states come in conjugate pairs, take an even number"
            )
        p, M, D = self.patch_size, self.downsample, self.d_model
        if self.height % p or self.width % p:
            raise ValueError(
                f"patch_size={p} does not divide input_size={self.height} x {self.width}"
            )
        if self.seq_len % M:
            raise ValueError(
                f"downsample={M} does not divide the {self.seq_len} positions of a "
                f"{self.height} x {self.width} input with patch_size={p}: change downsample or input_size"
            )
        if 2 * D % M:
            raise ValueError(
                f"downsample={M} does not divide 2 * d_model = {2 * D}: the pieces have width 2D/M"
            )
        p_drop = self.label_dropout
        if (
            isinstance(p_drop, bool)
            or not isinstance(p_drop, int | float)
            or not 0 <= p_drop <= 1
        ):
            raise ValueError(
                f"label_dropout={p_drop!r}: expected a probability from 0 to 1"
            )
        if self.pos_embed not in ("none", "sincos"):
            raise ValueError(
                f'pos_embed={self.pos_embed!r}: expected "none" or "sincos"'
            )
        if self.pos_embed == "sincos" and D % 4:
            raise ValueError(
                f"d_model={D}: expected a multiple of 4 with pos_embed='sincos'"
            )

    @property
    def height(self) -> int:
        """H."""
        return (
            self.input_size[0]
            if isinstance(self.input_size, tuple)
            else self.input_size
        )

    @property
    def width(self) -> int:
        """W."""
        return (
            self.input_size[1]
            if isinstance(self.input_size, tuple)
            else self.input_size
        )

    @property
    def seq_len(self) -> int:
        """L = HW / P^2, positions of the sequence that the state space models read."""
        return (self.height // self.patch_size) * (self.width // self.patch_size)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The configuration that a dictionary (of JSON or YAML) describes; absent keys keep their defaults.

        Raises:
            ValueError: not a dictionary, a key that does not exist (with the nearest that does), a bad value.
        """
        if not isinstance(values, dict):
            raise ValueError(
                f"expected a mapping from names to values, got {type(values).__name__}"
            )
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                raise ValueError(
                    f"unknown key {key!r} in a model configuration; {_nearest(key, known)}"
                )
        return cls(**values)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _nearest(word: Any, known: list[str]) -> str:
    close = difflib.get_close_matches(str(word), known, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    return f"{hint}(known: {', '.join(known)})"


PRESETS: dict[str, dict[str, Any]] = {
    f"DiffuSSM-{size}{suffix}": {
        "d_model": d_model,
        "n_blocks": n_blocks,
        "patch_size": patch_size,
    }
    for suffix, patch_size in (("", 1), ("/2", 2))
    for size, d_model, n_blocks in (
        ("S", 384, 12),
        ("B", 768, 12),
        ("L", 1024, 24),
        ("XL", 1152, 29),
    )
} | {
    # for a CPU: 8 x 8 grey digits, and 32 x 32 colour emoji in the fourteen classes of chapter 8
    "digits": {
        "input_size": 8,
        "in_channels": 1,
        "num_classes": 10,
        "d_model": 96,
        "n_blocks": 3,
        "d_state": 16,
    },
    "emoji": {
        "input_size": 32,
        "in_channels": 3,
        "num_classes": 14,
        "d_model": 128,
        "n_blocks": 6,
        "d_state": 32,
        "patch_size": 2,
    },
}


def timestep_features(
    t: Tensor, n_features: int = 256, max_period: float = 10_000.0
) -> Tensor:
    """Cosines, then sines, of t at n/2 frequencies from 1 down to nearly 1/max_period: (B,) -> (B, n).

    Source: chapter 5, equation eq-model-timestep (section 4.1 of the paper: as in ADM).
    """
    half = n_features // 2
    exponent = torch.arange(half, device=t.device, dtype=torch.float32) / half
    angle = t.float()[:, None] * torch.exp(-math.log(max_period) * exponent)  # (B, n/2)
    return torch.cat([angle.cos(), angle.sin()], dim=1)  # (B, n)


Labels = Tensor | np.ndarray | Sequence[int]


def as_labels(y: Labels) -> Tensor:
    """Class labels as an int64 tensor: a tensor, a NumPy array or a sequence of integers, of any shape.

    Raises:
        TypeError: they are not integers.

    Source: chapter 5.
    """
    if isinstance(y, Tensor):
        values, given = y, str(y.dtype)
        whole = (
            not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool)
            or y.numel() == 0
        )
    else:
        array = np.asarray(y)
        whole, given = (
            array.dtype.kind in "iu" or array.size == 0,
            f"{type(y).__name__} of {array.dtype}",
        )
        values = torch.from_numpy(array.astype(np.int64)) if whole else torch.empty(0)
    if not whole:
        raise TypeError(
            f"y is {given}: expected an integer tensor, array or list, one label per image"
        )
    return values.long()


class DiffuSSM(nn.Module):
    """The denoiser: noisy images, timesteps and labels in; predicted noise and variance out.

    A stack of :class:`~diffussm.hourglass.HourglassBlock` between two linear maps. A new model returns zeros.

    Args:
        config: A :class:`DiffuSSMConfig`; :meth:`from_preset` has the paper's.

    Attributes:
        config: As given.
        null_label: The label that means "no class", equal to num_classes; None for an unconditional model.

    Source: chapter 5; sections 3.2 and 4.1 of the paper.
    """

    def __init__(self, config: DiffuSSMConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = False  # True: compute activations again in the backward pass, to save memory
        self._samplers = 0  # how many cached_kernels() are open
        self._cache: _Cache | None = None
        self.null_label = config.num_classes if config.num_classes else None
        D, M, P, C = (
            config.d_model,
            config.downsample,
            config.patch_size,
            config.in_channels,
        )
        self.embed_x = nn.Linear(M * P * P * C, D)
        t_in, t_out = nn.Linear(256, D), nn.Linear(D, D)
        self.embed_t = nn.Sequential(t_in, nn.SiLU(), t_out)
        self.embed_y = (
            nn.Embedding(config.num_classes + 1, D) if config.num_classes else None
        )
        self.blocks = nn.ModuleList(
            HourglassBlock(D, config.d_state, M) for _ in range(config.n_blocks)
        )
        self.final_norm = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6)
        self.final_modulation = nn.Linear(D, 2 * D)
        self.head = nn.Linear(D, M * P * P * 2 * C)
        nn.init.xavier_uniform_(self.embed_x.weight)
        nn.init.xavier_uniform_(self.final_modulation.weight)
        nn.init.zeros_(self.head.weight)
        for linear in (self.embed_x, self.final_modulation, self.head):
            nn.init.zeros_(linear.bias)
        for linear in (t_in, t_out):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        if self.embed_y is not None:
            nn.init.normal_(self.embed_y.weight, std=0.02)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> Self:
        """A fresh model of a size in PRESETS, such as ``from_preset("DiffuSSM-XL", input_size=64)``.

        Raises:
            ValueError: no such preset, or an override that :meth:`DiffuSSMConfig.from_dict` refuses.
        """
        if name not in PRESETS:
            raise ValueError(
                f"there is no preset {name!r}; {_nearest(name, list(PRESETS))}"
            )
        return cls(DiffuSSMConfig.from_dict({**PRESETS[name], **overrides}))

    def forward(self, x: Tensor, t: Tensor, y: Labels | None = None) -> Tensor:
        """Predict noise and variance. Draws no random numbers, in training as in evaluation.

        Args:
            x: Noisy input, (B, C, H, W). H and W need not be the configuration's, if P and M divide.
            t: Timesteps, (B,), integer or real.
            y: Labels, (B,) integers, 0 .. num_classes, the last one for "no class"; None if unconditional.

        Returns:
            (B, 2C, H, W): the noise in the first C channels, in the others the place of the variance
            between its bounds (chapter 6). Of the precision of the weights, under autocast too.

        Raises:
            ValueError: shapes that do not fit, labels missing, superfluous or outside the table.
            TypeError: ``x`` is not floating-point or ``y`` not integer.
        """
        if y is not None and not isinstance(y, Tensor):
            y = as_labels(y).to(x.device)
        _check_inputs(self.config, x, t, y)
        M, P, dtype = (
            self.config.downsample,
            self.config.patch_size,
            self.embed_x.weight.dtype,
        )
        h, w = x.shape[2] // P, x.shape[3] // P
        x = rearrange(
            x, "b c (h p) (w q) -> b (h w) (c p q)", p=P, q=P
        )  # (B, L, P P C)
        x = rearrange(x, "b (j k) c -> b j (k c)", k=M)  # (B, J, M P P C)
        # back to float32 at once: autocast hands out bfloat16, in which the stream would lose what blocks add
        x = self.embed_x(x.to(dtype)).to(dtype)  # (B, J, D)
        if self.config.pos_embed == "sincos":
            places = sincos_positions(h, w, self.config.d_model, x.device)  # (L, D)
            x = x + places[::M].to(dtype)  # (B, J, D)
        c = self.embed_t(timestep_features(t).to(dtype))  # (B, D)
        if self.embed_y is not None and y is not None:
            c = c + self.embed_y(y.long())  # (B, D)
        for block, spectra in zip(self.blocks, self._spectra(h * w), strict=True):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, c, use_reentrant=False)  # (B, J, D)
            else:
                x = block(x, c, spectra)  # (B, J, D)
        with without_autocast(
            x.device
        ):  # guidance would magnify the rounding of a bfloat16 answer
            modulation = self.final_modulation(F.silu(c.to(dtype)))  # (B, 2D)
            shift, scale = modulation.unsqueeze(1).chunk(2, dim=2)  # (B, 1, D) each
            x = self.head(self.final_norm(x) * (1 + scale) + shift)  # (B, J, M P P 2C)
        x = rearrange(x, "b j (k c) -> b (j k) c", k=M)  # (B, L, P P 2C)
        return rearrange(
            x, "b (h w) (c p q) -> b c (h p) (w q)", h=h, p=P, q=P
        ).contiguous()

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle takes along: not the kernels that somebody keeps while sampling."""
        return {**self.__dict__, "_samplers": 0, "_cache": None}

    @contextmanager
    def cached_kernels(self) -> Iterator[None]:
        """Within this context, forward passes without gradients share the spectra of the kernels.

        For samplers, which run one model many times. Before each use the parameters are compared with those
        that the spectra were made from, number by number, so a change of any kind is noticed. Costs the
        memory of the spectra, 16 D (L + 1) bytes for each block in float32, until the context is left. Does
        nothing for parameters that are sharded, on the meta device or of a class of their own.

        Source: chapter 5.
        """
        self._samplers += 1
        try:
            yield
        finally:
            self._samplers -= 1
            if not self._samplers:
                self._cache = None

    def _spectra(self, length: int) -> Sequence[Tensor | None]:
        """For each block the spectra of its kernels, or None where it shall compute them itself."""
        layers: list[Any] = [block.ssm for block in self.blocks]
        parameters: list[Tensor] = [p for layer in layers for p in layer.parameters()]
        if (
            not self._samplers
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or not parameters  # one of the replicas that DataParallel makes for each step
            or not all(type(p) is nn.Parameter and not p.is_meta for p in parameters)
        ):
            return [None] * len(self.blocks)
        if self._cache is None or not self._cache.holds(parameters, length):
            self._cache = (
                None  # before the new one is made: they need not both have room
            )
            spectra = [layer.spectra(length) for layer in layers]
            self._cache = _Cache(
                length, [p.detach().clone() for p in parameters], spectra
            )
        return self._cache.spectra

    def drop_labels(
        self, y: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Replace each label by "no class" with probability label_dropout: (B,) -> (B,), one draw per sample.

        Raises:
            ValueError: the model is unconditional.

        Source: chapter 5 (as DiT does it; the paper guides, and does not mention the dropping).
        """
        if self.null_label is None:
            raise ValueError(
                "drop_labels on an unconditional model (num_classes=0): it has no labels to drop"
            )
        device = y.device if generator is None else generator.device
        dropped = (
            torch.rand(y.shape, generator=generator, device=device)
            < self.config.label_dropout
        )
        return torch.where(dropped.to(y.device), self.null_label, y)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` into a folder, each complete or not at all.

        Raises:
            ValueError: the folder holds a model of another configuration; nothing is written.
            OSError: the folder cannot be made or written.

        Source: chapter 5.
        """
        _save(self, Path(folder))

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, device: str | torch.device = "cpu"
    ) -> Self:
        """The model that :meth:`save_pretrained` wrote, in float32 at least. Draws no random numbers.

        Raises:
            FileNotFoundError: the folder or one of its two files is missing.
            ValueError: a file is damaged or truncated, or does not belong to a model of this kind.

        Source: chapter 5.
        """
        config, tensors = _load(Path(folder), torch.device(device))
        with torch.device(
            "meta"
        ):  # shapes only: nothing is drawn or allocated that the file replaces
            model = cls(config)
        _check_tensors(
            Path(folder, WEIGHTS_FILE), expected=model.state_dict(), found=tensors
        )
        # numbers of 16 bits are a way to store weights: parameters and what is computed with them take 32
        tensors = {
            name: w.float() if w.element_size() < 4 else w
            for name, w in tensors.items()
        }
        model.load_state_dict(tensors, assign=True)
        return model


def _check_inputs(cfg: DiffuSSMConfig, x: Tensor, t: Tensor, y: Tensor | None) -> None:
    P, M = cfg.patch_size, cfg.downsample
    if x.ndim != 4 or x.shape[1] != cfg.in_channels:
        raise ValueError(
            f"x has shape {tuple(x.shape)}: expected (B, {cfg.in_channels}, H, W)"
        )
    if not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}: expected a floating-point tensor")
    batch, _, H, W = x.shape
    if H % P or W % P or H * W == 0 or (H // P) * (W // P) % M:
        raise ValueError(
            f"x is {H} x {W}: expected sides that patch_size={P} divides, and a number of positions "
            f"that downsample={M} divides; crop or pad the input"
        )
    if t.shape != (batch,):
        raise ValueError(
            f"t has shape {tuple(t.shape)}: expected ({batch},), one timestep per sample"
        )
    if not cfg.num_classes:
        if y is not None:
            raise ValueError(
                "y was given, but this model is unconditional (num_classes=0); pass y=None"
            )
        return
    if y is None:
        raise ValueError(
            f"y is missing: this model knows {cfg.num_classes} classes; for none of them pass "
            f"torch.full(({batch},), model.null_label)"
        )
    if y.shape != (batch,):
        raise ValueError(
            f"y has shape {tuple(y.shape)}: expected ({batch},), one label per sample"
        )
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise TypeError(f"y has dtype {y.dtype}: expected integer labels")
    # Reading values waits for a GPU and breaks a compiled graph; there the table lookup fails by itself.
    if y.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (int(y.min()), int(y.max())) if batch else (0, 0)
        if low < 0 or high > cfg.num_classes:
            raise ValueError(
                f"y has labels from {low} to {high}: expected 0 to {cfg.num_classes - 1}, "
                f"or {cfg.num_classes} for no class"
            )


@dataclass(frozen=True)
class _Cache:
    """The spectra of all blocks, and what they were made from."""

    length: int
    parameters: list[Tensor]
    spectra: list[Tensor]

    def holds(self, parameters: list[Tensor], length: int) -> bool:
        """Whether they are still right: compared number by number, with a single look at the result."""
        if length != self.length or any(
            p.dtype != old.dtype or p.device != old.device or p.shape != old.shape
            for p, old in zip(parameters, self.parameters, strict=True)
        ):
            return False
        changes = torch._foreach_sub(parameters, self.parameters)
        return bool(
            torch.stack(torch._foreach_norm(changes, float("inf"))).max() == 0
        )  # never for a NaN


def sincos_positions(
    height: int, width: int, d_model: int, device: torch.device | None = None
) -> Tensor:
    """Sines and cosines of the column, then of the row, of every position in raster order: (H W, D) float32.

    Source: chapter 5, equation eq-model-sincos (DiT's table; the paper mentions none).
    """
    quarter = d_model // 4
    omega = 10_000.0 ** (
        -torch.arange(quarter, device=device, dtype=torch.float32) / quarter
    )
    row, column = torch.meshgrid(
        torch.arange(height, device=device),
        torch.arange(width, device=device),
        indexing="ij",
    )
    angles = [
        place.flatten()[:, None] * omega for place in (column, row)
    ]  # (HW, D/4) each
    return torch.cat(
        [f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1
    )


CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


def _save(model: DiffuSSM, folder: Path) -> None:
    text = json.dumps(asdict(model.config), indent=2) + "\n"
    config, weights = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    if (config.exists() and config.read_text() != text) or (
        weights.exists() and not config.exists()
    ):
        raise ValueError(
            f"{folder} holds another model; nothing was written, choose another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
    }
    _write(config, lambda path: path.write_text(text))
    _write(
        weights,
        lambda path: safetensors.torch.save_file(
            tensors, path, metadata={"format": "pt"}
        ),
    )


def apply_umask(path: Path) -> None:
    """Let others read a file as the umask has it; safetensors writes it for its owner alone."""
    probe = path.with_name(f".{path.name}.umask")
    probe.touch()
    path.chmod(probe.stat().st_mode)
    probe.unlink()


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside, flush to the disk, rename: a crash or a full disk leaves the old file or none."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        apply_umask(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _load(
    folder: Path, device: torch.device
) -> tuple[DiffuSSMConfig, dict[str, Tensor]]:
    config, weights = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    for path in (folder, config, weights):
        if not path.exists():
            raise FileNotFoundError(
                f"{path} does not exist; expected a folder written by save_pretrained, "
                f"with {CONFIG_FILE} and {WEIGHTS_FILE}"
            )
    try:
        values = DiffuSSMConfig.from_dict(json.loads(config.read_text()))
    except ValueError as error:  # so are broken JSON and broken UTF-8
        raise ValueError(
            f"{config} is not the configuration of a DiffuSSM: {error}"
        ) from error
    try:
        return values, safetensors.torch.load_file(weights, device=str(device))
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{weights} ({weights.stat().st_size:,} bytes) is damaged or no safetensors file ({error}); "
            "copy or save it again"
        ) from error


def _check_tensors(
    path: Path, expected: dict[str, Tensor], found: dict[str, Tensor]
) -> None:
    faults = [f"{name} is missing" for name in expected if name not in found]
    faults += [
        f"{name} is not part of this model" for name in found if name not in expected
    ]
    faults += [
        f"{name} is {str(found[name].dtype).removeprefix('torch.')} {tuple(found[name].shape)}, expected a "
        f"floating-point {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found
        and (found[name].shape != tensor.shape or not found[name].is_floating_point())
    ]
    if faults:
        more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
        raise ValueError(
            f"{path} holds the weights of another model than its {CONFIG_FILE} describes: "
            f"{'; '.join(faults[:3])}{more}"
        )
