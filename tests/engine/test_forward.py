"""Log-probs of responses agree with the plain forward pass, whatever the model and the batch."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import VOCABULARY, tiny_llama, weights_of
from transformers import AutoConfig, AutoModelForCausalLM

from allo_lib.allo import collator_of
from allo_lib.engine import forward
from allo_lib.engine.batching import Layout, collate, no_mask
from allo_lib.engine.forward import (
    implicit_margins,
    layout_of,
    logps_of_rows,
    pair_logps,
    response_logps,
)
from allo_lib.method.losses import objective, token_logps
from allo_lib.method.masked_adamw import MaskedAdamW
from allo_lib.method.neurons import select_neurons

ROWS, TREES, ONE_ROW = Layout(0), Layout(0, shared=True), Layout(0, shared=True, one_row=True)
SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    initializer_range=0.3, pad_token_id=0, eos_token_id=1, bos_token_id=2,
)  # fmt: skip
KINDS = {
    "grouped queries": dict(model_type="llama"),
    "tied": dict(model_type="llama", tie_word_embeddings=True),
    "gemma2": dict(head_dim=4, final_logit_softcapping=2.0),  # capped logits, sliding windows
}


def make(kind: str):
    torch.manual_seed(0)
    settings = SIZES | {"model_type": kind} | KINDS[kind]
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    return AutoModelForCausalLM.from_config(config).eval()


def rows_of_many_lengths(count: int = 7, seed: int = 0) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)

    def draw(most):
        length = int(torch.randint(1, most, (), generator=generator))
        return torch.randint(2, VOCABULARY, (length,), generator=generator).tolist()

    return [{"prompt": draw(9), "response": draw(12)} for _ in range(count)]


def families(count: int = 3, seed: int = 0) -> list[dict]:
    """Rows of which several share a prompt, and some the first words of their responses."""
    rows = []
    drawn = rows_of_many_lengths(2 * count, seed)
    for one, other in zip(drawn[::2], drawn[1::2], strict=True):
        longer = one["response"][:2] + other["response"]
        rows += [one, {"prompt": one["prompt"], "response": longer}]
    return rows


def plainly(model, row: dict) -> torch.Tensor:
    """The log-probs of one response by a forward pass of its own."""
    ids = torch.tensor([row["prompt"] + row["response"]])
    labels = ids.clone()
    labels[:, : len(row["prompt"])] = -100
    logits = model(input_ids=ids, use_cache=False).logits
    return token_logps(logits, labels)[0, len(row["prompt"]) :]


def gradients(model, loss) -> dict:
    model.zero_grad()
    loss.backward()
    grads = {name: value.grad for name, value in model.named_parameters()}
    return {name: value.clone() for name, value in grads.items() if value is not None}


def assert_same(model, rows, layout, tolerance=1e-5):
    """Values and all gradients of a weighted sum, against one plain forward pass a row."""
    batch = collate(rows, layout)
    ours = response_logps(model, batch)
    assert ours.dtype == torch.float32 and ours.shape == batch["labels"].shape
    weights = torch.rand(ours.shape, generator=torch.Generator().manual_seed(1))
    total = 0.0
    for i, row in enumerate(rows):
        values, n = plainly(model, row), len(row["response"])
        assert torch.allclose(ours[i, :n], values, atol=tolerance)
        assert not ours[i, n:].any()
        total = total + (values * weights[i, :n]).sum()
    expected = gradients(model, total)
    got = gradients(model, (response_logps(model, batch) * weights).sum())
    for name, value in expected.items():
        scale = value.abs().max().clamp(min=1)
        assert torch.allclose(got[name] / scale, value / scale, atol=tolerance), name


@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_the_plain_forward_pass_in_value_and_gradient(kind):
    model = make(kind)
    assert layout_of(model, 0).shared == (kind != "gemma2")
    for layout in (ROWS,) if kind == "gemma2" else (ROWS, TREES, ONE_ROW):
        assert_same(model, families(), layout)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5), st.booleans(), st.booleans())
def test_trees_are_exact_for_random_lengths(seed, count, grouped, one_row):
    model = make("grouped queries" if grouped else "tied")
    assert_same(model, families(count, seed), Layout(0, True, one_row))


@pytest.mark.parametrize("key", ["logits_soft_cap", "lm_head_multiplier", "logit_scale"])
def test_logits_that_a_config_says_are_altered_are_never_a_product_of_the_head(key):
    """By too little to be seen while they are small, as those of an untrained model are."""
    model = make("tied")
    assert forward._way(model, layout_of(model, 0)).matrix
    altered = make("tied")
    setattr(altered.config, key, 30.0)
    assert not forward._way(altered, layout_of(altered, 0)).matrix
    assert forward.takes_drafts(model) and forward.takes_drafts(altered)


def test_all_trees_share_a_row_on_a_cpu_unless_activations_are_recomputed():
    """Recomputed in backward, attention would no longer be made tree by tree."""
    model = make("tied")
    assert layout_of(model, 0).one_row
    model.gradient_checkpointing_enable()
    layout = layout_of(model.train(), 0)
    assert layout.shared and not layout.one_row
    assert_same(model, families(), layout)


def test_attention_that_is_not_made_tree_by_tree_gives_nan_and_no_wrong_number():
    batch = collate(families(), ONE_ROW)
    mask = no_mask(batch["ends"], torch.float32)
    reads = {key: batch[key] for key in ("input_ids", "position_ids")}
    assert make("tied")(**reads, attention_mask=mask).logits.isnan().all()


@pytest.mark.parametrize("ignored", ["attention_mask", "position_ids"])
def test_a_model_that_ignores_what_trees_need_is_found_out_and_gets_rows(ignored):
    model = make("tied")
    inner = model.model.forward
    model.model.forward = lambda **given: inner(**{k: v for k, v in given.items() if k != ignored})
    if ignored == "attention_mask":  # tree by tree no mask is needed
        assert layout_of(model, 0).one_row
        model.gradient_checkpointing_enable()
    assert not layout_of(model, 0).shared
    assert_same(model, families(), layout_of(model, 0))


def test_in_16_bits_rounding_hides_neither_a_good_model_nor_a_bad_one():
    # Of ids that this one would never write, log-probs lie 4% apart by the rounding of bfloat16.
    torch.manual_seed(92)
    sizes = dict(vocab_size=40, num_hidden_layers=8, initializer_range=1.0)
    config = AutoConfig.for_model("llama", **SIZES | sizes)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    assert layout_of(model, 0).one_row
    bad = make("tied").to(torch.bfloat16)
    inner = bad.model.forward
    bad.model.forward = lambda **given: inner(**given | {"position_ids": None})
    assert not layout_of(bad, 0).shared


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(7)), st.integers(1, 8))
def test_rows_get_the_same_values_in_any_order_and_batch(order, batch_size):
    model = tiny_llama().train()
    rows = [row | {"reference": [0.0]} for row in rows_of_many_lengths()]
    values = logps_of_rows(model, [rows[i] for i in order], 0, batch_size)
    assert not model.training and all(p.grad is None for p in model.parameters())
    for i, got in zip(order, values, strict=True):
        assert got == pytest.approx(plainly(model, rows[i]).tolist(), abs=1e-5)


def test_both_sides_of_pairs_stay_with_their_pair_and_margins_are_theirs():
    model, rows = tiny_llama(), rows_of_many_lengths(8)
    pairs = [
        {"prompt": one["prompt"], "chosen": one["response"], "rejected": other["response"]}
        for one, other in zip(rows[::2], rows[1::2], strict=True)
    ]
    for pair, values in zip(pairs, pair_logps(model, pairs, 0, 3), strict=True):
        for side in ("chosen", "rejected"):
            row = {"prompt": pair["prompt"], "response": pair[side]}
            assert values[side] == pytest.approx(plainly(model, row).tolist(), abs=1e-5)
    policy = [{"chosen": [-1.0, -2.0], "rejected": [-5.0]}]
    rows = [{"chosen_reference": [-2.0, -2.5], "rejected_reference": [-4.0]}]
    assert implicit_margins(policy, rows, 0.1) == [pytest.approx(0.1 * (1.5 + 1.0))]


# --- the head on chunks of positions ---


def plain(hidden, weight, bias, targets):
    logits = torch.nn.functional.linear(hidden, weight, bias).float()
    return torch.log_softmax(logits, dim=-1).gather(1, targets[:, None])[:, 0]


def run(function, parts, targets, gradient):
    leaves = [None if part is None else part.clone().requires_grad_() for part in parts]
    values = function(*leaves, targets)
    values.backward(gradient)
    return values.detach(), [None if leaf is None else leaf.grad for leaf in leaves]


@settings(deadline=None)
@given(
    st.integers(0, 30), st.integers(1, 40), st.booleans(), st.integers(1, 7), st.integers(0, 999),
    st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_log_probs_by_chunks_are_log_softmax_and_gather(
    count, vocabulary, has_bias, rows_a_chunk, seed, dtype
):
    """Values in float32, gradients in the dtype of the weights."""
    torch.manual_seed(seed)
    hidden, weight = torch.randn(count, 6).to(dtype), torch.randn(vocabulary, 6).to(dtype)
    bias = torch.randn(vocabulary).to(dtype) if has_bias else None
    targets = torch.randint(vocabulary, (count,))
    gradient = torch.randn(count) * (torch.rand(count) < 0.6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward, "CHUNK_BYTES", 4 * vocabulary * rows_a_chunk)
        values, ours = run(forward._TargetLogps.apply, (hidden, weight, bias), targets, gradient)
        best = forward.argmax_tokens(hidden, weight, bias)
    expected, theirs = run(plain, (hidden, weight, bias), targets, gradient)
    logits = torch.nn.functional.linear(hidden, weight, bias).float()
    assert torch.equal(best, logits.argmax(dim=-1))
    assert values.dtype == torch.float32
    assert torch.allclose(values, expected, atol=1e-5)
    near = 1e-5 if dtype == torch.float32 else 0.1
    for one, other in zip(ours, theirs, strict=True):
        if other is not None:
            assert one.dtype == dtype
            assert torch.allclose(one.float(), other.float(), atol=near, rtol=near)


def test_a_sum_of_many_chunks_is_as_exact_as_one_of_all(monkeypatch):
    """In 16 bits the head's gradient would lose a tenth of itself in a thousand of roundings."""
    torch.manual_seed(0)
    hidden, weight = (torch.randn(4000, 8) + 0.5).bfloat16(), torch.randn(20, 8).bfloat16()
    targets, gradient = torch.randint(20, (4000,)), -torch.ones(4000)
    _, exact = run(plain, (hidden.double(), weight.double(), None), targets, gradient)
    for rows in (4000, 250, 4):
        monkeypatch.setattr(forward, "CHUNK_BYTES", 4 * 20 * rows)
        _, ours = run(forward._TargetLogps.apply, (hidden, weight, None), targets, gradient)
        assert (ours[1].double() - exact[1]).norm() < 0.006 * exact[1].norm(), rows


def test_logits_live_for_a_chunk_and_are_made_again_where_there_is_a_gradient(monkeypatch):
    """Counted over everything autograd keeps for backward."""
    monkeypatch.setattr(forward, "CHUNK_BYTES", 4 * 100 * 3)
    kept, chunks = [], []
    inner = forward._logits
    monkeypatch.setattr(forward, "_logits", lambda *a: chunks.append(inner(*a)) or chunks[-1])
    hidden = torch.randn(20, 4, requires_grad=True)
    weight = torch.randn(100, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        values = forward._TargetLogps.apply(hidden, weight, None, torch.arange(20))
    assert max(kept) <= weight.numel() and max(c.numel() for c in chunks) <= 3 * 100
    chunks.clear()
    values[[2, 5]].sum().backward()
    assert [len(chunk) for chunk in chunks] == [2]
    assert hidden.grad.abs().sum(dim=1).nonzero()[:, 0].tolist() == [2, 5]


# --- all shortcuts together ----------------------------------------------------------------------

# Against two padded forward passes, whole logits, and dense gradients of which the kept entries
# are taken.
BETA, KEY_SHARE = 0.1, 0.4


def plain_ratio(model, row: dict, side: str) -> torch.Tensor:
    logps = plainly(model, {"prompt": row["prompt"], "response": row[side]})
    return logps - torch.tensor(row[f"{side}_reference"])


def plain_dpo(model, rows) -> torch.Tensor:
    """arXiv 2305.18290 equation 7, a mean over pairs."""
    margins = [
        plain_ratio(model, row, "chosen").sum() - plain_ratio(model, row, "rejected").sum()
        for row in rows
    ]
    return -F.logsigmoid(BETA * torch.stack(margins)).mean()


def plain_forgetting(model, rows) -> torch.Tensor:
    """Token-level NPO (arXiv 2404.05868) on rejected responses, over the number of weights."""
    weights = torch.cat([torch.tensor(row["rejected_weights"]) for row in rows])
    ratios = torch.cat([plain_ratio(model, row, "rejected") for row in rows])
    total = (weights * F.logsigmoid(-BETA * ratios)).sum()
    return -(2 / BETA) * total / max(1, int((weights != 0).sum()))


def plain_learning(model, rows) -> torch.Tensor:
    """DPO whose rejected log-ratio is summed over the key tokens, the lowest ones, alone."""
    margins = []
    for row in rows:
        rejected = plain_ratio(model, row, "rejected")
        count = max(1, round(KEY_SHARE * len(rejected)))
        lowest = sorted(range(len(rejected)), key=lambda i: (rejected[i].item(), i))[:count]
        margins.append(plain_ratio(model, row, "chosen").sum() - rejected[lowest].sum())
    return -F.logsigmoid(BETA * torch.stack(margins)).mean()


PLAIN = {"dpo": plain_dpo, "forgetting": plain_forgetting, "learning": plain_learning}


def encoded(parts, seed: int) -> list[dict]:
    """Pairs with reference log-probs, and weights of which about half are zero."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for prompt, chosen, rejected in parts:
        row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        for side in ("chosen", "rejected"):
            drawn = torch.rand(2, len(row[side]), generator=generator)
            row[f"{side}_reference"] = (-5 * drawn[0]).tolist()
            row[f"{side}_weights"] = (drawn[1] - 0.5).clamp_min(0).tolist()
        rows.append(row)
    return rows


tokens = st.lists(st.integers(2, VOCABULARY - 1), min_size=1, max_size=9)
pair = st.tuples(tokens, tokens, tokens).filter(lambda parts: parts[1] != parts[2])


@pytest.mark.parametrize("kind", ["tied", "grouped queries"])
@pytest.mark.parametrize("granularity", ["scalar", "row"])
@pytest.mark.parametrize("name", PLAIN)
@settings(deadline=None, max_examples=12)
@given(parts=st.lists(pair, min_size=1, max_size=4), seed=st.integers(0, 99))
def test_loss_and_every_packed_gradient_are_those_of_the_plain_way(
    name, kind, granularity, parts, seed
):
    rows = encoded(parts, seed)
    plain, ours = make(kind), make(kind)
    expected = PLAIN[name](plain, rows)
    expected.backward()

    mask = select_neurons(weights_of(ours), 0.2, order="random", granularity=granularity, seed=seed)
    optimizer = MaskedAdamW(ours, mask, lr=1e-3)
    batch = collator_of(name, layout_of(ours, 0))(rows)
    assert "ends" in batch  # else nothing is shared, and nothing shown
    loss = objective(name, beta=BETA, key_share=KEY_SHARE)(response_logps(ours, batch), batch)[0]
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    gradients = {name: p.grad.flatten() for name, p in plain.named_parameters()}
    for packed in optimizer._packed:
        kept = gradients[packed.name][mask.indices[packed.name]]
        found = packed.master.grad
        found = torch.zeros_like(kept) if found is None else found
        assert torch.allclose(found, kept, atol=1e-5), packed.name
    assert all(p.grad is None for p in ours.parameters())
