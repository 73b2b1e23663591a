"""What a plan counts, against counts that are made otherwise."""

import pytest
import torch
from test_bad_models import words
from tiny_models import VOCABULARY, tiny_llama
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Qwen3Config

from allo_lib.align_setup import STAGES, checked, parts_of
from allo_lib.cli import plan
from allo_lib.engine.batching import Layout, pair_batch
from allo_lib.engine.forward import response_logps
from allo_lib.study.footprint import count, footprint

SEVEN = LlamaConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
    num_attention_heads=32, tie_word_embeddings=False,
)  # fmt: skip
PAIRS = [
    {"prompt": f"w1 w2 w{i}", "chosen": "w3 w4 w5", "rejected": "w3 w5 w6 w7"[: 5 + 3 * (i % 3)]}
    for i in range(10)
]


def parts(config, stages=STAGES):
    return parts_of(PAIRS, words(), 64, config, stages)


@pytest.mark.parametrize("tied", [True, False])
def test_operations_are_those_that_torch_counts(tied):
    """A forward and backward pass over pairs that share a prompt, laid out as they are trained."""
    model = tiny_llama(tied=tied)
    settings = checked({"estimator": "gradient"})
    given = parts(settings)[0]
    batch = pair_batch(given.rows, Layout(0))  # padded rows: torch counts their padding too
    with FlopCounterMode(display=False) as counter:
        response_logps(model, batch).sum().backward()
    shape = plan.shape_of(model.config)
    rows, length = batch["input_ids"].shape
    counted = 3 * (
        2 * rows * length * shape.body
        + 2 * len(batch["targets"]) * shape.head
        + 4 * rows * length**2 * shape.attention
    )
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.1)
    assert shape.parameters == sum(p.numel() for p in model.parameters())


def test_tokens_and_steps_of_every_pass():
    config = checked({"batch_size": 4, "epochs": 2, "max_steps": 4, "search": 3, "held_out": 0.2})
    given, held_out, development = found = parts(config)
    assert [len(part.rows) for part in found] == [7, 2, 1]
    passes = {one.name: one for one in plan.stages_of(found, config, STAGES, plan.shape_of(SEVEN))}
    read = 0  # of every tree a node once
    for row in given.rows:
        both = [row["prompt"] + row[side] for side in ("chosen", "rejected")]
        read += len({tuple(s[: n + 1]) for s in both for n in range(len(s))})
    assert passes["importance"].tokens == 2 * read and passes["importance"].steps == 4
    assert passes["learning x 3"].tokens == 6 * read and passes["learning x 3"].steps == 12
    rejected = sum(len(row["prompt"] + row["rejected"]) for row in given.rows)
    assert passes["forgetting x 3"].tokens == 6 * rejected
    assert passes["its reference x 3"].tokens == 3 * read and not passes["its reference x 3"].steps
    # A limit of steps ends a stage within its epochs.
    short = checked({"batch_size": 4, "epochs": 2, "max_steps": 3})
    found = parts(short)[0], held_out, development
    one = {o.name: o for o in plan.stages_of(found, short, STAGES, plan.shape_of(SEVEN))}
    of_all = {o.name: o for o in plan.stages_of(found, config, STAGES, plan.shape_of(SEVEN))}
    assert one["learning"].steps == 3 and one["importance"].steps == 3
    tokens = one["importance"].tokens / of_all["importance"].tokens
    assert tokens == pytest.approx(12 / 16, abs=0.01)  # rows read of ten pairs


def test_bytes_of_seven_billion_on_1_2_and_8_devices():
    config = checked({"batch_size": 8, "estimator": "gradient", "rewriter_neurons": "kept"})
    given, shape = parts(config)[0], plan.shape_of(SEVEN)
    assert shape.parameters == 6_738_415_616 and shape.head == 32000 * 4096
    longest = {key: max(len(row[key]) for row in given.rows) for key in given.rows[0]}
    response = max(longest["chosen"], longest["rejected"])
    by_devices = {
        n: plan.memory(SEVEN, shape, given, config, STAGES, torch.bfloat16, n)["other stages"]
        for n in plan.DEVICES
    }
    alone = footprint(SEVEN, 0.1, longest["prompt"], response, 8)
    assert by_devices[1] == alone.total
    layer = 2 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096)  # bytes in bf16
    for n in (2, 8):
        own = footprint(SEVEN, 0.1, longest["prompt"], response, 8 // n)
        sharded = own.weights + own.state + own.gradient
        expected = sharded / n + own.activations + own.logits + 2 * layer
        assert by_devices[n] == pytest.approx(expected)
    # Two bytes a weight, sixteen a kept one; the default needs dense state, and more.
    assert by_devices[1] > (2 + 1.6) * shape.parameters
    default = plan.memory(SEVEN, shape, given, checked({}), STAGES, torch.bfloat16, 8)
    assert 8 * default["importance"] > 8 * default["reward model"] > (2 + 12) * shape.parameters


def test_recomputing_keeps_of_each_layer_what_it_is_given():
    one_layer = LlamaConfig.from_dict(SEVEN.to_dict() | {"num_hidden_layers": 1})
    lengths = (64, 64, 1, torch.bfloat16)
    less = count(SEVEN, *lengths, recomputed=True).activations
    assert less == count(one_layer, *lengths).activations + 31 * 192 * 4096 * 2


def test_what_does_not_fit_is_said_with_what_to_change():
    config, tokenizer = checked({"batch_size": 8}), words()
    arguments = (tokenizer, SEVEN, parts(config), config, STAGES, torch.bfloat16)
    told = plan.describe(*arguments, 40e9, 4e14)
    assert told.count("DOES NOT FIT") == 2  # 8 devices hold it
    assert "to fit on one: it fits with estimator=gradient rewriter_neurons=kept" in told
    assert "more devices" in plan.advice(lambda settings: 1e9, config, 0.9e9)
    hours = sum(
        one.flops for one in plan.stages_of(parts(config), config, STAGES, plan.shape_of(SEVEN))
    )
    assert f"{hours / 4e14 / 8 / 3600:.3g} h" in told


@pytest.mark.parametrize("kind", [MixtralConfig, Qwen3Config])
def test_experts_that_a_token_passes_by_are_not_counted(kind):
    sizes = dict(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    more = dict(num_local_experts=8, num_experts_per_tok=2) if kind is MixtralConfig else {}
    config = kind(**sizes, **more)
    shape = plan.shape_of(config)
    attention = 4 * 16 * 16
    each = 3 * 16 * 24
    experts = 16 * 8 + 2 * each if more else each  # router, and two of eight
    assert shape.body == 2 * (attention + experts)
    assert shape.attention == 2 * 16
    assert shape.parameters == sum(
        p.numel() for p in AutoModelForCausalLM.from_config(config).parameters()
    )
    memory = plan.memory(
        config, shape, parts(checked({}))[0], checked({}), STAGES, torch.float32, 1
    )
    assert memory["other stages"] > 4 * shape.parameters


def test_the_first_pair_is_shown_as_it_is_read():
    tokenizer, row = words(), {"prompt": [4, 5], "chosen": [6, 1], "rejected": [7, 8, 1]}
    plain = plan.shown_pair(tokenizer, row, colour=False)
    assert plain == ["  prompt w1|w2", "  chosen w3", "     end <eos>", "rejected w4|w5",
                     "     end <eos>"]  # fmt: skip
    coloured = plan.shown_pair(tokenizer, row, colour=True)
    assert len({line[:5] for line in coloured}) == 4 and all("\x1b[0m" in x for x in coloured)
    assert plain[0] in coloured[0]

    long = plan.shown_pair(tokenizer, row | {"prompt": [3] + [4] * 98 + [5]}, colour=False)[0]
    assert long == "  prompt " + "|".join(
        ["w0"] + ["w1"] * 39 + ["... 20 more ..."] + ["w1"] * 39 + ["w2"]
    )

    class Hostile:
        def decode(self, ids):
            return "\x1b[2J\n"

    assert all("\x1b" not in line for line in plan.shown_pair(Hostile(), row, colour=False))
