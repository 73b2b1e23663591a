"""Steps that are replayed write what the loop with a growing cache writes.

On a CPU the steps are made one by one; tests/test_gpu.py records them as a CUDA graph.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from allo_lib.data import miniature
from allo_lib.engine import generation, models, static_decoding
from allo_lib.machine.runtime import plain_writes

WORDS = ("calc", "largest", "first", "second", "1", "3", "4", "12", "?")
prompts_of_words = st.lists(
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=8).map(" ".join), min_size=1, max_size=9
)


@pytest.fixture(scope="module")
def tokenizer():
    return miniature.tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    """Ends some responses early, some late and some not at all."""
    return models.micro_llama(
        len(tokenizer), width=16, layers=2, heads=2, feed_forward=24, context=128,
        initializer_range=0.6, seed=3, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    ).eval()  # fmt: skip


def both(monkeypatch_context, model, tokenizer, prompts, **given):
    """Responses with a growing cache, and with replayed steps."""
    given = {"max_new_tokens": 12, "batch_size": 4} | given
    grown = generation.generate(model, tokenizer, prompts, **given)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "_replays_steps", lambda model: True)
        if monkeypatch_context:
            patch.setattr(static_decoding, *monkeypatch_context)
        return grown, generation.generate(model, tokenizer, prompts, **given)


@settings(max_examples=30, deadline=None)
@given(prompts_of_words, st.integers(1, 9), st.integers(1, 20), st.sampled_from([0, 2, 32]))
def test_greedy_responses_are_the_same(model, tokenizer, prompts, rows, limit, small):
    grown, replayed = both(("_SMALL", small), model, tokenizer, prompts,
                           batch_size=rows, max_new_tokens=limit)  # fmt: skip
    assert grown == replayed


def test_some_responses_end_and_some_do_not(model, tokenizer):
    _, replayed = both(None, model, tokenizer, [f"{word} {n}" for word in WORDS for n in "134"])
    assert 0 < sum(one.ended for (one,) in replayed) < len(replayed)


@settings(max_examples=15, deadline=None)
@given(prompts_of_words, st.integers(1, 3), st.integers(0, 99))
def test_samples_are_the_same_draw_by_draw(model, tokenizer, prompts, samples, seed):
    grown, replayed = both(None, model, tokenizer, prompts, samples=samples, temperature=1.3,
                           seed=seed)  # fmt: skip
    assert grown == replayed


@settings(max_examples=15, deadline=None)
@given(prompts_of_words, st.integers(0, 14), st.booleans())
def test_drafts_change_nothing(model, tokenizer, prompts, length, right):
    """Right drafts are kept whole, wrong ones leave holes in the cache."""
    plain = generation.generate(model, tokenizer, prompts, max_new_tokens=12, batch_size=4)
    drafts = [tokenizer.encode(one.text)[:length] if right else [5] * length for (one,) in plain]
    grown, replayed = both(None, model, tokenizer, prompts, drafts=drafts)
    assert plain == grown == replayed


def test_a_row_never_reads_beyond_its_last_token(model, tokenizer, monkeypatch):
    """Positions of ended rows stand still: a model with as many as prompt and limit is enough."""
    seen = []
    real = generation._Decoding.read

    def read(self, ids, positions):
        seen.append(int(positions.max()))
        return real(self, ids, positions)

    monkeypatch.setattr(generation._Decoding, "read", read)
    both(None, model, tokenizer, ["calc 1 ?", "?"], max_new_tokens=9)
    assert max(seen) < len(tokenizer.encode("calc 1 ?")) + 9


def test_torch_goes_on_with_the_algorithms_it_had():
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with plain_writes():
            assert not torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
