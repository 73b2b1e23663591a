"""Models of a few thousand weights, batches and tokenizers for them, for tests of real ones."""

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers import models as tokenizer_models
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from allo_lib.engine import models

VOCABULARY = 33
WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(VOCABULARY - 3))]
SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=2,
)  # fmt: skip
ROUTED = dict(
    intermediate_size=24, num_key_value_heads=2, num_local_experts=2, output_router_logits=True
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_llama(
    seed: int = 0, tied: bool = False, dtype=torch.float32, **settings
) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=tied,
        pad_token_id=0,
        eos_token_id=1,
        **settings,
    )
    return LlamaForCausalLM(config).to(dtype)


def made(kind, **settings):
    """A model of an architecture of transformers."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | settings))


def micro(tokenizer, **changes):
    """The library's own micro model with the vocabulary of a tokenizer."""
    sizes = dict(width=16, layers=2, heads=2, feed_forward=32, context=128, seed=1)
    ends = dict(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    settings = sizes | {"initializer_range": 0.05} | ends | changes
    return models.micro_llama(len(tokenizer), **settings)


def token_batch(seed: int = 0, rows: int = 4, length: int = 10):
    """(input_ids, labels), both [rows, length]; the first three labels of a row are prompt."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCABULARY, (rows, length), generator=generator)
    labels = ids.clone()
    labels[:, :3] = -100
    return ids, labels


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def masters_of(model, optimizer) -> dict[str, torch.Tensor]:
    """The weights in float32, with an optimizer's masters in the places that it trains."""
    found = {name: weight.float() for name, weight in weights_of(model).items()}
    for name, (places, values) in optimizer.packed_masters().items():
        found[name].view(-1)[slice(None) if places is None else places.long()] = values
    return found


def moved(before: dict, after: dict, mask=None) -> int:
    """How many entries differ; with a mask, of those that it keeps, and no other one may."""
    count = 0
    for name, value in after.items():
        differ = value != before[name]
        if mask is not None:
            kept = mask.dense(name).to(value.device)
            assert torch.equal(value[~kept], before[name][~kept]), name
            differ = differ[kept]
        count += int(differ.sum())
    return count


def words(vocabulary=WORDS, template=None, **special):
    """A tokenizer of whole words, by default of the vocabulary of `tiny_llama`."""
    ids = {word: i for i, word in enumerate(vocabulary)}
    core = Tokenizer(tokenizer_models.WordLevel(ids, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(pad_token="<pad>", eos_token="<eos>", unk_token="<unk>") | special
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template, **names)


def bytewise(template=None, bos=None, eos="<eos>", special=(), added=(), merges=(), adds_bos=False):
    """One token a byte, but for `merges` of two signs; `special` and `added` tokens beside."""
    alphabet = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for left, right in merges:
        alphabet[left + right] = len(alphabet)
    core = Tokenizer(tokenizer_models.BPE(vocab=alphabet, merges=list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    names = {"eos_token": eos, "pad_token": "<pad>"} | ({"bos_token": bos} if bos else {})
    core.add_special_tokens([*names.values(), *special])
    core.add_tokens([AddedToken(name, special=False) for name in added])
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, chat_template=template, extra_special_tokens=list(special), **names
    )
