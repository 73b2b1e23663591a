"""float32 products by oneDNN: right, the same bits on other CPUs, and torch's own for all else."""

import hashlib
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from allo_lib.machine import arithmetic

pytestmark = pytest.mark.skipif(
    arithmetic.same_on_every_x86() is None, reason="another CPU than x86, or torch without oneDNN"
)
CPUINFO = Path("/proc/cpuinfo")
# Makers of CPUs on which the bits below were seen.
seen_here = pytest.mark.skipif(
    platform.system() != "Linux" or "AuthenticAMD" not in CPUINFO.read_text(),
    reason="these bits were seen on CPUs of AMD alone",
)
sizes, forms = st.sampled_from([0, 1, 2, 7, 64, 210]), st.sampled_from("NT")
terms = sizes | st.just(1304)  # of a sum: more than a block


@settings(max_examples=60, deadline=None)
@given(sizes, terms, sizes, forms, forms, st.integers(0, 9))
def test_float32_products_and_their_gradients_are_right(m, k, n, first, second, seed):
    """Of matrices as they are stored and transposed, without rows or columns, in several blocks."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows, columns, form):
        shape = (rows, columns) if form == "N" else (columns, rows)
        made = torch.randn(shape, generator=generator)
        return (made if form == "N" else made.t()).requires_grad_()

    a, b, bias = matrix(m, k, first), matrix(k, n, second), matrix(1, n, "N")
    weight = torch.randn(m, n, generator=generator)
    exact = [one.detach().double().requires_grad_() for one in (a, b, bias)]
    for multiply in (
        lambda a, b, c: a @ b + 0 * c,
        lambda a, b, c: torch.addmm(c[0], a, b),
        lambda a, b, c: (c + 0 * (a @ b)).addmm_(a, b),
    ):
        results = []
        for inputs in ((a, b, bias), exact):
            product = multiply(*inputs)
            results.append((product, *torch.autograd.grad((product * weight).sum(), inputs)))
        for found, right in zip(*results, strict=True):
            torch.testing.assert_close(found.double(), right, rtol=1e-4, atol=1e-4)


def test_every_form_of_a_product_has_the_same_bits_and_overlapping_operands_are_read():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator) for shape in ((40, 700), (700, 30)))
    bias = torch.randn(40, 30, generator=generator)
    together = torch.addmm(bias, a, b)
    assert torch.equal(together, bias + a @ b) and torch.equal(bias.clone().addmm_(a, b), together)
    windows = torch.randn(40, generator=generator).unfold(0, 30, 1)  # [11, 30], rows overlap
    expected = (a[:, :11].double() @ windows.double()).float()
    torch.testing.assert_close(a[:, :11] @ windows, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.complex64])
def test_other_numbers_are_multiplied_as_before(dtype):
    a, b = (torch.arange(-4, 5).reshape(3, 3).to(dtype) for _ in range(2))
    expected = torch.tensor([[15, 6, -3], [6, 6, 6], [-3, 6, 15]]).to(dtype)
    assert (a @ b).dtype is dtype and torch.equal(a @ b, expected)
    assert torch.equal(torch.addmm(b, a, b, alpha=2), b + 2 * expected)


def test_shapes_and_dtypes_that_do_not_fit_are_torchs_own_errors():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        torch.ones(2, 3) @ torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="must be a matrix"):
        torch.mm(torch.ones(3), torch.ones(3, 2))
    with pytest.raises(RuntimeError, match="dtype"):
        torch.ones(2, 3) @ torch.ones(3, 2, dtype=torch.float64)


def test_sines_and_cosines_are_rounded_from_float64():
    x = torch.linspace(-300, 300, 10_001)
    for function in (torch.sin, torch.cos):
        assert torch.equal(function(x), function(x.double()).float())


# --- the same bits -------------------------------------------------------------------------------


@seen_here
@settings(max_examples=20, deadline=None)
@given(*[st.sampled_from([1, 3, 130])] * 2, st.sampled_from([1, 32, 384, 512, 700, 1304]),
       st.booleans(), st.booleans(), st.sampled_from([1, 2]))  # fmt: skip
def test_terms_of_products_are_added_one_after_another_in_blocks(m, n, k, first, second, threads):
    generator = torch.Generator().manual_seed(k)
    second = second and k <= arithmetic.BLOCK  # weights of wide layers are not cut
    a = torch.randn((k, m) if first else (m, k), generator=generator)
    b = torch.randn((n, k) if second else (k, n), generator=generator)
    a, b = a.t() if first else a, b.t() if second else b
    total = torch.zeros(m, n)
    for start in range(0, k, arithmetic.BLOCK):
        block = torch.zeros(m, n)
        for i in range(start, min(start + arithmetic.BLOCK, k)):
            block = (block.double() + a[:, i : i + 1].double() * b[i : i + 1].double()).float()
        total += block
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    differ = (a @ b != total).float().mean()
    torch.set_num_threads(before)
    assert differ < 1e-4  # float64 rounds a sum twice, fused multiply-add once


def losses_of_training() -> str:
    """The hash of the losses of an SFT run of the miniature's model, 40 steps."""
    from allo_lib import allo
    from allo_lib.engine.models import micro_llama
    from allo_lib.engine.trainer import Schedule

    arithmetic.same_on_every_x86()
    torch.set_num_threads(1)
    sizes = {"width": 128, "layers": 3, "heads": 4, "feed_forward": 384, "context": 256}
    ids = {"seed": 0, "pad_token_id": 0, "eos_token_id": 1}
    model = micro_llama(100, **sizes, initializer_range=0.05, **ids)
    rows = [
        {"prompt": [2 + i % 7, 9, 11], "response": [12 + i * j % 60 for j in range(30)]}
        for i in range(1280)
    ]
    schedule = Schedule(5e-3, 1, 32, seed=1, warmup=0.1)
    log = allo.run_stage(model, rows, "sft", schedule, pad_token_id=0)
    return hashlib.sha256(repr(log.loss).encode()).hexdigest()[:12]


@seen_here
@pytest.mark.parametrize("instructions", ["", "AVX2"])
def test_an_sft_run_has_the_same_losses_with_avx2_and_with_avx512(instructions):
    """To the bit: this number is to be the same on every CPU."""
    code = "import allo_lib, test_arithmetic; print(test_arithmetic.losses_of_training())"
    settings = {"PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
    settings |= {"ONEDNN_MAX_CPU_ISA": instructions} if instructions else {}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    assert done.stdout.split()[-1] == "98f3ec94a5c6", done.stderr


def test_who_uses_torch_first_is_told_that_results_differ():
    code = "import torch; torch.ones(9).softmax(0); from allo_lib.machine import arithmetic as a; "
    code += "a.same_on_every_x86(); print(torch.backends.cpu.get_cpu_capability())"
    plain = {name: value for name, value in os.environ.items() if name != arithmetic.VECTORS}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, env=plain, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("import allo_lib first" in done.stdout) == done.stdout.strip().endswith("AVX512")
