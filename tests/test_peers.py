"""Other projects' DPO steps, as 07 measures them: they run, on the same pairs, and are counted."""

import importlib.util

import pytest
import torch
from peft import get_peft_model
from tiny_study import open_study
from transformers import LlamaConfig, LlamaForCausalLM

from allo_lib.data import miniature
from allo_lib.engine.models import micro_llama
from allo_lib.study import efficiency, peers
from allo_lib.study.efficiency import workload
from allo_lib.study.timed_steps import OwnSteps

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
    begun = []
    assert steps.run(1, 2, lambda: begun.append(steps.trainer.state.global_step)) > 0
    assert begun == [1]
    # Prompts read twice, a padded batch, and the whole head: more than this project's own step.
    # LoRA alone makes no gradient of whole weights.
    assert steps.flops > (own * 2 / 3 if variant == "peft" else own)
    after = dict(study.model.named_parameters())
    moved = any(n in after and not torch.equal(p, after[n]) for n, p in before.items())
    assert moved == (not variant.startswith("peft"))
    total = sum(p.numel() for p in before.values())
    # Two moments and the gradient, in float32; of an adapter its values, and indices if it has any.
    each = {"peft": 16, "peft_supertuning": 20}.get(variant, 12)
    assert steps.state_bytes() == each * steps.trained()
    assert steps.trained() == pytest.approx(0.1 * total if each > 12 else total, rel=0.2)
    # A second model, or none: each way of TRL's has its reference, before training or beside it.
    assert (steps.trainer.ref_model is not None) == (variant == "trl_default")
    assert steps.trainer.precompute_ref_logps == (variant != "trl_default")
    study.__dict__.pop("_loaded", None)  # an adapter stays in the model it was given
    study.__dict__.pop("_initial", None)


@pytest.mark.parametrize("share", [0.05, 0.1])
@pytest.mark.parametrize("variant", [v for v in peers.PEERS if v.startswith("peft")])
def test_adapters_train_as_many_values_as_the_scalar_neurons(variant, share):
    """At the shape of SmolLM2-135M, within 1%."""
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    total = sum(p.numel() for p in model.parameters())
    steps = peers.TrlSteps(model, None, [], variant, beta=0.1, share=share, lr=1e-3)
    adapted = get_peft_model(model, steps._adapter())
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert trained == pytest.approx(round(share * total), rel=0.01)


def test_supertuning_trains_the_largest_entries_of_linear_layers():
    tokenizer = miniature.tokenizer()
    model = micro_llama(
        len(tokenizer), width=32, layers=1, heads=2, feed_forward=64, context=64,
        initializer_range=0.05, seed=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    weights = {name: p.detach().abs() for name, p in model.named_parameters()}
    steps = peers.TrlSteps(model, None, [], "peft_supertuning", beta=0.1, share=0.1, lr=1e-3)
    get_peft_model(model, steps._adapter())
    found = {name: b.long() for name, b in model.named_buffers() if "supertuning_indices" in name}
    assert len(found) == 7
    for name, index in found.items():
        weight = weights[name.replace("supertuning_indices.default", "weight")].flatten()
        assert weight[index].min() >= weight.kthvalue(weight.numel() - len(index)).values


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


def test_what_an_older_peft_lacks_is_left_out_alone(monkeypatch, capsys):
    real, lacking = importlib.util.find_spec, "peft.tuners.supertuning"
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == lacking else real(name)
    )
    assert peers.installed() == [v for v in peers.PEERS if v != "peft_supertuning"]
    assert f"peft_supertuning is left out: {lacking} is not" in capsys.readouterr().out


def test_what_is_not_installed_is_left_out_and_told(monkeypatch, capsys, tmp_path):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "peft" else real(name)
    )
    assert peers.installed() == [v for v in peers.PEERS if v.startswith("trl") and HAVE["trl"]]
    assert "peft is left out: peft is not installed" in capsys.readouterr().out
    study = open_study(tmp_path)
    assert efficiency.variants(study) == list(efficiency.VARIANTS)
    wanting = open_study(tmp_path, timing__peers=True)
    expected = [v for v in peers.PEERS if v.startswith("trl") and HAVE["trl"]]
    assert efficiency.variants(wanting) == [*expected, *efficiency.VARIANTS]
