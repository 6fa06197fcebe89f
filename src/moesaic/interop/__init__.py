"""Exchange with transformers: weights and configs both ways, our layers inside their models.

Needs the [hf] extra. `python -m moesaic.interop --help` holds it against transformers from the command line.
"""

from moesaic.interop.accelerate import accelerate, accelerated_blocks, restore
from moesaic.interop.architectures import ARCHITECTURES, Architecture, config_from_hf, config_to_hf
from moesaic.interop.muse_spark import block_from_hf, block_gradients_to_hf, block_to_hf, moe_config_from_hf
from moesaic.interop.weights import CheckReport, check_hf, from_hf, gradients_to_hf, hf_name, multimodal_from_hf, to_hf

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "CheckReport",
    "accelerate",
    "accelerated_blocks",
    "block_from_hf",
    "block_gradients_to_hf",
    "block_to_hf",
    "check_hf",
    "config_from_hf",
    "config_to_hf",
    "from_hf",
    "gradients_to_hf",
    "hf_name",
    "moe_config_from_hf",
    "multimodal_from_hf",
    "restore",
    "to_hf",
]
