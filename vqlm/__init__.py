"""vqlm: linear-time language models by vector quantization."""

from vqlm.config import LMConfig
from vqlm.model import LM
from vqlm.softmax import SoftmaxAttention
from vqlm.vq import VQAttention

__version__ = "0.1.0"
__all__ = ["LM", "LMConfig", "SoftmaxAttention", "VQAttention", "__version__"]
