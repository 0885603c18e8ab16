"""Plug in and take out: the quantizer and the experts function in transformers, the wrapper in PEFT.

Everything is registered by name at the libraries' own registration points. PEFT has none that is kept with
a saved adapter, so there one function is replaced by a wrapper that passes on whatever is not ours (see
`lora`).
"""

from __future__ import annotations

import warnings
from importlib.metadata import version

from packaging.version import Version
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)

from . import lora
from .forward import EXPERTS_FUNCTION, experts_forward
from .quantizer import QUANT_METHOD, ExpertsConfig, ExpertsQuantizer

# The loader hooks are internal to transformers and move between minor versions: first tested, first untested.
TESTED_TRANSFORMERS = ("5.23.0", "5.24.0")


def register() -> None:
    """Register the three seams; a second call changes nothing. Warns about an untested transformers
    version.
    """
    if QUANT_METHOD in AUTO_QUANTIZER_MAPPING:
        return
    first, end = TESTED_TRANSFORMERS
    found = version("transformers")
    if not Version(first) <= Version(found) < Version(end):
        warnings.warn(
            f"moesmith was tested with transformers >= {first}, < {end}; this is {found}: "
            "packed loading may fail or load wrongly",
            stacklevel=3,
        )
    register_quantization_config(QUANT_METHOD)(ExpertsConfig)
    register_quantizer(QUANT_METHOD)(ExpertsQuantizer)
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_FUNCTION, experts_forward)
    lora.register()


def unregister() -> None:
    """Take the three seams out. Models loaded before keep their modules but cannot be loaded again."""
    AUTO_QUANTIZATION_CONFIG_MAPPING.pop(QUANT_METHOD, None)
    AUTO_QUANTIZER_MAPPING.pop(QUANT_METHOD, None)
    if EXPERTS_FUNCTION in ALL_EXPERTS_FUNCTIONS._global_mapping:
        del ALL_EXPERTS_FUNCTIONS._global_mapping[EXPERTS_FUNCTION]
    lora.unregister()
