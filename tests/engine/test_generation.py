"""Greedy decoding is the argmax at every step; sampling is seeded; padding changes nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_llama

from allo_lib.data import miniature
from allo_lib.data.tasks import Question
from allo_lib.engine import generation, models
from allo_lib.engine.encoding import encode_prompt
from allo_lib.engine.forward import implicit_margins
from allo_lib.engine.generation import Response, answer, generate
from allo_lib.errors import AlloError
from allo_lib.machine.runtime import plain_writes

PROMPTS = ["calc 1 ?", "largest first 3 second 4 ?", "?", "story ann 1 bob 2 ask bob ?", "calc 1 ?"]


@pytest.fixture(scope="module")
def tokenizer():
    return miniature.tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    """Wide initial weights: its responses differ; some end early, some late, some not at all."""
    return models.micro_llama(
        len(tokenizer), width=16, layers=2, heads=2, feed_forward=24, context=128,
        initializer_range=0.6, seed=3, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip


def by_hand(model, tokenizer, prompt: str, steps: int) -> Response:
    """The whole row through the model for every token; no cache, no padding, no batch."""
    ids, new = encode_prompt(tokenizer, prompt), []
    for _ in range(steps):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + new])).logits[0, -1]
        new.append(int(logits.argmax()))
        if new[-1] == tokenizer.eos_token_id:
            return Response(tokenizer.decode(new[:-1], skip_special_tokens=True), True)
    return Response(tokenizer.decode(new, skip_special_tokens=True), False)


def greedy(model, tokenizer, prompts, batch_size=64, steps=12):
    groups = generate(model, tokenizer, prompts, max_new_tokens=steps, batch_size=batch_size)
    assert all(len(group) == 1 for group in groups)
    return [group[0] for group in groups]


def test_greedy_equals_a_step_by_step_argmax(model, tokenizer):
    expected = [by_hand(model, tokenizer, prompt, 12) for prompt in PROMPTS]
    assert len({one.text for one in expected}) > 2
    assert greedy(model, tokenizer, PROMPTS) == expected


def test_left_padding_and_batches_do_not_change_greedy_responses(model, tokenizer):
    together = greedy(model, tokenizer, PROMPTS)
    assert greedy(model, tokenizer, PROMPTS, batch_size=1) == together
    assert greedy(model, tokenizer, PROMPTS, batch_size=2) == together
    assert greedy(model, tokenizer, PROMPTS[::-1], batch_size=3) == together[::-1]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, 90), min_size=1, max_size=30), st.integers(1, 8), st.integers(1, 200)
)
def test_a_batch_holds_so_many_rows_and_so_many_tokens(widths, rows, room):
    order = sorted(range(len(widths)), key=lambda i: (widths[i], i))
    batches = generation._batches(order, widths, rows, room)
    assert [i for batch in batches for i in batch] == order
    for batch, following in zip(batches, [*batches[1:], []], strict=True):
        size = len(batch)
        assert 1 <= size <= rows
        assert size == 1 or size * max(widths[i] for i in batch) <= room
        assert not following or size == rows or (size + 1) * widths[following[0]] > room


def test_long_prompts_share_batches_of_fewer_rows(model, tokenizer, monkeypatch):
    whole, held = greedy(model, tokenizer, PROMPTS), []
    inner = generation._left_padded
    monkeypatch.setattr(generation, "_TOKENS", 1)
    monkeypatch.setattr(
        generation,
        "_left_padded",
        lambda rows, *given: held.append(len(rows)) or inner(rows, *given),
    )
    assert greedy(model, tokenizer, PROMPTS) == whole
    assert held == [3, 2]  # of 64 tokens: 12 new ones each, and prompts of 1, 3, 3, 6 and 8


def token_ids(model, tokenizer, prompt: str, steps: int) -> list[int]:
    """`by_hand` as token ids, its end token included."""
    one = by_hand(model, tokenizer, prompt, steps)
    return encode_prompt(tokenizer, one.text) + [tokenizer.eos_token_id] * one.ended


@settings(max_examples=60, deadline=None)
@given(data=st.data(), batch_size=st.integers(1, 5), limit=st.integers(1, 14))
def test_drafts_never_change_a_response(model, tokenizer, data, batch_size, limit):
    """Right ones, ones that go astray somewhere, too short or too long ones, and nonsense."""
    drafts = []
    for prompt in PROMPTS:
        right = token_ids(model, tokenizer, prompt, 14)
        kept = right[: data.draw(st.integers(0, len(right)), label="kept")]
        words = st.integers(0, len(tokenizer) - 1)
        drafts.append(kept + data.draw(st.lists(words, max_size=6), label="added"))
    groups = generate(
        model, tokenizer, PROMPTS, max_new_tokens=limit, batch_size=batch_size, drafts=drafts
    )
    assert [one for (one,) in groups] == [by_hand(model, tokenizer, p, limit) for p in PROMPTS]


def test_right_drafts_cost_one_pass_and_wrong_ones_what_is_left(model, tokenizer, monkeypatch):
    read = []
    decoder, inner = model.get_decoder(), model.get_decoder().forward

    def watch(input_ids=None, **given):
        read.append(input_ids.shape[1])
        return inner(input_ids=input_ids, **given)

    monkeypatch.setattr(decoder, "forward", watch)
    prompt = PROMPTS[0]
    right = token_ids(model, tokenizer, prompt, 12)
    width = len(encode_prompt(tokenizer, prompt))
    monkeypatch.setattr(model, "get_decoder", lambda: decoder)
    for draft, left in ((right, 0), (right[:-3], 2), ([], len(right) - 1)):
        read.clear()
        generate(model, tokenizer, [prompt], max_new_tokens=12, batch_size=1, drafts=[draft])
        assert read == [width + len(draft), *[1] * left]


def test_drafts_are_left_aside_where_layers_have_windows(monkeypatch):
    model = tiny_llama()
    assert generation._sees_all(model)
    windows = ["full_attention", "sliding_attention"]
    monkeypatch.setattr(model.config, "layer_types", windows, raising=False)
    assert not generation._sees_all(model)


def ending_after(steps: int, tokenizer):
    """A model of fixed logits that says "so" and then ends, to know what should come out."""

    class Fixed(type(tiny_llama())):
        def forward(self, input_ids=None, attention_mask=None, **kwargs):
            result = super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
            said = (self.seen.setdefault("n", 0)) >= steps
            token = tokenizer.eos_token_id if said else tokenizer.convert_tokens_to_ids("so")
            self.seen["n"] += 1
            result.logits = torch.zeros_like(result.logits)
            result.logits[:, -1, token] = 5.0
            return result

    config = tiny_llama().config
    config.vocab_size = len(tokenizer)
    config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    made = Fixed(config).eval()
    made.seen = {}
    return made


@pytest.mark.parametrize("steps, ended", [(0, True), (2, True), (3, False)])
def test_a_response_that_was_cut_off_is_told(tokenizer, steps, ended):
    (only,) = greedy(ending_after(steps, tokenizer), tokenizer, ["calc 1 ?"], steps=3)
    assert only == Response(" ".join(["so"] * steps), ended)


def sampled(model, tokenizer, seed, samples=4, temperature=1.0, batch_size=8):
    return generate(
        model, tokenizer, PROMPTS, max_new_tokens=6, batch_size=batch_size, samples=samples,
        temperature=temperature, seed=seed,
    )  # fmt: skip


def test_sampling_is_seeded_and_varied(model, tokenizer):
    first = sampled(model, tokenizer, 1)
    assert first == sampled(model, tokenizer, 1)
    assert first != sampled(model, tokenizer, 2)
    assert [len(group) for group in first] == [4] * len(PROMPTS)
    assert len({one.text for group in first for one in group}) > len(PROMPTS)


def test_the_global_generator_is_left_as_it_was(model, tokenizer):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    sampled(model, tokenizer, 1)
    greedy(model, tokenizer, PROMPTS)
    assert torch.equal(torch.rand(3), expected)


def test_samples_stay_with_their_prompt(model, tokenizer):
    """Nearly cold sampling is greedy, so each group must hold its own prompt's response."""
    for batch_size in (1, 8, 64):
        groups = sampled(model, tokenizer, 0, samples=3, temperature=1e-4, batch_size=batch_size)
        for prompt, group in zip(PROMPTS, groups, strict=True):
            assert group == [by_hand(model, tokenizer, prompt, 6)] * 3


def test_a_sample_does_not_depend_on_its_batch(model, tokenizer):
    together = sampled(model, tokenizer, 1)
    for batch_size in (1, 8, 16):
        assert sampled(model, tokenizer, 1, batch_size=batch_size) == together


def test_prompts_are_read_once_and_ended_rows_leave(tokenizer):
    """Counted in tokens that go through the model."""
    model = ending_after(2, tokenizer)
    read = []
    inner = model.forward

    def watch(input_ids=None, **given):
        read.append(tuple(input_ids.shape))
        result = inner(input_ids=input_ids, **given)
        if len(read) == 2:  # the first response ends here, the others later
            result.logits[1:] = 0.0
            result.logits[1:, -1, tokenizer.convert_tokens_to_ids("so")] = 5.0
            model.seen["n"] = 1
        return result

    model.forward = watch
    model.seen["n"] = 1
    (group,) = generate(model, tokenizer, ["calc 1 ?"], max_new_tokens=9, batch_size=4, samples=4,
                        temperature=1e-3)  # fmt: skip
    assert [one.ended for one in group] == [True] * 4
    assert read == [(1, 3), (4, 1), (3, 1), (3, 1)]


def test_sampling_draws_from_the_whole_softmax_at_its_temperature(tokenizer):
    class Fixed(type(tiny_llama())):
        def forward(self, input_ids=None, attention_mask=None, **kwargs):
            result = super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
            result.logits = torch.full_like(result.logits, -1e4)
            result.logits[:, :, 5], result.logits[:, :, 6] = 2.0, 0.0
            return result

    config = tiny_llama().config
    config.vocab_size = len(tokenizer)
    made = Fixed(config).eval()
    groups = generate(
        made, tokenizer, ["?"], max_new_tokens=1, batch_size=4000, samples=4000, temperature=2.0
    )
    texts = [one.text for one in groups[0]]
    share = texts.count(tokenizer.decode([5])) / 4000
    assert share == pytest.approx(1 / (1 + torch.tensor(-1.0).exp().item()), abs=0.03)
    assert set(texts) == {tokenizer.decode([5]), tokenizer.decode([6])}


class Echo:
    """A task whose answer is right when the response ends in the question's solution."""

    def answered(self, question, response):
        return bool(response)

    def right(self, question, response):
        return response.endswith(question.solution)


def test_answers_are_judged_and_cut_off_ones_are_wrong(model, tokenizer):
    responses = greedy(model, tokenizer, PROMPTS, steps=12)
    questions = [
        Question(str(i), "echo", prompt, (one.text.split() or [""])[-1] if i % 2 else "@", None)
        for i, (prompt, one) in enumerate(zip(PROMPTS, responses, strict=True))
    ]
    found = answer(model, tokenizer, Echo(), questions, max_new_tokens=12, batch_size=4)
    assert found.texts == [one.text for one in responses]
    assert found.answered == [one.ended and bool(one.text) for one in responses]
    assert found.right == [a and i % 2 == 1 for i, a in enumerate(found.answered)]
    assert found.accuracy == sum(found.right) / len(PROMPTS)
    assert any(not one.ended for one in responses)


def test_no_questions_is_told(model, tokenizer):
    with pytest.raises(AlloError, match="no questions"):
        answer(model, tokenizer, Echo(), [], max_new_tokens=3, batch_size=4)


def test_implicit_margins_by_hand():
    policy = [{"chosen": [-1.0, -2.0], "rejected": [-5.0]}]
    reference = [{"chosen": [-2.0, -2.5], "rejected": [-4.0]}]
    assert implicit_margins(policy, reference, 0.1) == [pytest.approx(0.1 * (1.5 + 1.0))]
    assert implicit_margins(policy, policy, 0.1) == [0]


# --- steps that are replayed write what the loop with a growing cache writes ---
# On a CPU the steps are made one by one; tests/machine/test_gpu.py records them as a CUDA graph.

WORDS = ("calc", "largest", "first", "second", "1", "3", "4", "12", "?")
prompts_of_words = st.lists(
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=8).map(" ".join), min_size=1, max_size=9
)


def both(changed, model, tokenizer, prompts, **given):
    """Responses with a growing cache, and with replayed steps."""
    given = {"max_new_tokens": 12, "batch_size": 4} | given
    grown = generation.generate(model, tokenizer, prompts, **given)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "_replays_steps", lambda model: True)
        if changed:
            patch.setattr(generation, *changed)
        return grown, generation.generate(model, tokenizer, prompts, **given)


@settings(max_examples=30, deadline=None)
@given(prompts_of_words, st.integers(1, 9), st.integers(1, 20), st.sampled_from([0, 2, 32]))
def test_replayed_greedy_responses_are_the_same(model, tokenizer, prompts, rows, limit, small):
    grown, replayed = both(("_SMALL", small), model, tokenizer, prompts,
                           batch_size=rows, max_new_tokens=limit)  # fmt: skip
    assert grown == replayed


@settings(max_examples=15, deadline=None)
@given(prompts_of_words, st.integers(1, 3), st.integers(0, 99))
def test_replayed_samples_are_the_same_draw_by_draw(model, tokenizer, prompts, samples, seed):
    grown, replayed = both(None, model, tokenizer, prompts, samples=samples, temperature=1.3,
                           seed=seed)  # fmt: skip
    assert grown == replayed


@settings(max_examples=15, deadline=None)
@given(prompts_of_words, st.integers(0, 14), st.booleans())
def test_replayed_drafts_change_nothing(model, tokenizer, prompts, length, right):
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
