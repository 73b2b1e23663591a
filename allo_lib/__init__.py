"""ALLO: low-redundant optimization for language model alignment (arXiv 2406.12606), reproduced."""

import importlib

from allo_lib.machine import runtime

runtime.configure()

__version__ = "0.1.0"
_HOME = {
    "AlignConfig": "align_setup",
    "AlignResult": "alignment",
    "MaskedAdamW": "method.masked_adamw",
    "NeuronMask": "method.neurons",
    "align": "alignment",
    "delta_scores": "method.neurons",
    "dpo_loss": "method.losses",
    "key_tokens": "method.tokens",
    "load_aligned": "delta",
    "merge": "delta",
    "npo_loss": "method.losses",
    "select_neurons": "method.neurons",
    "token_dpo_loss": "method.losses",
    "token_logps": "method.losses",
    "unaligned_weights": "method.tokens",
}
__all__ = [*_HOME]


def __getattr__(name):
    # `align` pulls in torch and transformers; commands that do not train stay quick without them.
    if name in _HOME:
        return getattr(importlib.import_module(f"allo_lib.{_HOME[name]}"), name)
    raise AttributeError(f"module 'allo_lib' has no attribute {name!r}")
