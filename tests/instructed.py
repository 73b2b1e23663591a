"""A study of seconds whose methods reply to instructions, and reward models for its replies."""

import json
from pathlib import Path

import torch
from real_like import TEMPLATE, THINGS, write_data, write_model
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from allo_lib.engine.encoding import encode_prompt, encode_response
from allo_lib.study import arms
from allo_lib.study.study import Study

DOMAIN = "helpfulness"
METHODS = ("dpo", "allo")
PROFILE = """
name: instructed
model: {{name: {folder}/model, dtype: float32}}
search: {{candidates: 1}}
stability: []
compute: {{threads: 1, generation_batch: 8}}
domains:
  helpfulness:
    kind: preferences
    datasets: [hh_helpful]
    pairs: {{mask: 16, train: 48, dev: 12, heldout: 12}}
    rewriter: {{examples: 8, batch_size: 4}}
    rates: {{dense: 4.0e-3, top: 8.0e-3, forgetting: 2.0e-3, learning: 4.0e-3}}
    max_length: 64
    batch_size: 8
    instructions: {{datasets: [alpaca_eval, arena_hard], count: 20, max_new_tokens: 24}}
methods: [dpo, allo]
"""


# Replies of the starting model: some longer and some shorter than what the pairs prefer.
KNOWN = ("no tea", "surely milk is good to have", "no", "surely snow is good to have to have")


def write_all(folder: Path) -> None:
    """Data, model and profile; the instructions have the fields of the real files."""
    write_data(folder / "data")
    write_model(folder / "model", folder / "data")
    teach(folder / "model")
    for name, extra in (("alpaca_eval", "subset"), ("arena_hard", "cluster")):
        rows = [
            {"id": f"{name}-{i}", "question": f"tell {'me ' * (i % 5)}{i} of {THINGS[i % 4]}",
             extra: f"kind {i % 3}", "outputs": {"some-model": "surely"}}
            for i in range(15)
        ]  # fmt: skip
        rows[3]["question"] = rows[2]["question"]  # AlpacaEval could not tell them apart
        rows[4]["question"] = "too long " * 200
        path = folder / "data" / name / "test.jsonl"
        path.parent.mkdir()
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "instructed.yaml").write_text(PROFILE.format(folder=folder))


def teach(folder: Path) -> None:
    """Train the model in `folder` to give the reply of KNOWN that belongs to the thing."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(60):
        thing = step % len(THINGS)
        asked = [{"role": "user", "content": f"tell 0 of {THINGS[thing]}"}]
        prompt = encode_prompt(tokenizer, asked)
        ids = torch.tensor([prompt + encode_response(tokenizer, KNOWN[thing])])
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


def open_instructed(folder: Path, **judge) -> Study:
    """The study in `folder`, with a judge's settings if they are given."""
    overrides = {f"judge.{key}": value for key, value in judge.items()}
    study = Study.open(str(folder / "instructed.yaml"), 0, str(folder / "out"), overrides)
    study.data_dir = str(folder / "data")
    return study


def results_of(study: Study) -> dict[str, dict]:
    return {method: arms.result(study, DOMAIN, method) for method in METHODS}


# --- reward models -------------------------------------------------------------------------------


SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
WORDS = [*SPECIAL.values(), "user", "assistant", *(f"w{i}" for i in range(26)), *THINGS]


def tokenizer(
    template: str | None = TEMPLATE.replace("{{ m.content }} ", "{{ m.content }} <eos> "),
):
    ids = {word: i for i, word in enumerate(WORDS)}
    core = Tokenizer(tokenizer_models.WordLevel(ids, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template, **SPECIAL)


def classifier(labels: int = 1, pad: int | None = 0, context: int = 64, layers: int = 2):
    torch.manual_seed(0)
    return LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=len(WORDS), hidden_size=16, intermediate_size=24, num_hidden_layers=layers,
            num_attention_heads=2, max_position_embeddings=context, initializer_range=0.3,
            num_labels=labels, pad_token_id=pad, eos_token_id=1,
        )
    ).eval()  # fmt: skip


def saved(model, folder: Path, words=None) -> Path:
    model.save_pretrained(folder)
    (words or tokenizer()).save_pretrained(folder)
    return folder


@torch.no_grad()
def length_judge(folder: Path, sign: int = 1) -> Path:
    """A reward model that likes a reply of more words better (or, with sign -1, of fewer).

    Attention is uniform and sees the word `user`, with which every chat begins, alone: what comes
    out at the last token is 1 / (tokens), of which the score is the negative.
    """
    model = classifier(context=512, layers=1)
    tokens = model.model.embed_tokens.weight
    tokens.zero_()
    tokens[:, 1] = 1.0
    tokens[3] = 0.0
    tokens[3, 0] = 1.0
    (layer,) = model.model.layers
    attention = layer.self_attn
    for part in (attention.q_proj, attention.k_proj, attention.v_proj, layer.mlp.down_proj):
        part.weight.zero_()
    attention.v_proj.weight[0, 0] = 1.0
    attention.o_proj.weight.copy_(torch.eye(16))
    model.score.weight.zero_()
    model.score.weight[0, 0] = -1.0 * sign
    return saved(model, folder)
