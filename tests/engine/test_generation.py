"""Greedy decoding is the argmax at every step; sampling is seeded; padding changes nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import micro, tiny_llama
from transformers import AutoConfig, AutoModelForCausalLM

from allo_lib.data import miniature
from allo_lib.engine import generation
from allo_lib.engine.encoding import encode_prompt
from allo_lib.engine.generation import Response, generate

PROMPTS = ["calc 1 ?", "largest first 3 second 4 ?", "?", "story ann 1 bob 2 ask bob ?", "calc 1 ?"]


@pytest.fixture(scope="module")
def tokenizer():
    return miniature.tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    """Wide initial weights: its responses differ."""
    return micro(tokenizer, feed_forward=24, initializer_range=0.6, seed=3)


@pytest.fixture(scope="module")
def by_hand(model, tokenizer):
    """prompt -> 14 tokens or up to the end, by the whole row through the model for every one; no
    cache, no padding, no batch."""
    found = {}
    for prompt in PROMPTS:
        ids, new = encode_prompt(tokenizer, prompt), []
        while len(new) < 14 and tokenizer.eos_token_id not in new:
            with torch.no_grad():
                new.append(int(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax()))
        found[prompt] = new
    return found


def response(tokenizer, ids: list[int]) -> Response:
    return Response(tokenizer.decode(ids, skip_special_tokens=True), tokenizer.eos_token_id in ids)


def greedy(model, tokenizer, prompts, batch_size=64, steps=12, **more):
    groups = generate(
        model, tokenizer, prompts, max_new_tokens=steps, batch_size=batch_size, **more
    )
    return [only for (only,) in groups]


def test_greedy_is_the_argmax_at_every_step_in_any_batch(model, tokenizer, by_hand, monkeypatch):
    expected = [response(tokenizer, by_hand[prompt][:12]) for prompt in PROMPTS]
    assert len({one.text for one in expected}) > 2
    for batch_size in (1, 2, 3, 64):
        assert greedy(model, tokenizer, PROMPTS, batch_size) == expected
        assert greedy(model, tokenizer, PROMPTS[::-1], batch_size) == expected[::-1]
    held, inner = [], generation._left_padded
    monkeypatch.setattr(generation, "_TOKENS", 1)
    monkeypatch.setattr(
        generation, "_left_padded", lambda rows, *more: held.append(len(rows)) or inner(rows, *more)
    )
    assert greedy(model, tokenizer, PROMPTS) == expected
    assert held == [3, 2]  # of 64 tokens: 12 new ones each, and prompts of 1, 3, 3, 6 and 8


# --- drafts ---


@settings(max_examples=30, deadline=None)
@given(data=st.data(), batch_size=st.integers(1, 5), limit=st.integers(1, 14))
def test_drafts_never_change_a_response(model, tokenizer, by_hand, data, batch_size, limit):
    """Right ones, ones that go astray somewhere, too short or too long ones, and nonsense."""
    drafts = []
    for prompt in PROMPTS:
        right = by_hand[prompt]
        kept = right[: data.draw(st.integers(0, len(right)), label="kept")]
        words = st.integers(0, len(tokenizer) - 1)
        drafts.append(kept + data.draw(st.lists(words, max_size=6), label="added"))
    found = greedy(model, tokenizer, PROMPTS, batch_size, limit, drafts=drafts)
    assert found == [response(tokenizer, by_hand[prompt][:limit]) for prompt in PROMPTS]


def test_right_drafts_cost_one_pass_and_wrong_ones_what_is_left(
    model, tokenizer, by_hand, monkeypatch
):
    read = []
    decoder, inner = model.get_decoder(), model.get_decoder().forward

    def watch(input_ids=None, **more):
        read.append(input_ids.shape[1])
        return inner(input_ids=input_ids, **more)

    monkeypatch.setattr(decoder, "forward", watch)
    right = by_hand[PROMPTS[0]][:12]
    monkeypatch.setattr(model, "get_decoder", lambda: decoder)
    for draft, left in ((right, 0), (right[:-3], 2), ([], len(right) - 1)):
        read.clear()
        greedy(model, tokenizer, PROMPTS[:1], drafts=[draft])
        assert read == [3 + len(draft), *[1] * left]


@pytest.mark.parametrize(("kind", "settings"), [
    ("qwen3", {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 8}),
    ("mistral", {"sliding_window": 8}),  # no list of its layers' kinds
    # A cache of all tokens, of which attention takes the last eight.
    ("gpt_neo", {"attention_types": [[["local"], 2]], "window_size": 8, "num_layers": 2}),
    ("mpt", {"d_model": 16, "n_heads": 2, "n_layers": 2}),  # takes no positions
])  # fmt: skip
def test_models_that_see_more_than_tokens_and_positions_do_without_drafts(
    tokenizer, kind, settings
):
    """As in a sliding window, from which a draft's wrong tokens would push right ones."""
    sizes = dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, num_heads=2, initializer_range=0.6,
    )  # fmt: skip
    known = AutoConfig.for_model(kind).to_dict()
    config = AutoConfig.for_model(
        kind, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **{key: size for key, size in sizes.items() if key in known} | settings,
    )  # fmt: skip
    torch.manual_seed(1)
    windowed = AutoModelForCausalLM.from_config(config).eval()
    plain = greedy(windowed, tokenizer, PROMPTS)
    wrong = [[(i + 5 * j) % len(tokenizer) for j in range(9)] for i in range(len(PROMPTS))]
    assert greedy(windowed, tokenizer, PROMPTS, drafts=wrong) == plain


# --- what a response is ---


def with_logits(tokenizer, change):
    """A model whose logits, [rows, tokens, V], are what `change(logits, step)` makes of zeros."""

    class Fixed(type(tiny_llama())):
        steps = 0

        def forward(self, input_ids=None, attention_mask=None, **kwargs):
            result = super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
            result.logits = change(torch.zeros_like(result.logits), self.steps)
            self.steps += 1
            return result

    config = tiny_llama().config
    config.vocab_size = len(tokenizer)
    return Fixed(config).eval()


@pytest.mark.parametrize("steps, ended", [(0, True), (2, True), (3, False)])
def test_a_response_that_was_cut_off_is_told(tokenizer, steps, ended):
    so, end = tokenizer.convert_tokens_to_ids("so"), tokenizer.eos_token_id

    def change(logits, step):
        logits[:, -1, end if step >= steps else so] = 5.0
        return logits

    (only,) = greedy(with_logits(tokenizer, change), tokenizer, ["calc 1 ?"], steps=3)
    assert only == Response(" ".join(["so"] * steps), ended)


def test_prompts_are_read_once_and_ended_rows_leave(tokenizer):
    """Counted in tokens that go through the model."""
    so, end, read = tokenizer.convert_tokens_to_ids("so"), tokenizer.eos_token_id, []

    def change(logits, step):
        read.append(tuple(logits.shape[:1]))
        logits[:, -1, end if step == 3 else so] = 50.0
        if step == 1:  # the first response ends here, the others later
            logits[0, -1, so], logits[0, -1, end] = 0.0, 50.0
        return logits

    (group,) = generate(with_logits(tokenizer, change), tokenizer, ["calc 1 ?"], max_new_tokens=9,
                        batch_size=4, samples=4, temperature=1.0)  # fmt: skip
    assert [one.text for one in group] == ["so", *["so so so"] * 3]
    assert read == [(1,), (4,), (3,), (3,)] and all(one.ended for one in group)


# --- samples ---


def sampled(model, tokenizer, seed, samples=4, temperature=1.0, batch_size=8):
    return generate(
        model, tokenizer, PROMPTS, max_new_tokens=6, batch_size=batch_size, samples=samples,
        temperature=temperature, seed=seed,
    )  # fmt: skip


def test_samples_follow_from_the_seed_and_their_own_number_alone(model, tokenizer):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = sampled(model, tokenizer, 1)
    greedy(model, tokenizer, PROMPTS)
    assert torch.equal(torch.rand(3), expected)  # of the global generator
    for batch_size in (1, 8, 16):
        assert sampled(model, tokenizer, 1, batch_size=batch_size) == first
    assert first != sampled(model, tokenizer, 2)
    assert [len(group) for group in first] == [4] * len(PROMPTS)
    assert len({one.text for group in first for one in group}) > len(PROMPTS)


def test_samples_stay_with_their_prompt(model, tokenizer, by_hand):
    """Nearly cold sampling is greedy, so each group must hold its own prompt's response."""
    for batch_size in (1, 8, 64):
        groups = sampled(model, tokenizer, 0, samples=3, temperature=1e-4, batch_size=batch_size)
        for prompt, group in zip(PROMPTS, groups, strict=True):
            assert group == [response(tokenizer, by_hand[prompt][:6])] * 3


def test_sampling_draws_from_the_whole_softmax_at_its_temperature(tokenizer):
    def change(logits, step):
        logits[:] = -1e4
        logits[:, :, 5], logits[:, :, 6] = 2.0, 0.0
        return logits

    (group,) = generate(
        with_logits(tokenizer, change), tokenizer, ["?"], max_new_tokens=1, batch_size=4000,
        samples=4000, temperature=2.0,
    )  # fmt: skip
    texts = [one.text for one in group]
    share = texts.count(tokenizer.decode([5])) / 4000
    assert share == pytest.approx(1 / (1 + torch.tensor(-1.0).exp().item()), abs=0.03)
    assert set(texts) == {tokenizer.decode([5]), tokenizer.decode([6])}
