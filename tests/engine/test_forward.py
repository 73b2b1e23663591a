"""Log-probs of responses agree with the plain forward pass, whatever the model and the batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import VOCABULARY, tiny_llama
from torch.nn.attention.flex_attention import flex_attention
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.integrations import flex_attention as flex_integration

from allo_lib.engine import forward
from allo_lib.engine.batching import Layout, collate, no_mask
from allo_lib.engine.forward import layout_of, logps_of_rows, pair_logps, response_logps
from allo_lib.method.losses import token_logps

LAYOUTS = (
    Layout(0),
    Layout(0, shared=True, width=16),
    Layout(0, shared=True, width=16, one_row=True),
    Layout(0, multiple=16),
    Layout(0, shared=True, width=16, multiple=16),
)

SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.3,
    pad_token_id=0,
    eos_token_id=1,
    bos_token_id=2,
)


def make(kind: str):
    torch.manual_seed(0)
    if kind == "tied":
        return tiny_llama(tied=True)
    if kind == "llama":
        return tiny_llama()
    if kind == "grouped queries":
        return LlamaForCausalLM(LlamaConfig(**SIZES))
    if kind == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**SIZES))
    if kind == "gemma2":  # capped logits
        config = Gemma2Config(**SIZES, head_dim=4, final_logit_softcapping=2.0)
        return Gemma2ForCausalLM(config)
    if kind == "cohere":  # scaled logits
        return CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25))
    return GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0))


KINDS = ("llama", "tied", "grouped queries", "qwen2", "gemma2", "cohere", "granite")


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
    return token_logps(model(input_ids=ids).logits, labels)[0, len(row["prompt"]) :]


def gradients(model, loss) -> dict:
    model.zero_grad()
    loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters()}


def assert_same(model, rows, layout, tolerance=1e-5):
    """Values and all gradients of a weighted sum, against one plain forward pass a row."""
    batch = collate(rows, layout)
    ours = response_logps(model, batch)
    assert ours.dtype == torch.float32 and ours.shape == batch["labels"].shape
    weights = torch.rand(ours.shape, generator=torch.Generator().manual_seed(1))
    expected, total = [], 0.0
    for i, row in enumerate(rows):
        values = plainly(model, row)
        n = len(row["response"])
        assert torch.allclose(ours[i, :n], values, atol=tolerance)
        assert not ours[i, n:].any()
        total = total + (values * weights[i, :n]).sum()
    expected = gradients(model, total)
    got = gradients(model, (response_logps(model, batch) * weights).sum())
    for name, value in expected.items():
        scale = value.abs().max().clamp(min=1)
        assert torch.allclose(got[name] / scale, value / scale, atol=tolerance), name


BOTH_WAYS = [
    (kind, layout) for kind in KINDS for layout in LAYOUTS if kind != "gemma2" or not layout.shared
]


@pytest.mark.parametrize("kind, layout", BOTH_WAYS)
def test_equal_to_the_plain_forward_pass_in_value_and_gradient(kind, layout):
    assert_same(make(kind).eval(), families(), layout)


def test_which_models_read_trees():
    """Gemma 2 has sliding windows; all others take a mask for every two tokens."""
    assert [kind for kind in KINDS if not layout_of(make(kind), 0).shared] == ["gemma2"]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 400), st.booleans(), st.booleans())
def test_trees_are_exact_for_random_lengths(seed, count, width, grouped, one_row):
    model = make("grouped queries" if grouped else "tied").eval()
    assert_same(model, families(count, seed), Layout(0, True, width, one_row))


def test_all_trees_share_a_row_on_a_cpu_unless_activations_are_recomputed():
    """Recomputed in backward, attention would no longer be made tree by tree."""
    model = make("llama")
    assert layout_of(model, 0).one_row
    model.gradient_checkpointing_enable()
    layout = layout_of(model.train(), 0)
    assert layout.shared and not layout.one_row
    assert_same(model, families(), layout)


def test_attention_that_is_not_made_tree_by_tree_gives_nan_and_no_wrong_number():
    batch = collate(families(), LAYOUTS[2])
    mask = no_mask(batch["ends"], torch.float32)
    assert (
        mask.shape == (1, 1, *batch["input_ids"].shape[1:] * 2)
        and mask.untyped_storage().nbytes() == 4
    )
    model = make("llama").eval()
    reads = {key: batch[key] for key in ("input_ids", "position_ids")}
    assert model(**reads, attention_mask=mask).logits.isnan().all()


@pytest.fixture
def flex(monkeypatch):
    """FlexAttention as torch has it on a CPU: not compiled, and without a backward pass."""
    monkeypatch.setattr(
        flex_integration.WrappedFlexAttention, "__call__", lambda self: flex_attention
    )
    return "flex_attention"


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")
@pytest.mark.parametrize("kind", ["llama", "grouped queries", "qwen2"])
def test_flex_attention_reads_trees_as_sdpa_does(kind, flex):
    rows = families(4)
    model = make(kind).eval()
    expected = logps_of_rows(model, rows, 0, batch_size=3)
    model = make(kind).eval()
    model.set_attn_implementation(flex)
    assert layout_of(model, 0).shared
    found = logps_of_rows(model, rows, 0, batch_size=3)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_eager_attention_adds_its_mask_and_gets_rows():
    model = make("grouped queries").eval()
    model.set_attn_implementation("eager")
    assert not layout_of(model, 0).shared
    assert_same(model, families(), LAYOUTS[0])


def test_a_model_that_ignores_the_mask_is_found_out_and_gets_rows():
    model = make("llama")
    inner = model.model.forward
    model.model.forward = lambda attention_mask=None, **given: inner(**given)
    assert_same(model.eval(), families(), layout_of(model, 0))  # tree by tree no mask is needed
    model.gradient_checkpointing_enable()
    assert not layout_of(model, 0).shared


def test_a_model_that_ignores_positions_is_found_out_and_gets_rows():
    model = make("llama")
    inner = model.model.forward
    model.model.forward = lambda position_ids=None, **given: inner(**given)
    assert not layout_of(model, 0).shared


@pytest.mark.parametrize("kind", ["gemma2", "cohere", "granite"])
def test_changes_after_the_head_do_change_the_result(kind):
    """The comparison above can tell: without the change the numbers would be others."""
    model, row = make(kind).eval(), rows_of_many_lengths()[0]
    ids = torch.tensor([row["prompt"] + row["response"]])
    labels = ids.clone()
    hidden = model.get_decoder()(input_ids=ids).last_hidden_state
    bare = token_logps(model.get_output_embeddings()(hidden), labels)[0, len(row["prompt"]) :]
    ours = response_logps(model, collate([row], LAYOUTS[0]))[0]
    assert (ours - bare).abs().max() > 0.1


def test_bf16_weights_give_float32_log_probs():
    model = tiny_llama(dtype=torch.bfloat16).eval()
    row = rows_of_many_lengths()[0]
    values = response_logps(model, collate([row], LAYOUTS[0]))
    assert values.dtype == torch.float32
    assert torch.allclose(values[0], plainly(model, row), atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(7)), st.integers(1, 8))
def test_rows_get_the_same_values_in_any_order_and_batch(order, batch_size):
    model, rows = tiny_llama(), rows_of_many_lengths()
    alone = [logps_of_rows(model, [row], 0, 1)[0] for row in rows]
    values = logps_of_rows(model, [rows[i] for i in order], 0, batch_size)
    for i, got in zip(order, values, strict=True):
        assert len(got) == len(rows[i]["response"])
        assert got == pytest.approx(alone[i], abs=1e-5)


def test_rows_leave_further_keys_aside_and_the_model_in_eval_mode():
    model = tiny_llama().train()
    rows = [row | {"reference": [0.0]} for row in rows_of_many_lengths()]
    assert len(logps_of_rows(model, rows, 0, 3)) == len(rows)
    assert not model.training and all(p.grad is None for p in model.parameters())


def test_both_sides_of_pairs_stay_with_their_pair():
    model = tiny_llama()
    rows = rows_of_many_lengths(8)
    pairs = [
        {"prompt": rows[i]["prompt"], "chosen": rows[i]["response"],
         "rejected": rows[i + 1]["response"]}
        for i in range(0, 8, 2)
    ]  # fmt: skip
    for pair, values in zip(pairs, pair_logps(model, pairs, 0, 3), strict=True):
        for side in ("chosen", "rejected"):
            row = {"prompt": pair["prompt"], "response": pair[side]}
            alone = logps_of_rows(model, [row], 0, 1)[0]
            assert values[side] == pytest.approx(alone, abs=1e-5)


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
    st.integers(0, 30), st.integers(1, 40), st.booleans(), st.integers(1, 7), st.integers(0, 999)
)
def test_log_probs_by_chunks_are_log_softmax_and_gather(
    count, vocabulary, has_bias, rows_a_chunk, seed
):
    torch.manual_seed(seed)
    hidden, weight = torch.randn(count, 6), torch.randn(vocabulary, 6)
    bias = torch.randn(vocabulary) if has_bias else None
    targets = torch.randint(vocabulary, (count,))
    gradient = torch.randn(count) * (torch.rand(count) < 0.6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward, "CHUNK_BYTES", 4 * vocabulary * rows_a_chunk)
        values, ours = run(forward.target_logps, (hidden, weight, bias), targets, gradient)
    expected, theirs = run(plain, (hidden, weight, bias), targets, gradient)
    assert torch.allclose(values, expected, atol=1e-5)
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None and other is None) or torch.allclose(one, other, atol=1e-5)


def test_bf16_weights_give_float32_values_and_gradients_in_their_own_dtype():
    torch.manual_seed(0)
    hidden, weight = (torch.randn(9, 8).bfloat16(), torch.randn(50, 8).bfloat16())
    targets = torch.randint(50, (9,))
    values, (by_hidden, by_weight) = run(
        lambda h, w, t: forward.target_logps(h, w, None, t),
        (hidden, weight),
        targets,
        torch.ones(9),
    )
    expected, (like_hidden, like_weight) = run(
        lambda h, w, t: plain(h, w, None, t), (hidden, weight), targets, torch.ones(9)
    )
    assert values.dtype == torch.float32 and torch.allclose(values, expected, atol=1e-5)
    assert by_hidden.dtype == by_weight.dtype == torch.bfloat16
    assert torch.allclose(by_hidden.float(), like_hidden.float(), atol=0.03, rtol=0.03)
    assert torch.allclose(by_weight.float(), like_weight.float(), atol=0.03, rtol=0.03)


def test_positions_without_a_gradient_make_no_logits_again(monkeypatch):
    made = []
    inner = forward._logits
    monkeypatch.setattr(forward, "_logits", lambda h, w, b: made.append(len(h)) or inner(h, w, b))
    hidden = torch.randn(10, 4, requires_grad=True)
    values = forward.target_logps(hidden, torch.randn(7, 4), None, torch.arange(10) % 7)
    values[[2, 5]].sum().backward()
    assert made == [10, 2]
    assert hidden.grad.abs().sum(dim=1).nonzero()[:, 0].tolist() == [2, 5]


def test_no_tensor_of_tokens_times_vocabulary_outlives_a_chunk(monkeypatch):
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
        forward.target_logps(hidden, weight, None, torch.arange(20)).sum().backward()
    assert max(kept) <= weight.numel() and max(c.numel() for c in chunks) <= 3 * 100
