"""Other projects' DPO steps, as 07 measures them: they run, on the same pairs, and are counted."""

import importlib.util

import pytest
import torch
from tiny_study import open_study

from allo_lib import efficiency, miniature, peers
from allo_lib.models import micro_llama
from allo_lib.timed_steps import OwnSteps
from allo_lib.workload import workload

HAVE = {name: importlib.util.find_spec(name) is not None for name in ("trl", "peft")}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return open_study(tmp_path_factory.mktemp("peers"), timing__pairs=4)


def steps_of(study, variant: str):
    load = workload(study)
    model = study.load_sft("miniature").train()
    if variant in peers.PEERS:
        return peers.TrlSteps(
            model, study.tokenizer, load.texts, variant, beta=0.1, share=0.1, lr=1e-3
        )
    return OwnSteps(model, None, load.rows, variant, study.tokenizer.pad_token_id, beta=0.1, lr=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("variant", peers.PEERS)
def test_every_peer_trains_and_is_timed(study, variant):
    assert peers.missing(variant) is None  # the tests' requirements hold both
    dense = steps_of(study, "dense")
    own = dense.count()
    dense.close()
    before = {name: p.detach().clone() for name, p in study.model.named_parameters()}
    steps = steps_of(study, variant)
    assert steps.run(1, 2) > 0
    # Prompts read twice, a padded batch, and the whole head: more than this project's own step.
    assert steps.flops > own
    after = dict(study.model.named_parameters())
    moved = any(n in after and not torch.equal(p, after[n]) for n, p in before.items())
    assert moved == (variant != "peft")
    total = sum(p.numel() for p in before.values())
    expected = 3 * 4 * total  # two moments and the gradient, in float32
    if variant == "peft":
        assert 0.5 * 0.1 * expected < steps.state_bytes() < 1.5 * 0.1 * expected
    else:
        assert steps.state_bytes() == expected
    study.__dict__.pop("_loaded", None)  # an adapter stays in the model it was given
    study.__dict__.pop("_initial", None)


def test_the_rank_is_the_nearest_to_the_share():
    tokenizer = miniature.tokenizer()
    model = micro_llama(
        len(tokenizer), width=32, layers=2, heads=2, feed_forward=64, context=64,
        initializer_range=0.05, seed=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    rank = peers.TrlSteps(model, tokenizer, [], "peft", beta=0.1, share=0.1, lr=1e-3).rank()
    # Four square projections of 32 and three of 32 x 64 a layer: A has rank * in, B rank * out.
    per_rank = 2 * (4 * (32 + 32) + 3 * (32 + 64))
    total = sum(p.numel() for p in model.parameters())
    assert min(range(1, 40), key=lambda r: abs(r * per_rank - 0.1 * total)) == rank


def test_replies_become_messages_where_the_prompt_is_messages():
    chat = [{"role": "user", "content": "hi"}]
    pair = {"prompt": chat, "chosen": "yes", "rejected": [{"role": "assistant", "content": "no"}]}
    found = peers._all_messages(pair)
    assert found["chosen"] == [{"role": "assistant", "content": "yes"}]
    assert found["rejected"] == pair["rejected"] and found["prompt"] == chat
    plain = {"prompt": "hi", "chosen": "yes", "rejected": "no"}
    assert peers._all_messages(plain) == plain


def test_what_is_not_installed_is_left_out_and_told(monkeypatch, capsys, tmp_path):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "peft" else real(name)
    )
    assert "peft" not in peers.installed()
    assert "peft is left out: peft is not installed" in capsys.readouterr().out
    study = open_study(tmp_path)
    assert efficiency.variants(study) == list(efficiency.VARIANTS)
    wanting = open_study(tmp_path, timing__peers=True)
    expected = [v for v in peers.PEERS if v != "peft" and HAVE["trl"]]
    assert efficiency.variants(wanting) == [*expected, *efficiency.VARIANTS]
