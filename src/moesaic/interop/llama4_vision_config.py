"""The whole config.json of Llama 4 with vision and `MultimodalConfig`, in both directions.

Semantics: transformers' `Llama4Config` and `Llama4VisionConfig` (5.23), and what its model does with them: it ignores
the activation, the epsilon and the choice of features that a file names.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from moesaic.config import from_mapping
from moesaic.errors import InputError
from moesaic.interop import llama4_config
from moesaic.interop.architectures import config_to_hf
from moesaic.interop.fields import INERT, known_values, read_rope
from moesaic.models import MultimodalConfig, VisionConfig

__all__ = ["multimodal_config_from_hf", "multimodal_config_to_hf"]

UNREAD = {
    "hidden_act", "norm_eps", "initializer_range", "vision_feature_select_strategy", "vision_feature_layer",
    "multi_modal_projector_bias",
}  # fmt: skip
"""Fields of `Llama4VisionConfig` that its model never looks at: it is always gelu, 1e-5, and without that bias."""
IMAGE_TOKEN = "image_token_index"
IDS = {IMAGE_TOKEN: "image_token_id", "boi_token_index": "boi_token_id", "eoi_token_index": "eoi_token_id"}
"""Fields of token ids, and the other name that transformers takes for each."""


@dataclasses.dataclass(frozen=True)
class _VisionFields:
    """The fields of `Llama4VisionConfig` that decide the function, with transformers' defaults."""

    hidden_size: int = dataclasses.field(default=768, metadata={"most": 2**20})
    num_hidden_layers: int = dataclasses.field(default=34, metadata={"most": 2**10})
    num_attention_heads: int = dataclasses.field(default=16, metadata={"most": 2**16})
    num_channels: int = dataclasses.field(default=3, metadata={"most": 2**10})
    intermediate_size: int = dataclasses.field(default=5632, metadata={"most": 2**22})
    vision_output_dim: int = dataclasses.field(default=7680, metadata={"most": 2**20})
    image_size: int = dataclasses.field(default=448, metadata={"most": 2**14})
    patch_size: int = dataclasses.field(default=14, metadata={"most": 2**10})
    pixel_shuffle_ratio: float = 0.5
    projector_input_dim: int = dataclasses.field(default=4096, metadata={"most": 2**20})
    projector_output_dim: int = dataclasses.field(default=4096, metadata={"most": 2**20})
    projector_dropout: float = 0.0
    attention_dropout: float = 0.0
    rope_theta: float | None = None
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("projector_dropout", "attention_dropout"):
            if getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)}: must be 0, there is no dropout here")
        if not 0 < self.pixel_shuffle_ratio <= 1 or abs(self.factor * self.pixel_shuffle_ratio - 1) > 1e-6:
            raise ValueError(f"pixel_shuffle_ratio={self.pixel_shuffle_ratio}: must be 1 / n of an integer n >= 1")
        shuffled = self.hidden_size * self.factor**2
        if self.intermediate_size != shuffled:  # one field for two widths
            raise ValueError(
                f"intermediate_size={self.intermediate_size}: must be hidden_size / pixel_shuffle_ratio^2 = "
                f"{shuffled}, which the adapter reads"
            )
        for name in ("projector_output_dim", "vision_output_dim"):
            if getattr(self, name) != self.projector_input_dim:
                raise ValueError(
                    f"{name}={getattr(self, name)}: must be projector_input_dim={self.projector_input_dim}, or the "
                    "parts do not fit"
                )

    @property
    def factor(self) -> int:
        return round(1 / self.pixel_shuffle_ratio)


def multimodal_config_from_hf(config: Mapping[str, Any]) -> MultimodalConfig:
    """The whole model that a config.json of `Llama4ForConditionalGeneration` describes.

    Raises:
        InputError: another architecture, a field that is not known, or a value that cannot be represented.
    """
    text = llama4_config.text_of_vision(config)
    if text is None:
        raise InputError(
            f"config.json: architectures={config.get('architectures') or []}, model_type={config.get('model_type')!r}; "
            f"must be {llama4_config.WITH_VISION} (llama4, with a text_config)"
        )
    parts = {"text_config", "vision_config", "quantization_config", "tie_word_embeddings"}  # the text's ties count
    known_values(config, {*parts, *IDS, *IDS.values()}, INERT, "Llama 4")
    vision = config.get("vision_config")
    if not isinstance(vision, Mapping):
        raise InputError(f"config.json: vision_config={vision!r}: must be a mapping of {llama4_config.WITH_VISION}")
    decoder = llama4_config.config_from_hf(text)
    token = _image_token(config)
    if not 0 <= token < decoder.vocab_size:
        raise InputError(
            f"config.json: {IMAGE_TOKEN}={token}: must be a token id below text_config.vocab_size={decoder.vocab_size}"
        )
    try:
        return MultimodalConfig(decoder, _vision_config(vision), token)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"config.json: {error}") from error


def _image_token(config: Mapping[str, Any]) -> int:
    """The id under either of its names; Llama 4's default where neither is given."""
    given = [config[name] for name in (IMAGE_TOKEN, IDS[IMAGE_TOKEN]) if config.get(name) is not None] or [200092]
    token = given[0]
    if given[-1] != token or isinstance(token, bool) or not isinstance(token, int):
        raise InputError(f"config.json: {IMAGE_TOKEN}={', '.join(map(repr, given))}: must be one token id")
    return token


def _vision_config(vision: Mapping[str, Any]) -> VisionConfig:
    known = {field.name for field in dataclasses.fields(_VisionFields)}
    values = known_values(vision, known, INERT | UNREAD, "Llama 4's vision_config")
    fields = from_mapping(_VisionFields, values, "config.json.vision_config")
    theta, scaling = read_rope(fields, 10000.0, 0)
    if scaling is not None:
        raise InputError("config.json.vision_config.rope_parameters: found a scaling; must be rope_type default")
    try:
        return VisionConfig(
            image_size=fields.image_size,
            patch_size=fields.patch_size,
            dim=fields.hidden_size,
            num_layers=fields.num_hidden_layers,
            num_heads=fields.num_attention_heads,
            hidden_dim=fields.intermediate_size,
            output_dim=fields.projector_output_dim,
            num_channels=fields.num_channels,
            pixel_shuffle=fields.factor,
            rope_theta=theta,
        )
    except ValueError as error:
        raise InputError(f"config.json.vision_config: {error}") from error


def multimodal_config_to_hf(config: MultimodalConfig, carried: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The whole config.json for a model, as `config_to_hf` for a decoder.

    Raises:
        InputError: the model computes what Llama 4 does not.
    """
    text = carried.get("text_config") or {}
    named = {"architectures": [llama4_config.TEXT_ONLY], "model_type": "llama4_text"}
    written_text = config_to_hf(config.text, {**text, **named}, dtype)
    vision = config.vision
    _require_llama4(vision)
    before = carried.get("vision_config") or {}
    ratio = before.get("pixel_shuffle_ratio", 0.5)
    written_vision = {
        **{key: value for key, value in before.items() if key in INERT | UNREAD and key != "torch_dtype"},
        "model_type": "llama4_vision_model",
        "hidden_size": vision.dim,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_heads,
        "num_channels": vision.num_channels,
        "intermediate_size": vision.hidden_dim,
        "vision_output_dim": vision.output_dim,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "pixel_shuffle_ratio": ratio if round(1 / ratio) == vision.pixel_shuffle else 1 / vision.pixel_shuffle,
        "projector_input_dim": vision.output_dim,
        "projector_output_dim": vision.output_dim,
        "projector_dropout": 0.0,
        "attention_dropout": 0.0,
        "rope_parameters": {"rope_theta": vision.rope_theta, "rope_type": "default"},
    }
    kept = {key: value for key, value in carried.items() if key in INERT - {"torch_dtype"}}
    elsewhere = ("architectures", "dtype")
    ids = {name: carried.get(name, carried.get(IDS[name])) for name in IDS if name != IMAGE_TOKEN}
    return {
        **kept,
        **{name: token for name, token in ids.items() if token is not None},
        IMAGE_TOKEN: config.image_token,
        "text_config": {key: value for key, value in written_text.items() if key not in elsewhere},
        "vision_config": written_vision,
        "tie_word_embeddings": config.text.tie_embeddings,
        "architectures": [llama4_config.WITH_VISION],
        "model_type": "llama4",
        "dtype": dtype,
    }


def _require_llama4(vision: VisionConfig) -> None:
    """Raise InputError that names every key by which an encoder differs from Llama 4's."""
    wanted = {
        "hidden_dim": vision.dim * vision.pixel_shuffle**2,
        "class_token": True,
        "learned_positions": True,
        "rope_theta": vision.rope_theta or "a number",
    }
    found = {name: (getattr(vision, name), value) for name, value in wanted.items() if getattr(vision, name) != value}
    if found:
        listed = "; ".join(f"vision.{name}: found {value!r}, must be {must}" for name, (value, must) in found.items())
        raise InputError(f"this model is not a Llama 4: {listed}")
