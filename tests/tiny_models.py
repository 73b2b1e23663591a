"""A LLaMA of a few thousand weights and batches for it, for tests that need a real model."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 33


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


def token_batch(seed: int = 0, rows: int = 4, length: int = 10):
    """(input_ids, labels), both [rows, length]; the first three labels of a row are prompt."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCABULARY, (rows, length), generator=generator)
    labels = ids.clone()
    labels[:, :3] = -100
    return ids, labels


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def word_tokenizer():
    """A tokenizer of whole words, "w0", "w1" and so on, of the vocabulary of `tiny_llama`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(VOCABULARY - 3))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    specials = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **specials)
