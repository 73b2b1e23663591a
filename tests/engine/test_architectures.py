"""Every architecture of transformers that is quickly built: read as it reads itself, or refused."""

import pytest
import torch
from refusals import assert_one_line
from test_forward import gradients, plainly
from tiny_models import WORDS, weights_of, words
from transformers import AutoConfig, AutoModelForCausalLM

from allo_lib import align
from allo_lib.engine import forward
from allo_lib.engine.batching import collate, pair_batch
from allo_lib.engine.forward import layout_of, response_logps
from allo_lib.errors import AlloError

VOCABULARY = 64
# Whatever of this a configuration knows; windows and chunks are shorter than the rows below.
TINY = dict(
    vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.2,
    max_position_embeddings=128, n_positions=128, is_decoder=True,
    hidden_size=32, n_embd=32, d_model=32, word_embed_proj_dim=32,
    num_hidden_layers=2, n_layer=2, n_layers=2, decoder_layers=2,
    num_attention_heads=4, n_head=4, n_heads=4, decoder_attention_heads=4, num_key_value_heads=4,
    intermediate_size=48, n_inner=48, ffn_dim=48, ffn_hidden_size=48, decoder_ffn_dim=48,
    intermediate_size_mlp=48, head_dim=8, rotary_dim=4,
    sliding_window=8, attention_chunk_size=8, index_topk=8, index_n_heads=2, index_head_dim=16,
    num_local_experts=4, num_experts=4, n_routed_experts=4, num_experts_per_tok=2,
    moe_intermediate_size=16, shared_expert_intermediate_size=16, n_group=1, topk_group=1,
    first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8,
    qk_nope_head_dim=8, v_head_dim=8,
)  # fmt: skip

PAIRS = [
    {"prompt": "w1 w2 w3 " * 4, "chosen": "w4 w5 " * 3, "rejected": f"w{6 + i} w9 w10"}
    for i in range(5)
]
RATES = {key: 1e-2 for key in ("importance_rate", "forgetting_rate", "learning_rate")}
WINDOWED = ("mistral", "mixtral", "phi3", "phimoe", "starcoder2", "ministral3")  # no layer_types
EXPERTS = (
    "deepseek_v2", "deepseek_v3", "ernie4_5_moe", "flex_olmo", "glm4_moe", "gpt_oss", "granitemoe",
    "hunyuan_v1_moe", "jamba", "jetmoe", "llama4_text", "minimax", "olmoe", "qwen2_moe",
    "qwen3_moe",
)  # fmt: skip
MORE_THAN_A_MATRIX = ("bert", "cohere", "electra", "gemma2", "granite", "minicpm3", "nanochat",
                      "rembert", "roberta")  # fmt: skip
OTHERS = (
    "bloom", "codegen", "falcon", "falcon_mamba", "gemma", "gemma3_text", "gpt2", "gpt_bigcode",
    "gpt_neox", "llama", "mamba", "mpt", "olmo2", "opt", "phi", "qwen2", "qwen3", "rwkv", "smollm3",
    "stablelm",
)  # fmt: skip
SELDOM = (
    "afmoe", "apertus", "arcee", "aria_text", "bailing_hybrid", "bart", "bert-generation",
    "biogpt", "big_bird", "bitnet", "camembert", "cohere2", "cohere2_moe", "ctrl", "cwm",
    "deepseek_v4", "diffllama", "doge", "ernie4_5", "exaone4", "exaone_moe", "glm", "glm4",
    "glm4_moe_lite", "gptj", "granitemoe_swa", "helium", "hy_v3", "kolibri1", "laguna", "lfm2",
    "mbart", "megatron-bert", "mellum", "minimax_m2", "ministral",
    "modernbert-decoder", "nemotron", "nemotron_h", "olmo3", "olmo_hybrid", "openai-gpt",
    "persimmon", "qwen3_next", "recurrent_gemma", "roformer", "seed_oss", "solar_open",
    "vaultgemma", "xglm", "xlm", "youtu",
)  # fmt: skip
REFUSED = {
    "xlnet": "depends on what stands behind or beside it",
    "deepseek_v32": "depends on what stands behind or beside it",  # it picks among padding, too
    "xmod": "its forward pass fails: Input language unknown",
}


def tiny(kind: str, **changes):
    known = AutoConfig.for_model(kind)
    names = set(known.to_dict()) | set(known.attribute_map)
    config = AutoConfig.for_model(kind, **{k: v for k, v in TINY.items() if k in names} | changes)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def rows() -> list[dict]:
    """Two prompts with two responses each, all but one longer than any window."""
    generator = torch.Generator().manual_seed(0)

    def draw(count):
        return torch.randint(3, VOCABULARY, (count,), generator=generator).tolist()

    prompts = draw(20), draw(5)
    return [{"prompt": prompts[i // 2], "response": draw(n)} for i, n in enumerate((15, 9, 30, 3))]


@torch.no_grad()
def assert_own(model, layout) -> None:
    """Against the model's forward pass of each row alone, nothing said of positions or masks."""
    given = rows()
    found = response_logps(model, collate(given, layout))
    for row, values in zip(given, found, strict=True):
        expected = plainly(model, row)
        assert torch.allclose(values[: len(expected)], expected, atol=1e-3), type(model).__name__


@pytest.mark.parametrize("kind", [*WINDOWED, *EXPERTS, *MORE_THAN_A_MATRIX, *OTHERS])
def test_log_probs_are_the_models_own_beyond_any_window(kind):
    assert_own(model := tiny(kind), layout_of(model, 0))


@pytest.mark.slow
@pytest.mark.parametrize("kind", SELDOM)
def test_log_probs_are_the_models_own_in_seldom_architectures(kind):
    assert_own(model := tiny(kind), layout_of(model, 0, rows()))


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_read_as_it_reads_itself_is_refused(kind):
    with pytest.raises(AlloError, match=REFUSED[kind]) as caught:
        layout_of(tiny(kind), 0, rows())
    assert_one_line(str(caught.value))


@pytest.mark.parametrize("kind", WINDOWED)
def test_rows_are_shared_within_a_window_only(kind):
    model = tiny(kind)
    layout = layout_of(model, 0)
    short = [{"prompt": [3, 4], "response": [5, 6, 7, 8][: 2 + i]} for i in range(2)]
    assert layout.window == 8 and "ends" in collate(short, layout)
    assert "ends" not in collate(rows(), layout)
    without = layout_of(tiny(kind, sliding_window=None), 0)
    assert "ends" in collate(rows(), without)


def test_a_window_that_no_setting_tells_is_found_on_the_longest_pair(tmp_path, monkeypatch):
    """Short rows are read alike with and without it: before training `align` tries the longest."""
    monkeypatch.setattr(forward, "_WINDOWS", ())
    model = tiny("mistral")
    assert layout_of(model, 0).shared
    align(model, words(), PAIRS, stages=("learning",), config=RATES, output_dir=tmp_path)
    assert not layout_of(model, 0).shared
    assert_own(model, layout_of(model, 0))


def test_a_head_of_more_than_a_matrix_is_told_once(capsys):
    model = tiny("bert")
    for _ in range(3):
        layout_of(model, 0)
    assert capsys.readouterr().out == (
        "BertLMHeadModel: its own logits are used, which are no product of its head\n"
    )
    layout_of(tiny("llama"), 0)
    assert not capsys.readouterr().out


def test_the_attention_may_be_changed_between_calls():
    model = tiny("llama")
    for attention in ("sdpa", "eager", "sdpa"):
        model.set_attn_implementation(attention)
        layout = layout_of(model, 0)
        assert layout.shared == (attention == "sdpa")
        assert_own(model, layout)


def test_gradients_of_a_windowed_model_and_of_a_head_are_the_models_own():
    for kind in ("mistral", "bert", "cohere"):
        model, given = tiny(kind), rows()
        expected = gradients(model, sum(plainly(model, row).sum() for row in given))
        batch = collate(given, layout_of(model, 0))
        found = gradients(model, response_logps(model, batch).sum())
        for name, value in expected.items():
            scale = value.abs().max().clamp_min(1)
            assert torch.allclose(found[name] / scale, value / scale, atol=1e-4), name


# --- `align` whole ---

# All kinds, ten mixtures of experts among them; how the others are read is tested above.
WHOLE = (*WINDOWED, *EXPERTS[::2], *MORE_THAN_A_MATRIX[::2], *OTHERS[::2])


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*WHOLE, *REFUSED])
def test_align_runs_whole_or_refuses_in_one_line(tmp_path, kind):
    """All stages; the first loss is ln 2, and another load of what is saved gives the same."""
    model = tiny(kind, vocab_size=len(WORDS))
    before = weights_of(model)
    if kind in REFUSED:
        with pytest.raises(AlloError) as caught:
            align(model, words(), PAIRS, output_dir=tmp_path)
        assert_one_line(str(caught.value))
        assert all(torch.equal(before[n], value) for n, value in model.named_parameters())
        return
    config = RATES | {"max_length": 128}  # some do not say how many tokens they read
    if not all(value.requires_grad for value in model.parameters()):
        config["estimator"] = "gradient"  # some have constants among their parameters
    result = align(model, words(), PAIRS, config=config, output_dir=tmp_path)
    assert result.logs["learning"].loss[0] == pytest.approx(0.693147, abs=1e-4)
    assert any(not torch.equal(before[n], value) for n, value in model.named_parameters())
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    batch = pair_batch([{"prompt": [3, 4], "chosen": [5, 6], "rejected": [7]}], layout_of(model, 0))
    assert torch.allclose(response_logps(model, batch), response_logps(again, batch), atol=1e-5)
