"""Both directions.

Generated from book/13_bidirectional.md by `make export`: edit there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from diffussm.convolution import S4DKernel, later
from diffussm.guards import expect, expect_int, expect_one_of, expect_real

__all__ = [
    "kernel_spectra",
    "convolve_reference",
    "Convolution",
    "WAYS",
    "way",
    "BidirectionalSSM",
    "REFERENCE",
]


def kernel_spectra(k_forward: Tensor, k_backward: Tensor) -> Tensor:
    """What the input's spectrum is multiplied by in each direction.

    Args:
        k_forward, k_backward: Kernels, real (D, L), lag 0 first.

    Returns:
        Half spectra of length 2L, complex (2, D, L + 1), at least in single precision.

    Raises:
        TypeError: a kernel is not a real floating-point tensor.
        ValueError: the kernels are not both (D, L).

    Source: eq-bidirectional-spectrum.
    """
    expect_real(k_forward=k_forward, k_backward=k_backward)
    D, L = expect("k_forward", k_forward, "D L")
    expect("k_backward", k_backward, "D L", D=D, L=expect_int("L", L, least=1))
    dtype = torch.promote_types(k_forward.dtype, k_backward.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    kernels = k_forward.to(dtype), k_backward.to(dtype)
    forward, backward = (torch.fft.rfft(k, n=2 * L) for k in kernels)  # (D, L + 1)
    return torch.stack([forward, backward.conj()])


def convolve_reference(u: Tensor, spectra: Tensor) -> Tensor:
    """What the layer means: real (B, L, D), complex (2, D, L + 1) -> (B, L, 2D).

    Differentiated by autograd. Source: eq-bidirectional-spectrum.
    """
    L, dtype = u.shape[1], spectra.real.dtype
    u_f = torch.fft.rfft(u.transpose(1, 2).to(dtype), n=2 * L)  # (B, D, L + 1)
    y_f = torch.cat([u_f * spectra[0], u_f * spectra[1]], dim=1)  # (B, 2D, L + 1)
    y: Tensor = torch.fft.irfft(y_f, n=2 * L)[..., :L]  # (B, 2D, L)
    return y.transpose(1, 2).to(u.dtype)  # (B, L, 2D)


@dataclass(frozen=True)
class Convolution:
    """A way to run the layer; called, it is applied.

    Attributes:
        apply: (u, prepared) -> y, real (B, L, D) -> (B, L, 2D).
        prepare: (layer, L) -> one tensor, made of the layer's weights only.
        together: Whether `torch.vmap` may map `prepare` over many layers' weights.
    """

    apply: Callable[[Tensor, Tensor], Tensor]
    prepare: Callable[["BidirectionalSSM", int], Tensor]
    together: bool = False

    def __call__(self, u: Tensor, prepared: Tensor) -> Tensor:
        """What `apply` returns."""
        return self.apply(u, prepared)


WAYS = {  # the module and name of each
    "fft": "fft_convolution:FFT",
    "reference": "bidirectional:REFERENCE",
    "chunked": "chunked:CHUNKED",
    "triton": "gpu_kernels:TRITON",
    "chunked_triton": "segments:CHUNKED_TRITON",
}


def way(name: str) -> Convolution:
    """A way to run the layer, by its name in WAYS; another name is refused."""
    return cast(Convolution, later(WAYS[expect_one_of("convolution", name, WAYS)]))


class BidirectionalSSM(nn.Module):
    """Two diagonal state space models, one from each end: (B, L, D) -> (B, L, 2D).

    Args:
        d_model: D, channels.
        d_state: N, real size of each channel's state, even.

    Attributes:
        forward_kernel, backward_kernel: `S4DKernel`, one for each direction.
        skip: (2D,), standard normal at the start, the forward direction first.
        convolution: The way it is run: `way("fft")` unless replaced, by another way or
            by a plain function (u, spectra) -> y.

    Source: section 3.1 of the paper ("concatenating the outputs of two SSM layers").
    """

    def __init__(self, d_model: int, d_state: int = 64) -> None:
        super().__init__()
        self.forward_kernel = S4DKernel(d_model, d_state)
        self.backward_kernel = S4DKernel(d_model, d_state)
        self.skip = nn.Parameter(torch.randn(2 * d_model))
        self.convolution: Callable[[Tensor, Tensor], Tensor] = way("fft")

    def spectra(self, length: int) -> Tensor:
        """The spectra of both kernels with their skips, for sequences of a length L.

        Complex (2, D, L + 1). Source: eq-bidirectional-skip.
        """
        kernels = self.forward_kernel(length), self.backward_kernel(length)
        return kernel_spectra(*kernels) + self.skip.view(
            2, -1, 1
        )  # d at every frequency

    def prepare(self, length: int) -> Tensor:
        """What the layer's way makes of its weights for a length L; else `spectra`."""
        prepare = getattr(self.convolution, "prepare", BidirectionalSSM.spectra)
        prepared: Tensor = prepare(self, length)
        return prepared

    def forward(self, u: Tensor, prepared: Tensor | None = None) -> Tensor:
        """Mix along the sequence.

        Args:
            u: (B, L, D), any L.
            prepared: What `prepare` returns for L, if it is known; None computes it.

        Returns:
            (B, L, 2D) in the dtype of `u`.

        Raises:
            ValueError: `u` is not (B, L, D) with this layer's D.
            TypeError: `u` is not a real floating-point tensor.
        """
        _, L, _ = expect("u", u, "B L D", D=self.skip.shape[0] // 2)
        return self.convolution(u, self.prepare(L) if prepared is None else prepared)


REFERENCE = Convolution(convolve_reference, BidirectionalSSM.spectra)
