"""vqlm: linear-time language models by vector quantization."""

from typing import TYPE_CHECKING, Any

from vqlm.config import LMConfig
from vqlm.model import LM
from vqlm.softmax import SoftmaxAttention
from vqlm.vq import VQAttention

if TYPE_CHECKING:
    from vqlm.patching import patch as patch

__version__ = "0.1.0"
__all__ = ["LM", "LMConfig", "SoftmaxAttention", "VQAttention", "__version__"]


def __getattr__(name: str) -> Any:
    # Loaded when it is asked for: it needs transformers, and nothing else here does.
    if name == "patch":
        from vqlm.patching import patch

        return patch
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
