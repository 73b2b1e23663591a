"""ALLO: low-redundant optimization for language model alignment (arXiv 2406.12606), reproduced."""

from allo_lib import runtime

runtime.configure()

__version__ = "0.1.0"
__all__ = ["AlignResult", "align"]


def __getattr__(name):
    # `align` pulls in torch and transformers; commands that do not train stay quick without them.
    if name in __all__:
        from allo_lib import alignment

        return getattr(alignment, name)
    raise AttributeError(f"module 'allo_lib' has no attribute {name!r}")
