"""float32 arithmetic of torch that is the same, to the bit, on x86 CPUs of every kind and maker.

Three things in torch depend on the CPU, though each of them is right to rounding, and training
makes another model of that. Vectors: its kernels sum up in eights with AVX2 and in sixteens with
AVX-512; they are told to take AVX2 everywhere, at no cost that could be measured. Products of
matrices: MKL runs other code on CPUs of AMD than of Intel, without AVX-512 (an AMD EPYC of family
26: 104 GFLOP/s a core); oneDNN (220) asks what a CPU can do and not who made it. It adds the terms
of up to 512 one after another, by fused multiply-add, as does MKL those of attention's short
products; longer sums are cut into such blocks here, but for layers of more than 512 inputs and
mixtures of experts, whose products torch groups by itself. Sines and cosines of rotary positions,
which are MKL's too, are rounded from float64.
"""

import functools
import os
import platform
import sys
import warnings

VECTORS = "ATEN_CPU_CAPABILITY"  # torch reads it when it first computes
BLOCK = 512  # terms of a sum that oneDNN adds one after another, with AVX2 and with AVX-512


def vectors_of_avx2() -> None:
    """Have torch take AVX2 and no AVX-512 in its own kernels; before it computes, on Linux."""
    with open("/proc/cpuinfo") if sys.platform == "linux" else open(os.devnull) as file:
        if " avx2 " in file.read():
            os.environ.setdefault(VECTORS, "avx2")


@functools.cache
def same_on_every_x86():
    """From here on have torch make products, sines and cosines on the CPU in one way everywhere.

    Of float32 alone; other numbers, other CPUs than x86 and builds without oneDNN stay as they are.

    Returns:
        What keeps it so; None where nothing was changed.
    """
    import torch

    by_onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if platform.machine() not in ("x86_64", "AMD64") or by_onednn is None:
        return None
    linear, own = by_onednn.default, torch.library.get_kernel
    names = "mm", "addmm", "addmm_", "cos", "sin"
    mkl = {name: own(f"aten::{name}", "CPU") for name in names}

    def product(a, b):  # [m, k], [k, n]
        rows, columns = a.shape[0], b.shape[1]
        if rows == 1:  # single rows and columns are summed in another order
            a = torch.cat((a, a))
        if columns == 1:
            b = torch.cat((b, b), dim=1)
        if overlaps(b):  # which oneDNN does not take
            b = b.contiguous()
        # Cut where that costs no copy: gradients of weights, and not layers of more inputs.
        size = BLOCK if b.is_contiguous() else len(b)
        parts = zip(a.split(size, dim=1), b.split(size), strict=True)
        sums = (linear(left, right.t(), None, "none", [], "") for left, right in parts)
        whole = functools.reduce(torch.Tensor.add_, sums)
        return whole if whole.shape == (rows, columns) else whole[:rows, :columns].clone()

    def overlaps(b):
        sides = sorted(
            (step, size) for step, size in zip(b.stride(), b.shape, strict=True) if size > 1
        )
        return len(sides) == 2 and 0 < sides[0][0] * sides[0][1] > sides[1][0]

    def fits(a, b):
        known = a.dtype is b.dtype is torch.float32 and a.ndim == b.ndim == 2
        return known and a.shape[1] == b.shape[0] and a.numel() > 0 and b.numel() > 0

    def mm(keys, a, b):
        return product(a, b) if fits(a, b) else mkl["mm"].call_boxed(keys, a, b)

    def addmm(keys, bias, a, b, *, beta=1, alpha=1):
        if fits(a, b) and beta == alpha == 1 and bias.dtype is torch.float32:
            return product(a, b).add_(bias)
        return mkl["addmm"].call_boxed(keys, bias, a, b, beta=beta, alpha=alpha)

    def addmm_(keys, total, a, b, *, beta=1, alpha=1):
        if fits(a, b) and beta == alpha == 1 and total.dtype is torch.float32:
            return total.add_(product(a, b))
        return mkl["addmm_"].call_boxed(keys, total, a, b, beta=beta, alpha=alpha)

    def rounded(name):
        def function(keys, x):
            if x.dtype is torch.float32:
                return getattr(torch, name)(x.double()).float()
            return mkl[name].call_boxed(keys, x)

        return function

    vectors = torch.backends.cpu.get_cpu_capability()
    if os.environ.get(VECTORS) == "avx2" and vectors != "AVX2":
        print(
            f"torch was in use before allo_lib was imported and takes {vectors} vectors: results "
            "will differ by rounding from those of other CPUs; import allo_lib first",
            flush=True,
        )
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings(action="ignore"):  # that operators are overridden
        for name, function in zip(
            names, (mm, addmm, addmm_, rounded("cos"), rounded("sin")), strict=True
        ):
            library.impl(name, function, "CPU", with_keyset=True)
    return library
