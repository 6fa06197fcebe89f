"""Exchange with transformers: weights and configs of Llama 4 both ways, our layers inside their models.

Needs the [hf] extra. `python -m moesaic.interop --help` holds it against transformers from the command line.
"""

from moesaic.interop.accelerate import accelerate, accelerated_blocks, restore
from moesaic.interop.llama4_config import config_from_hf, config_to_hf
from moesaic.interop.llama4_weights import CheckReport, check_hf, from_hf, hf_name, to_hf

__all__ = [
    "CheckReport",
    "accelerate",
    "accelerated_blocks",
    "check_hf",
    "config_from_hf",
    "config_to_hf",
    "from_hf",
    "hf_name",
    "restore",
    "to_hf",
]
