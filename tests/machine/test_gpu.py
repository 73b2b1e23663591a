"""What holds on a GPU, against float64 formulas and the CPU; and that a GPU can do all of it.

Every body runs twice: on CUDA, marked `gpu`, and on the CPU, so that a mistake in a test itself
does not wait for a GPU. What only a GPU has (compiled kernels, its allocator) is left out there.
"""

import contextlib
import json
import math
import subprocess
import sys
import warnings

import pytest
import torch
from conftest import ROOT
from test_trainer import Stop, pairs, solutions, supervise
from tiny_models import masters_of, micro, moved, tiny_llama, weights_of, words
from tiny_study import PROFILE
from torch import nn

from allo_lib import align
from allo_lib.allo import run_stage
from allo_lib.data import miniature
from allo_lib.engine import generation
from allo_lib.engine.batching import Layout, collate
from allo_lib.engine.encoding import encode_prompt
from allo_lib.engine.forward import layout_of, response_logps, to_device
from allo_lib.engine.trainer import Schedule
from allo_lib.errors import Diverged
from allo_lib.machine.environment import device_name
from allo_lib.machine.runtime import make_deterministic
from allo_lib.method.losses import ON_PAIRS, ON_REJECTED, ON_SOLUTIONS
from allo_lib.method.masked_adamw import MaskedAdamW
from allo_lib.method.neurons import NeuronMask, select_neurons

DTYPES = [torch.float32, torch.bfloat16]
KINDS = ["scalar", "row", "whole"]


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu), "cpu"])
def device(request):
    make_deterministic(request.param)  # as a study does
    yield request.param
    torch.use_deterministic_algorithms(False)


def model_on(device: str, dtype=torch.float32, tokenizer=None, **sizes):
    given = dict(width=64, feed_forward=96, initializer_range=0.3, seed=3) | sizes
    return micro(tokenizer or words(), **given).to(device, dtype)


def mask_of(model, kind: str, share: float = 0.1) -> NeuronMask | None:
    if kind == "whole":
        return None
    scores = {name: torch.zeros(p.shape) for name, p in model.named_parameters()}
    return select_neurons(scores, share, order="random", granularity=kind, scope="tensor")


# --- the optimizer -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_masked_adamw_is_adamw_in_float64(device, kind, dtype):
    """Of a linear layer with whole numbers in and out, of which bf16 loses nothing."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(40, 24, bias=False).to(device, dtype)
    mask = mask_of(layer, kind, 0.25)
    kept = torch.ones(24, 40, dtype=torch.bool) if mask is None else mask.dense("weight")
    lr, betas, eps, decay, most = 1e-3, (0.9, 0.99), 1e-6, 0.1, 30.0
    optimizer = MaskedAdamW(
        layer, mask, lr=lr, betas=betas, eps=eps, weight_decay=decay, max_grad_norm=most
    )
    start = layer.weight.detach().cpu().clone()
    weight = start.double()
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for step in range(1, 6):
        x, y = (
            torch.randint(-3, 4, (2, 5, n), generator=generator).to(device, dtype) for n in (40, 24)
        )
        (layer(x) * y).sum().backward()
        optimizer.step()
        gradient = torch.einsum("bto,bti->oi", y.cpu().double(), x.cpu().double()) * kept
        gradient *= min(1.0, most / float(gradient.norm()))
        first = betas[0] * first + (1 - betas[0]) * gradient
        second = betas[1] * second + (1 - betas[1]) * gradient**2
        update = (first / (1 - betas[0] ** step)) / (
            (second / (1 - betas[1] ** step)).sqrt() + eps
        ) + decay * weight
        weight = weight - lr * update * kept
    masters = masters_of(layer, optimizer)["weight"].cpu()
    torch.testing.assert_close(masters.double(), weight, rtol=1e-5, atol=1e-6)
    found = layer.weight.detach().cpu()
    assert torch.equal(found[~kept], start[~kept])
    assert torch.equal(found, torch.where(kept, masters.to(dtype), start))
    assert (masters != start.float())[kept].float().mean() > 0.9


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_no_dense_gradient_outlives_a_backward_pass(kind):
    model = model_on("cuda", torch.bfloat16, width=256, layers=3, heads=4, feed_forward=1024)
    optimizer = MaskedAdamW(model, mask_of(model, kind))
    batch = to_device(collate(solutions(), layout_of(model, 0)), model)
    for _ in range(2):  # the first time libraries take memory for themselves
        before = torch.cuda.memory_allocated()
        response_logps(model, batch).sum().backward()
        after = torch.cuda.memory_allocated()
        packed = sum(master.grad.nbytes for master in optimizer.param_groups[0]["params"])
        optimizer.step()
    assert 0 < packed and after - before <= packed + 2**19  # all dense ones: 6 MB
    optimizer.close()


# --- forward and backward ------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
def test_both_forwards_are_the_plain_one_of_the_cpu(device, shared):
    rows = solutions(6)  # some share a prompt, and some the first words of their responses
    rows += [row | {"response": row["response"][:1] + [9, 8]} for row in rows]
    plain, model = model_on("cpu").eval(), model_on(device).eval()
    layout = layout_of(model, 0)
    assert layout.shared
    batch = to_device(collate(rows, layout if shared else Layout(0)), model)
    weights = torch.rand(batch["labels"].shape, generator=torch.Generator().manual_seed(1))
    found = response_logps(model, batch)
    total = 0.0
    for i, row in enumerate(rows):
        logits = plain(input_ids=torch.tensor([row["prompt"] + row["response"]])).logits[0]
        logps = logits[len(row["prompt"]) - 1 : -1].log_softmax(dim=-1)
        value = logps.gather(1, torch.tensor(row["response"])[:, None])[:, 0]
        torch.testing.assert_close(found[i, : len(value)].cpu(), value, rtol=1e-4, atol=1e-4)
        assert not found[i, len(value) :].any()
        total = total + (value * weights[i, : len(value)]).sum()
    assert found.requires_grad
    total.backward()
    (found * weights.to(device)).sum().backward()
    for (name, ours), value in zip(model.named_parameters(), plain.parameters(), strict=True):
        scale = value.grad.abs().max().clamp(min=1)
        torch.testing.assert_close(
            ours.grad.cpu() / scale, value.grad / scale, rtol=0, atol=1e-4, msg=name
        )


# --- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ON_PAIRS, *ON_REJECTED, *ON_SOLUTIONS])
def test_every_objective_loses_what_it_loses_on_the_cpu(device, name):
    rows = pairs(tiny_llama())
    for row in rows:
        for side in ("chosen", "rejected"):
            row[f"{side}_weights"] = [1.0] * len(row[side])
            # Apart from the policy: where both are one, rounding chooses the key tokens.
            values = enumerate(row[f"{side}_reference"])
            row[f"{side}_reference"] = [value + 0.1 * (3 * i % 7) for i, value in values]
    if name in ON_SOLUTIONS:
        rows = [{"prompt": row["prompt"], "response": row["chosen"]} for row in rows]
    found = []
    for place in ("cpu", device):
        model = tiny_llama().to(place)
        settings = dict(pad_token_id=0, mask=mask_of(model, "scalar"), key_share=0.3)
        found.append(run_stage(model, rows, name, Schedule(1e-3, 2, 3, 0), **settings).loss)
    assert found[1] == pytest.approx(found[0], rel=1e-3, abs=1e-5) and len(found[1]) == 6


@contextlib.contextmanager
def unsteady():
    """Yields a list that names, afterwards, the operations that torch says it cannot repeat."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield found
    found += sorted({str(w.message) for w in caught if "determinis" in str(w.message)})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_training_goes_on_to_the_same_bits(device, kind, dtype, tmp_path):
    """Or torch has named operations that it cannot repeat, and the bits are near."""
    kind = None if kind == "whole" else kind
    whole, broken, again = (tiny_llama(dtype=dtype).to(device) for _ in range(3))
    with unsteady() as operations:
        log = supervise(whole, tmp_path / "whole", kind=kind)
        with pytest.raises(Stop):
            supervise(broken, tmp_path, 1e-9, stop=3, kind=kind)
        torch.manual_seed(99)  # whatever another process did before
        resumed = supervise(again, tmp_path, kind=kind)
    ends = weights_of(whole), weights_of(again)
    assert operations or all(map(torch.equal, *(end.values() for end in ends)))
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=1e-2, atol=1e-2)
        assert value.device.type == device
    assert resumed.loss == pytest.approx(log.loss, rel=1e-2)


def test_a_gradient_that_is_not_finite_changes_no_weight(device):
    model = tiny_llama().to(device)
    mask, before = mask_of(model, "scalar"), weights_of(model)
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(Diverged, match="the gradient norm became nan at step 0"):
        run_stage(model, solutions(), "sft", Schedule(1e-2, 1, 4, 0), pad_token_id=0, mask=mask)
    assert all(torch.equal(value, before[name]) for name, value in weights_of(model).items())


# --- decoding ------------------------------------------------------------------------------------


STEPS = 12


def by_hand(model, prompt: list[int], end: int) -> list[int]:
    """The argmax after the whole row, one token at a time; no cache, no padding, no batch."""
    new: list[int] = []
    while len(new) < STEPS and end not in new:
        with torch.no_grad():
            ids = torch.tensor([prompt + new], device=model.device)
            new.append(int(model(input_ids=ids).logits[0, -1].argmax()))
    return new


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_greedy_decoding_is_the_argmax_at_every_step(device, attention):
    """Of so many responses that those left over go on as a smaller batch."""
    tokenizer = miniature.tokenizer()
    model = model_on(device, tokenizer=tokenizer, initializer_range=0.6).eval()
    model.set_attn_implementation(attention)
    end, problems = tokenizer.eos_token_id, miniature.problems("chain", "pairs", 60, 0)
    prompts = [problem.prompt for problem in problems] + ["?", "calc 1 ?"]
    expected = [by_hand(model, encode_prompt(tokenizer, text), end) for text in prompts]
    ended = [end in ids for ids in expected]
    assert len(set(map(tuple, expected))) > 20 and 0 < sum(ended) < len(ended)
    groups = generation.generate(model, tokenizer, prompts, max_new_tokens=STEPS, batch_size=48)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in expected]
    assert [one.text for (one,) in groups] == texts
    assert [one.ended for (one,) in groups] == ended


def test_samples_follow_from_the_seed(device):
    tokenizer = miniature.tokenizer()
    model = model_on(device, torch.bfloat16, tokenizer)

    def draw(seed):
        return generation.generate(
            model, tokenizer, ["calc 1 ?", "?"], max_new_tokens=STEPS, batch_size=8, samples=4,
            temperature=1.0, seed=seed,
        )  # fmt: skip

    first = draw(1)
    assert [len(group) for group in first] == [4, 4]
    assert draw(1) == first != draw(2)


# --- from end to end -----------------------------------------------------------------------------


def test_align_of_a_bf16_model(device, tmp_path):
    tokenizer = miniature.tokenizer()
    model = model_on(device, torch.bfloat16, tokenizer, initializer_range=0.05)
    before = weights_of(model)
    rows = [
        {"prompt": p.prompt, "chosen": "therefore 1", "rejected": f"so {2 + i % 5}"}
        for i, p in enumerate(miniature.problems("chain", "pairs", 12, 0))
    ]
    rates = {"importance_rate": 1e-3, "forgetting_rate": 1e-2, "learning_rate": 1e-2}
    result = align(model, tokenizer, rows, config=rates | {"batch_size": 4}, output_dir=tmp_path)
    assert set(result.logs) == {"importance", "rewriter", "forgetting", "learning"}
    assert all(math.isfinite(loss) for log in result.logs.values() for loss in log.loss)
    after = weights_of(model)
    assert {value.device.type for value in after.values()} == {device}
    assert moved(before, after, result.mask) > 0.5 * result.mask.kept


@pytest.mark.gpu
def test_the_study_of_seconds_on_a_gpu(tmp_path):
    """All but 07, which on a GPU also trains models of 7B and 13B."""
    out = tmp_path / "out"

    def command(*arguments):
        line = [sys.executable, "-P", "-m", "allo_lib.cli.cli", *map(str, arguments), "--out", out]
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]

    command(PROFILE, "-p", "size", "gpu", "--only", "00,01,02,03,04,05,06")
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["size"] == "gpu" and manifest["device"] == device_name("cuda")
    assert list(manifest["cells"]["seed0"]) == [device_name("cuda")]
    command("verify", PROFILE)
