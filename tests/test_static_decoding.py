"""Decoding by `transformers` with a static cache writes what our own loop writes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import VOCABULARY, tiny_llama

from allo_lib import generation, miniature, models, static_decoding

PAD, END = 0, 1
token = st.integers(2, VOCABULARY - 1)


@pytest.fixture(scope="module")
def model():
    return tiny_llama(seed=2).eval()


def by_hand(model, prompt: list[int], steps: int) -> list[int]:
    """The likeliest token after the whole row, one at a time; no cache, no padding, no batch."""
    new: list[int] = []
    while len(new) < steps and END not in new:
        with torch.no_grad():
            new.append(int(model(input_ids=torch.tensor([prompt + new])).logits[0, -1].argmax()))
    return new


def decode(model, prompts, **given):
    settings = {"pad": PAD, "end": END, "max_new_tokens": 6, "rows": 3} | given
    return static_decoding.decode(model, prompts, **settings)


@settings(max_examples=25, deadline=None)
@given(
    prompts=st.lists(st.lists(token, min_size=1, max_size=8), min_size=1, max_size=7),
    rows=st.integers(1, 4),
    limit=st.integers(1, 8),
)
def test_greedy_responses_are_those_of_a_step_by_step_argmax(model, prompts, rows, limit):
    found = decode(model, prompts, rows=rows, max_new_tokens=limit)
    assert found == [[by_hand(model, prompt, limit)] for prompt in prompts]


def test_some_responses_end_and_some_do_not(model):
    prompts = [[i] for i in range(2, VOCABULARY)]
    ended = [END in ids for (ids,) in decode(model, prompts, max_new_tokens=8)]
    assert 0 < sum(ended) < len(ended)


def test_samples_follow_from_the_seed_and_leave_torchs_generator_alone(model):
    prompts = [[5, 6], [7], [8, 9, 10]]
    torch.manual_seed(4)
    state = torch.get_rng_state()
    first = decode(model, prompts, samples=4, temperature=1.0, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert decode(model, prompts, samples=4, temperature=1.0, seed=1) == first
    assert decode(model, prompts, samples=4, temperature=1.0, seed=2) != first
    assert [len(group) for group in first] == [4, 4, 4]


def test_samples_are_drawn_with_the_models_own_odds(model):
    """The chi-square statistic of the first token against the softmax, whatever the model's own
    generation settings say of top-k and penalties."""
    model.generation_config.update(top_k=3, repetition_penalty=5.0, top_p=0.5)
    prompt, count, temperature = [5, 9], 4000, 1.7
    (group,) = decode(
        model, [prompt], rows=1, samples=count, temperature=temperature, max_new_tokens=1
    )
    seen = torch.bincount(torch.tensor([ids[0] for ids in group]), minlength=VOCABULARY).double()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt])).logits[0, -1].double()
    expected = torch.softmax(logits / temperature, dim=-1) * count
    statistic = float(((seen - expected) ** 2 / expected).sum())
    assert statistic < 70  # 32 degrees of freedom: above this in 1 of 10,000 runs


def test_generation_takes_it_where_steps_can_be_compiled(monkeypatch):
    tokenizer = miniature.tokenizer()
    model = models.micro_llama(
        len(tokenizer), width=16, layers=2, heads=2, feed_forward=24, context=128,
        initializer_range=0.6, seed=3, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    prompts = ["calc 1 ?", "largest first 3 second 4 ?", "?"]
    given = {"max_new_tokens": 12, "batch_size": 4}
    own = generation.generate(model, tokenizer, prompts, **given)
    monkeypatch.setattr(generation, "_takes_compiled_steps", lambda model: True)
    calls = []
    decode = static_decoding.decode
    monkeypatch.setattr(
        static_decoding, "decode", lambda *a, **k: calls.append(k["rows"]) or decode(*a, **k)
    )
    assert generation.generate(model, tokenizer, prompts, **given) == own
    sampled = generation.generate(
        model, tokenizer, prompts, samples=2, temperature=1.0, seed=0, **given
    )
    assert calls == [4, 2] and [len(group) for group in sampled] == [2, 2, 2]
