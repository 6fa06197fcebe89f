"""The architectures that can be exchanged with transformers, and which of them a config is."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from moesaic.errors import InputError
from moesaic.interop import deepseek_v3_config, llama4_config
from moesaic.interop.fields import INERT, defining
from moesaic.interop.layouts import AS_OURS, Layout, experts_of
from moesaic.interop.softmax_moe_config import GPT_OSS, MIXTRAL, OLMOE, QWEN3_MOE, Table, read_config, write_config
from moesaic.models import DecoderConfig

__all__ = ["ARCHITECTURES", "Architecture", "architecture_of", "config_from_hf", "config_to_hf"]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One architecture of transformers, a text model that predicts the next token."""

    name: str
    """Its class in transformers."""
    model_type: str
    layout: Layout
    read: Callable[[Mapping[str, Any]], DecoderConfig]
    """config.json -> our config."""
    write: Callable[[DecoderConfig, Mapping[str, Any]], dict[str, Any]]
    """Our config and an imported config.json -> the fields that decide the function."""
    title: str
    inert: frozenset[str] = frozenset()
    """Fields that it does not read, beside those of `INERT`."""
    unused: Callable[[Mapping[str, Any]], tuple[str, ...]] = lambda config: ()
    """config.json -> how the names of tensors begin that its files may have and the model does not."""
    unused_name: str = ""
    """What these are, for messages."""


def _of_table(name: str, model_type: str, table: Table, layout: Layout) -> Architecture:
    read, write = partial(read_config, table), partial(write_config, table)
    return Architecture(name, model_type, layout, read, write, table.title, table.inert)


BY_NAME = experts_of("gate_proj", "up_proj", "down_proj")
LLAMA4 = Architecture(
    llama4_config.TEXT_ONLY,
    "llama4_text",
    AS_OURS,
    llama4_config.config_from_hf,
    llama4_config.fields_to_hf,
    "Llama 4",
    frozenset(llama4_config.UNREAD),
)
DEEPSEEK_V3 = Architecture(
    "DeepseekV3ForCausalLM",
    "deepseek_v3",
    Layout(
        ffn="mlp",
        halves=False,
        renamed={
            "q_down": "q_a_proj",
            "q_norm": "q_a_layernorm",
            "q_up": "q_b_proj",
            "kv_down": "kv_a_proj_with_mqa",
            "kv_norm": "kv_a_layernorm",
            "kv_up": "kv_b_proj",
            "shared_expert": "shared_experts",
            "expert_bias": "e_score_correction_bias",
        },
        experts=BY_NAME,
    ),
    deepseek_v3_config.config_from_hf,
    deepseek_v3_config.fields_to_hf,
    deepseek_v3_config.TITLE,
    deepseek_v3_config.UNREAD,
    deepseek_v3_config.prediction_tensors,
    "multi-token prediction",
)
ARCHITECTURES = (
    LLAMA4,
    _of_table(
        "MixtralForCausalLM",
        "mixtral",
        MIXTRAL,
        Layout(ffn="block_sparse_moe", ffn_in_model="mlp", experts=experts_of("w1", "w3", "w2")),
    ),
    _of_table("Qwen3MoeForCausalLM", "qwen3_moe", QWEN3_MOE, Layout(ffn="mlp", experts=BY_NAME)),
    _of_table("OlmoeForCausalLM", "olmoe", OLMOE, Layout(ffn="mlp", experts=BY_NAME)),
    DEEPSEEK_V3,
    _of_table("GptOssForCausalLM", "gpt_oss", GPT_OSS, Layout(ffn="mlp", router="router", alternating=True)),
)


def architecture_of(config: Mapping[str, Any]) -> tuple[Architecture, Mapping[str, Any], str]:
    """The architecture of a whole config.json, the part of it about text, and the prefix of that part's tensors.

    Raises:
        InputError: another architecture.
    """
    found = _named(config)
    if found is not None:
        return found, config, ""
    text = llama4_config.text_of_vision(config)
    if text is not None:
        return LLAMA4, text, "language_model."
    known = ", ".join(f"{each.name} ({each.model_type})" for each in ARCHITECTURES)
    raise InputError(
        f"config.json: architectures={config.get('architectures') or []}, model_type={config.get('model_type')!r}; "
        f"must be one of {known}, {llama4_config.WITH_VISION} (llama4, with a text_config)"
    )


def _named(config: Mapping[str, Any]) -> Architecture | None:
    architectures, model_type = config.get("architectures") or [], config.get("model_type")
    for each in ARCHITECTURES:
        if architectures and architectures[0] == each.name and model_type in (each.model_type, None):
            return each
        if not architectures and model_type == each.model_type:
            return each
    return None


def config_from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that a config.json describes; missing fields have transformers' defaults.

    Fields that say of no architecture are those of Llama 4's text model. Spellings of earlier years are understood:
    rope_scaling and rope_theta side by side, attn_temperature_tuning: 4, floor_scale: 8192.0, no_rope_layers: [].

    Raises:
        InputError: another architecture, a field that is not known, or a value that cannot be represented.
    """
    if not config.get("architectures") and config.get("model_type") is None:
        return LLAMA4.read(config)
    architecture, text, _ = architecture_of(config)
    return architecture.read(text)


def config_to_hf(config: DecoderConfig, carried: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """config.json for this decoder: of the architecture that it came from, or of the first one that holds it exactly.

    Args:
        carried: fields of an imported config.json, kept where they say nothing about the function (token ids).
        dtype: of the weights, as torch spells it without its prefix: "bfloat16".

    Raises:
        InputError: the decoder computes what no architecture does; the message names every such key for the one that
            is nearest.
    """
    came_from = _named(carried)
    differences: dict[str, dict[str, tuple[Any, Any]]] = {}
    for architecture in ARCHITECTURES if came_from is None else (came_from,):
        written = _write(architecture, config, carried, differences.setdefault(architecture.title, {}))
        if written is not None:
            return {**written, "dtype": dtype}
    # one whose config.json could not even be read back is never the nearest
    title, found = min(differences.items(), key=lambda item: ("config.json" in item[1], len(item[1])))
    listed = "; ".join(f"{key}: found {value!r}, must be {allowed}" for key, (value, allowed) in found.items())
    others = [each.title for each in ARCHITECTURES if each.title != title] if came_from is None else []
    also = f" (nor is it one of {', '.join(others)})" if others else ""
    raise InputError(f"this model is not a {title}: {listed}{also}")


def _write(
    architecture: Architecture, config: DecoderConfig, carried: Mapping[str, Any], differences: dict[str, Any]
) -> dict[str, Any] | None:
    """The whole config.json without dtype; None if this architecture does not hold the decoder."""
    if architecture is LLAMA4:
        differences |= llama4_config.differences(config)
    if differences:
        return None
    fields = architecture.write(config, carried)
    try:
        again = defining(architecture.read(fields))
    except InputError as error:
        differences["config.json"] = (str(error).removeprefix("config.json: "), "a value that it has")
        return None
    ours = defining(config)
    for key in dict.fromkeys([*ours, *again]):
        if ours.get(key) != again.get(key):
            differences[key] = (ours.get(key), again.get(key))
    if differences:
        return None
    inert = {key: value for key, value in carried.items() if key in INERT | architecture.inert}
    inert.pop("torch_dtype", None)  # dtype's old name
    own: dict[str, Any] = {} if carried else {"bos_token_id": None, "eos_token_id": None}
    identity = {"architectures": [architecture.name], "model_type": architecture.model_type}
    return {**inert, **fields, **own, **identity}
