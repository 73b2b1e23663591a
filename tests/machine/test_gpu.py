"""What holds on a GPU, against float64 formulas and the CPU; and that a GPU can do all of it.

Every body runs twice: on CUDA, marked `gpu`, and on the CPU, so that a mistake in a test itself
does not wait for a GPU. What only a GPU has (compiled kernels, its allocator) is left out there.
"""

import contextlib
import json
import math
import warnings

import pytest
import torch
from test_alignment import FAST, LEAN
from test_checkpoints import NEVER, Stop, stopping_at
from test_checkpoints import train as train_with_checkpoints
from test_forward import families, gradients, plainly
from test_notebooks import PROFILE, driver
from test_on_policy import WORD
from test_trainer import pairs
from tiny_models import VOCABULARY, tiny_llama, weights_of
from torch import nn

from allo_lib import align
from allo_lib.allo import run_stage
from allo_lib.data import miniature
from allo_lib.engine import forward, generation, models
from allo_lib.engine.batching import Layout, collate
from allo_lib.engine.encoding import encode_prompt
from allo_lib.engine.forward import layout_of, response_logps, to_device
from allo_lib.engine.on_policy import run_on_policy
from allo_lib.engine.trainer import Checkpoints, Schedule
from allo_lib.errors import Diverged
from allo_lib.machine.environment import device_name
from allo_lib.machine.runtime import make_deterministic
from allo_lib.method import values_unread
from allo_lib.method.losses import ON_PAIRS, ON_REJECTED, ON_SOLUTIONS, objective
from allo_lib.method.masked_adamw import MaskedAdamW, row_forward
from allo_lib.method.neurons import NeuronMask, select_neurons

DTYPES = [torch.float32, torch.bfloat16]
KINDS = ["scalar", "row", "whole"]


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu), "cpu"])
def device(request):
    make_deterministic(request.param)  # as a study does
    yield request.param
    torch.use_deterministic_algorithms(False)


def micro(device: str, dtype=torch.float32, tokenizer=None, **sizes):
    pad, end = (0, 1) if tokenizer is None else (tokenizer.pad_token_id, tokenizer.eos_token_id)
    given = dict(width=64, layers=2, heads=2, feed_forward=96, context=128, initializer_range=0.3)
    vocabulary = VOCABULARY if tokenizer is None else len(tokenizer)
    model = models.micro_llama(
        vocabulary, **given | sizes, seed=3, pad_token_id=pad, eos_token_id=end
    )
    return model.to(device, dtype)


def mask_of(model, kind: str, share: float = 0.1) -> NeuronMask | None:
    if kind == "whole":
        return None
    scores = {name: torch.zeros(p.shape) for name, p in model.named_parameters()}
    return select_neurons(scores, share, order="random", granularity=kind, scope="tensor")


@contextlib.contextmanager
def unsteady():
    """Yields a list that names, afterwards, the operations that torch says it cannot repeat."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield found
    found += sorted({str(w.message) for w in caught if "determinis" in str(w.message)})


def assert_repeated(first: dict, second: dict, operations: list[str]) -> None:
    """Equal to the bit; else torch has named operations, which are told, and they are near."""
    differ = [name for name in first if not torch.equal(first[name], second[name])]
    if differ:
        assert operations, f"{differ} differ, and torch names no operation that may"
        told = "\n".join(operations)
        warnings.warn(f"{len(differ)} of {len(first)} tensors differ:\n{told}", stacklevel=2)
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-2, atol=1e-2)


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
    masters = optimizer.master_weights()["weight"].cpu()
    torch.testing.assert_close(masters.double(), weight, rtol=1e-5, atol=1e-6)
    found = layer.weight.detach().cpu()
    assert torch.equal(found[~kept], start[~kept])
    assert torch.equal(found, torch.where(kept, masters.to(dtype), start))
    assert (masters != start.float())[kept].float().mean() > 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_no_dense_gradient_outlives_a_backward_pass(device, kind):
    model = micro(device, torch.bfloat16, width=256, layers=3, heads=4, feed_forward=1024)
    optimizer = MaskedAdamW(model, mask_of(model, kind))
    batch = to_device(collate(families(), layout_of(model, 0)), model)

    def backward():
        response_logps(model, batch).sum().backward()

    backward()  # what libraries take for themselves at their first use
    optimizer.step()
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    backward()
    after = torch.cuda.memory_allocated() if device == "cuda" else 0
    assert all(parameter.grad is None for parameter in model.parameters())
    packed = sum(p.master.grad.nbytes for p in optimizer._packed if p.master.grad is not None)
    assert 0 < packed and after - before <= packed + 2**19  # all dense ones: 6 MB
    optimizer.close()


# --- forward and backward ------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
def test_both_forwards_are_the_plain_one_of_the_cpu(device, shared):
    rows = families(4)
    plain, model = micro("cpu").eval(), micro(device).eval()
    layout = layout_of(model, 0)
    assert layout.shared
    batch = to_device(collate(rows, layout if shared else Layout(0)), model)
    weights = torch.rand(batch["labels"].shape, generator=torch.Generator().manual_seed(1))
    values = [plainly(plain, row) for row in rows]
    found = response_logps(model, batch)
    for i, value in enumerate(values):
        torch.testing.assert_close(found[i, : len(value)].cpu(), value, rtol=1e-4, atol=1e-4)
        assert not found[i, len(value) :].any()
    total = sum((v * weights[i, : len(v)]).sum() for i, v in enumerate(values))
    expected = gradients(plain, total)
    for name, value in gradients(model, (found * weights.to(device)).sum()).items():
        scale = expected[name].abs().max().clamp(min=1)
        torch.testing.assert_close(
            value.cpu() / scale, expected[name] / scale, rtol=0, atol=1e-4, msg=name
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_of_rows_is_the_product_in_float64(device, dtype):
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(48, 40).to(device, dtype)
    rows = torch.tensor([0, 3, 17, 39], device=device)
    masters = nn.Parameter(layer.weight.detach()[rows].flatten().float())
    layer.weight.requires_grad_(False)
    layer.forward = lambda x: row_forward(layer, rows, masters, x)
    x, y = (torch.randn(3, 7, n, generator=generator).to(device, dtype) for n in (48, 40))
    x.requires_grad_()
    layer(x).backward(y)
    x64, y64 = x.detach().cpu().double().flatten(0, 1), y.cpu().double().flatten(0, 1)
    within = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 0.1}
    found = masters.grad.cpu().double().view(4, 48)
    torch.testing.assert_close(found, (y64.T @ x64)[rows.cpu()], **within)
    to_x = (y64 @ layer.weight.detach().cpu().double()).view(3, 7, 48)
    torch.testing.assert_close(x.grad.cpu().double(), to_x, **within)
    torch.testing.assert_close(layer.bias.grad.cpu().double(), y64.sum(dim=0), **within)
    assert layer.weight.grad is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_head_in_chunks_is_log_softmax_in_float64(device, dtype, monkeypatch):
    count, vocabulary, width = 50, 211, 32
    monkeypatch.setattr(forward, "CHUNK_BYTES", 4 * vocabulary * 7)
    generator = torch.Generator().manual_seed(0)
    parts = [
        (torch.randn(*shape, generator=generator) * scale).to(device, dtype).requires_grad_()
        for shape, scale in (((count, width), 1), ((vocabulary, width), 0.3), ((vocabulary,), 0.3))
    ]
    targets = torch.randint(vocabulary, (count,), generator=generator)
    gradient = torch.randn(count, generator=generator) * (torch.arange(count) % 3 > 0)
    found = forward.target_logps(*parts, targets.to(device))
    found.backward(gradient.to(device))
    doubles = [part.detach().cpu().double().requires_grad_() for part in parts]
    expected = nn.functional.linear(*doubles).log_softmax(dim=-1).gather(1, targets[:, None])[:, 0]
    expected.backward(gradient.double())
    within = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 0.1}
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.detach().cpu().double(), expected.detach(), **within)
    for ours, double in zip(parts, doubles, strict=True):
        torch.testing.assert_close(ours.grad.cpu().double(), double.grad, **within)
    hidden, weight, bias = (double.detach() for double in doubles)
    if dtype == torch.float32:
        likeliest = nn.functional.linear(hidden, weight, bias).argmax(dim=-1)
        assert torch.equal(forward.argmax_tokens(*(p.detach() for p in parts)).cpu(), likeliest)


@contextlib.contextmanager
def nothing_to_wait_for(device):
    """A block in which an operation that makes the host wait for its GPU is an error."""
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["sft", "dpo", "ipo", "bco", "forgetting", "learning"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_step_waits_for_the_device(device, kind, name):
    model = micro(device, torch.bfloat16)
    optimizer = MaskedAdamW(model, mask_of(model, kind), max_grad_norm=1.0)
    optimizer.watch = True
    rows = [row | {"reference": [-1.0] * len(row["response"])} for row in families()]
    rows = [row | {"weights": [1.0] * len(row["response"])} for row in rows]
    batch = to_device(collate(rows, layout_of(model, 0)), model)
    loss_of, steps = objective(name, beta=0.1, key_share=0.3), []
    for wait in (contextlib.nullcontext(), nothing_to_wait_for(device)):
        with wait, values_unread():  # at its first use a library may set itself up
            logps = response_logps(model, batch)
            loss, told = loss_of(logps, batch)
            optimizer.guard(loss)
            loss.backward()
            optimizer.step()
        steps.append([loss, optimizer.grad_norm, optimizer.moved, *told.values()])
    assert all(math.isfinite(number.item()) for step in steps for number in step)
    assert steps[1][2] > 0
    optimizer.close()


# --- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ON_PAIRS, *ON_REJECTED, *ON_SOLUTIONS])
def test_every_objective_loses_what_it_loses_on_the_cpu(device, name):
    rows = pairs(tiny_llama())
    for row in rows:
        row |= {f"{s}_weights": [1.0] * len(row[s]) for s in ("chosen", "rejected")}
    if name in ON_SOLUTIONS:
        rows = [{"prompt": row["prompt"], "response": row["chosen"]} for row in rows]
    found = []
    for place in ("cpu", device):
        model = tiny_llama().to(place)
        settings = dict(pad_token_id=0, mask=mask_of(model, "scalar"), key_share=0.3)
        found.append(run_stage(model, rows, name, Schedule(1e-3, 2, 3, 0), **settings).loss)
    assert found[1] == pytest.approx(found[0], rel=1e-3, abs=1e-5) and len(found[1]) == 6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_training_goes_on_to_the_same_bits(device, kind, dtype, tmp_path):
    granularity = None if kind == "whole" else kind
    whole, broken, again = (tiny_llama(dtype=dtype).to(device) for _ in range(3))
    with unsteady() as operations:
        log = train_with_checkpoints(whole, tmp_path / "whole", NEVER, granularity=granularity)
        with pytest.raises(Stop):
            train_with_checkpoints(
                broken, tmp_path / "broken", stop=stopping_at(3), granularity=granularity
            )
        torch.manual_seed(99)  # whatever another process did before
        resumed = train_with_checkpoints(again, tmp_path / "broken", NEVER, granularity=granularity)
    assert_repeated(weights_of(whole), weights_of(again), operations)
    assert resumed.loss == pytest.approx(log.loss, rel=1e-2) and resumed.tokens == log.tokens
    assert all(value.device.type == device for value in weights_of(again).values())


@pytest.mark.parametrize("where", ["log-probs", "gradient norm"])
def test_nan_stops_a_training_before_weights_change(device, where, tmp_path):
    model = tiny_llama().to(device)
    mask, before = mask_of(model, "scalar"), weights_of(model)
    if where == "log-probs":
        model.model.norm.register_forward_hook(lambda module, given, found: found * math.nan)
    else:
        weight = model.model.layers[0].mlp.up_proj.weight
        weight.register_hook(lambda gradient: gradient * math.nan)
    rows, schedule = pairs(tiny_llama()), Schedule(1e-2, 1, 4, 0)
    checkpoints = Checkpoints(tmp_path, NEVER)
    with pytest.raises(Diverged, match=f"the {where} became nan at step 0") as told:
        run_stage(model, rows, "dpo", schedule, pad_token_id=0, mask=mask, checkpoints=checkpoints)
    assert all(torch.equal(value, before[name]) for name, value in weights_of(model).items())
    assert told.value.batch.is_file()


@pytest.mark.parametrize("kind, name", [("scalar", "ppo"), ("row", "a2c")])
def test_a_training_on_its_own_samples_moves_kept_entries_only(device, kind, name):
    tokenizer = miniature.tokenizer()
    model = micro(device, torch.bfloat16, tokenizer)
    before, mask = weights_of(model), mask_of(model, kind)
    log = run_on_policy(
        model,
        tokenizer,
        [problem.prompt for problem in miniature.problems("chain", "pairs", 8, 0)],
        lambda number, response: float(WORD in response.text.split()),
        name,
        Schedule(1e-2, 1, 4, 5),
        max_new_tokens=12,
        generation_batch=8,
        mask=mask,
    )
    assert len(log.loss) == 2 and all(math.isfinite(value) for value in log.loss)
    moved = 0
    for key, value in weights_of(model).items():
        kept = mask.dense(key).to(device)
        assert torch.equal(value[~kept], before[key][~kept]), key
        moved += int((value[kept] != before[key][kept]).sum())
    assert moved > mask.kept / 2


# --- decoding ------------------------------------------------------------------------------------


STEPS = 12


def by_hand(model, prompt: list[int], end: int) -> list[int]:
    """The likeliest token after the whole row, one at a time; no cache, no padding, no batch."""
    new: list[int] = []
    while len(new) < STEPS and end not in new:
        with torch.no_grad():
            ids = torch.tensor([prompt + new], device=model.device)
            new.append(int(model(input_ids=ids).logits[0, -1].argmax()))
    return new


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_way_of_decoding_is_the_argmax_at_every_step(device, attention):
    """Of so many responses that those left over go on as a smaller batch."""
    tokenizer = miniature.tokenizer()
    model = micro(device, tokenizer=tokenizer, initializer_range=0.6).eval()
    model.set_attn_implementation(attention)
    end, problems = tokenizer.eos_token_id, miniature.problems("chain", "pairs", 60, 0)
    prompts = [problem.prompt for problem in problems] + ["?", "calc 1 ?"]
    encoded = [encode_prompt(tokenizer, text) for text in prompts]
    expected = [by_hand(model, prompt, end) for prompt in encoded]
    ended = [end in ids for ids in expected]
    assert len(set(map(tuple, expected))) > 20 and 0 < sum(ended) < len(ended)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in expected]
    drafts = [ids[: i % 7] + [9] * (i % 3) for i, ids in enumerate(expected)]
    for given in ({}, {"drafts": drafts}):
        groups = generation.generate(
            model, tokenizer, prompts, max_new_tokens=STEPS, batch_size=48, **given
        )
        assert [one.text for (one,) in groups] == texts
        assert [one.ended for (one,) in groups] == ended


def test_samples_follow_from_the_seed(device):
    tokenizer = miniature.tokenizer()
    model = micro(device, torch.bfloat16, tokenizer)

    def draw(seed):
        return generation.generate(
            model, tokenizer, ["calc 1 ?", "?"], max_new_tokens=STEPS, batch_size=8, samples=4,
            temperature=1.0, seed=seed,
        )  # fmt: skip

    first = draw(1)
    assert [len(group) for group in first] == [4, 4]
    assert draw(1) == first != draw(2)


# --- from end to end -----------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, LEAN], ids=["delta", "gradient"])
def test_align_of_a_bf16_model(device, settings, tmp_path):
    tokenizer = miniature.tokenizer()
    model = micro(device, torch.bfloat16, tokenizer, initializer_range=0.05)
    before = weights_of(model)
    rows = [
        {"prompt": p.prompt, "chosen": "therefore 1", "rejected": f"so {2 + i % 5}"}
        for i, p in enumerate(miniature.problems("chain", "pairs", 12, 0))
    ]
    result = align(model, tokenizer, rows, config=FAST | settings, output_dir=tmp_path)
    assert set(result.logs) == {"importance", "rewriter", "forgetting", "learning"}
    assert all(math.isfinite(loss) for log in result.logs.values() for loss in log.loss)
    assert result.mask.kept == round(0.1 * result.mask.total)
    moved = 0
    for name, value in weights_of(model).items():
        kept = result.mask.dense(name).to(device)
        assert value.device.type == device
        assert torch.equal(value[~kept], before[name][~kept]), name
        moved += int((value[kept] != before[name][kept]).sum())
    assert moved > 0.5 * result.mask.kept


@pytest.mark.gpu
def test_the_study_of_seconds_on_a_gpu(tmp_path):
    """All but 07, which on a GPU also trains models of 7B and 13B: a window has it as a phase."""
    only = ("--only", "00,01,02,03,04,05,06")
    done = driver(PROFILE, "-p", "size", "gpu", *only, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    check_study(tmp_path / "out", "cuda")


def check_study(folder, device: str) -> None:
    """That results are those of a device, and as their manifest says; test_gpu_window asks so of a
    CPU."""
    told = json.loads((folder / "manifest.json").read_text())
    assert told["size"] == {"cuda": "gpu", "cpu": "cpu"}[device]
    assert told["device"] == (device_name(device) if device == "cuda" else "cpu")
    assert list(told["cells"]["seed0"]) == [device_name(device)]
    checked = driver("verify", PROFILE, "--out", folder)
    assert checked.returncode == 0, checked.stderr
