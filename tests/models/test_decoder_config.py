import copy
import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.config import from_mapping, to_mapping
from moesaic.errors import InputError
from moesaic.layers import ROUTERS
from moesaic.models import (
    AttentionConfig,
    DecoderConfig,
    LayerConfig,
    MoEConfig,
    account,
    build_decoder,
    llama4_maverick,
    llama4_scout,
    llama4_toy,
)
from moesaic.models.custom import custom_modules
from moesaic.models.shapes import num_parameters, uncounted


def mapping(**changes: Any) -> dict[str, Any]:
    """The toy model as YAML would give it; a key such as "moe.top_k" is a path."""
    values = copy.deepcopy(to_mapping(llama4_toy()))
    for path, value in changes.items():
        *parents, name = path.split(".")
        target = values
        for parent in parents:
            target = target[parent]
        target[name] = value
    return values


def layers(config: DecoderConfig) -> list[tuple[Any, Any]]:
    return [(layer.mixer, layer.ffn) for layer in config.layers]


ROPE_DENSE, ROPE_MOE, NOPE_DENSE, NOPE_MOE = [(m, f) for m in ("chunked_rope", "nope") for f in ("dense", "moe")]


@pytest.mark.parametrize(
    ("step", "interval", "expected"),
    [
        (1, 4, [ROPE_MOE, ROPE_MOE, ROPE_MOE, NOPE_MOE, ROPE_MOE, ROPE_MOE]),
        (2, 4, [ROPE_DENSE, ROPE_MOE, ROPE_DENSE, NOPE_MOE, ROPE_DENSE, ROPE_MOE]),
        (3, 2, [ROPE_DENSE, NOPE_DENSE, ROPE_MOE, NOPE_DENSE, ROPE_DENSE, NOPE_MOE]),
        (0, 0, [ROPE_DENSE] * 6),
        (0, 1, [NOPE_DENSE] * 6),
        (7, 7, [ROPE_DENSE] * 6),
    ],
)
def test_intervals_expand_with_the_phase_of_llama_4(step: int, interval: int, expected: list[tuple[str, str]]) -> None:
    config = llama4_toy(num_layers=6, interleave_moe_layer_step=step, nope_layer_interval=interval)
    assert layers(config) == expected


def test_the_first_layers_may_be_dense_whatever_the_interval_says() -> None:
    config = llama4_toy(num_layers=6, interleave_moe_layer_step=2, nope_layer_interval=4, first_dense_layers=3)
    assert layers(config) == [ROPE_DENSE, ROPE_DENSE, ROPE_DENSE, NOPE_MOE, ROPE_DENSE, ROPE_MOE]
    assert {ffn for _, ffn in layers(dataclasses.replace(config, first_dense_layers=6))} == {"dense"}


def test_with_the_widths_of_latent_attention_all_layers_have_it() -> None:
    config = from_mapping(DecoderConfig, mapping(**WITH_MLA), "model")
    assert layers(config) == [("mla", "dense"), ("mla", "moe"), ("mla", "dense"), ("mla", "moe")]
    assert config.head_dim == 6 + 4
    assert from_mapping(DecoderConfig, to_mapping(config)) == config


def test_a_pattern_is_tiled_over_the_layers() -> None:
    pattern = (
        LayerConfig("chunked_rope", "dense"),
        LayerConfig("rope", "moe"),
        LayerConfig("chunked_nope", "dense_twin"),
    )
    config = llama4_toy(num_layers=5, pattern=pattern, interleave_moe_layer_step=None, nope_layer_interval=None)
    assert layers(config) == [
        ("chunked_rope", "dense"),
        ("rope", "moe"),
        ("chunked_nope", "dense_twin"),
        ("chunked_rope", "dense"),
        ("rope", "moe"),
    ]


@given(step=st.integers(0, 5), interval=st.integers(0, 5), num_layers=st.integers(1, 12))
def test_the_expanded_list_is_a_pattern_of_the_same_model(step: int, interval: int, num_layers: int) -> None:
    sugar = llama4_toy(num_layers=num_layers, interleave_moe_layer_step=step, nope_layer_interval=interval)
    written = dataclasses.replace(sugar, pattern=sugar.layers, interleave_moe_layer_step=None, nope_layer_interval=None)
    assert written.layers == sugar.layers


def test_dense_twin_replaces_moe_layers_only() -> None:
    twin = llama4_toy(dense_twin=True)
    assert layers(twin) == [
        ("chunked_rope", "dense"),
        ("chunked_rope", "dense_twin"),
        ("chunked_rope", "dense"),
        ("nope", "dense_twin"),
    ]
    assert twin.ffn_width("dense_twin") == 32 + 32
    assert twin.ffn_width("dense") == 64


@pytest.mark.parametrize(("top_k", "shared", "width"), [(1, None, 64), (2, None, 96), (2, 0, 64), (3, 8, 104)])
def test_width_of_the_dense_twin(top_k: int, shared: int | None, width: int) -> None:
    moe = MoEConfig(num_experts=4, hidden_dim=32, top_k=top_k, shared_hidden_dim=shared)
    assert llama4_toy(moe=moe, dense_twin=True).ffn_width("dense_twin") == width


def test_published_schedules() -> None:
    scout, maverick = layers(llama4_scout()), layers(llama4_maverick())
    assert scout == [NOPE_MOE if i % 4 == 3 else ROPE_MOE for i in range(48)]
    assert [i for i, (_, ffn) in enumerate(maverick) if ffn == "moe"] == list(range(1, 48, 2))
    assert [i for i, (mixer, _) in enumerate(maverick) if mixer == "nope"] == list(range(3, 48, 4))
    assert llama4_scout().attention.qk_norm and not llama4_maverick().attention.qk_norm


@pytest.mark.parametrize("config", [llama4_toy(), llama4_scout(), llama4_maverick()], ids=["toy", "scout", "maverick"])
def test_round_trip(config: DecoderConfig) -> None:
    assert from_mapping(DecoderConfig, to_mapping(config)) == config


def test_round_trip_of_a_pattern_with_custom_modules() -> None:
    own = {"type": "package.module.Class", "width": 3, "nested": {"a": [1, 2]}}
    config = llama4_toy(
        pattern=(LayerConfig(own, "moe"), LayerConfig("chunked_rope", own)),
        interleave_moe_layer_step=None,
        nope_layer_interval=None,
        moe=MoEConfig(num_experts=4, hidden_dim=8, router=own),
    )
    assert from_mapping(DecoderConfig, to_mapping(config)) == config


WITHOUT_INTERVALS = {"interleave_moe_layer_step": None, "nope_layer_interval": None}
MLA = {"kv_lora_rank": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
ALONE: dict[str, Any] = {
    "attention.num_kv_heads": None,
    "attention.head_dim": None,
    "attention.qk_norm": False,
    "attention.attention_chunk_size": None,
    "attention.temperature": None,
    "nope_layer_interval": 0,
}
WITH_MLA = {"attention.mla": MLA, **ALONE}
YARN = {"factor": 8.0, "original_length": 64, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}

BAD: list[tuple[dict[str, Any], str]] = [
    ({"vocab_size": 0}, r"model\.vocab_size=0: must be a number > 0"),
    ({"dim": -3}, r"model\.dim=-3: must be a number > 0"),
    ({"dim": "wide"}, r"model\.dim: found 'wide' \(str\); must be an integer"),
    ({"dim": 32.5}, r"model\.dim: found 32\.5 \(float\); must be an integer"),
    ({"num_layers": 0}, r"model\.num_layers=0: must be a number > 0"),
    ({"hidden_dim": 0}, r"model\.hidden_dim=0: must be a number > 0"),
    ({"norm_eps": 0}, r"model\.norm_eps=0\.0: must be a number > 0"),
    ({"norm_eps": 1e-300}, r"model\.norm_eps=1e-300: must be a number from 1e-20 to 1"),
    ({"norm_eps": 1e300}, r"model\.norm_eps=1e\+300: must be a number from 1e-20 to 1"),
    ({"attention.rope_theta": 1e-300}, r"model\.attention\.rope_theta=1e-300: must be a number from 1 to 1e\+15"),
    ({"attention.rope_theta": 1e300}, r"model\.attention\.rope_theta=1e\+300: must be a number from 1 to 1e\+15"),
    ({"attention.temperature.attn_scale": 1e308}, r"model\.attention\.temperature\.attn_scale=1e\+308: must be"),
    ({"init_std": -1}, r"model\.init_std=-1\.0: must be a number > 0"),
    ({"activation": "swish"}, r"model\.activation: found 'swish' \(str\); must be silu \| gelu \| relu"),
    ({"tie_embeddings": 1}, r"model\.tie_embeddings: found 1 \(int\); must be true or false"),
    ({"interleave_moe_layer_step": -1}, r"model\.interleave_moe_layer_step=-1: must be a number >= 0"),
    ({"nope_layer_interval": -2}, r"model\.nope_layer_interval=-2: must be a number >= 0"),
    (
        {"nope_layer_interval": None},
        r"model\.nope_layer_interval=None: give either `pattern` or both intervals",
    ),
    (WITHOUT_INTERVALS, r"model\.interleave_moe_layer_step=None: give either `pattern` or both intervals"),
    (
        {"pattern": [{"mixer": "chunked_rope", "ffn": "moe"}]},
        r"model\.interleave_moe_layer_step=2: give either `pattern` or both intervals",
    ),
    ({"pattern": [], **WITHOUT_INTERVALS}, r"model\.pattern=\[\]: it needs at least one entry"),
    ({"moe": None}, r"model\.moe=None: the depth pattern has MoE layers"),
    (
        {"moe": None, "pattern": [{"mixer": "chunked_rope", "ffn": "dense_twin"}], **WITHOUT_INTERVALS},
        r"model\.moe=None: the depth pattern has MoE layers",
    ),
    ({"dims": 8}, r"model\.dims: unknown key \(did you mean model\.dim\?\)"),
    ({"attention.num_heads": 0}, r"model\.attention\.num_heads=0: must be a number > 0"),
    ({"attention.num_heads": 3}, r"model\.attention\.num_heads=3: must be a multiple of num_kv_heads=2"),
    (
        {"attention.num_heads": 6, "attention.head_dim": None},
        r"model\.attention\.num_heads=6: must divide dim=32 where attention\.head_dim is null",
    ),
    ({"attention.num_kv_heads": 0}, r"model\.attention\.num_kv_heads=0: must be a number > 0"),
    ({"attention.head_dim": 7}, r"model\.attention\.head_dim=7: RoPE rotates pairs"),
    ({"attention.head_dim": 0}, r"model\.attention\.head_dim=0: must be a number > 0"),
    ({"attention.rope_theta": 0}, r"model\.attention\.rope_theta=0\.0: must be a number > 0"),
    (
        {"attention.attention_chunk_size": 0},
        r"model\.attention\.attention_chunk_size=0: must be a number > 0",
    ),
    ({"attention.conv_width": -1}, r"model\.attention\.conv_width=-1: must be a number >= 0"),
    (
        {
            "attention.attention_chunk_size": None,
            "pattern": [{"mixer": "chunked_nope", "ffn": "dense"}],
            **WITHOUT_INTERVALS,
        },
        r"model\.attention\.attention_chunk_size=None: the depth pattern has chunked_nope layers",
    ),
    ({"attention.temperature.floor_scale": 0}, r"model\.attention\.temperature\.floor_scale=0: must be"),
    (
        {"attention.temperature.attn_scale": -1},
        r"model\.attention\.temperature\.attn_scale=-1\.0: must be",
    ),
    (
        {"attention.rope_scaling": {"factor": 8.0}},
        r"model\.attention\.rope_scaling\.low_freq_factor: missing",
    ),
    (
        {
            "attention.rope_scaling": {
                "factor": 8.0,
                "low_freq_factor": 4.0,
                "high_freq_factor": 1.0,
                "original_length": 8192,
            }
        },
        r"model\.attention\.rope_scaling\.high_freq_factor=1\.0: must not be below low_freq_factor=4\.0",
    ),
    (
        {"attention.rope_scaling": {"factor": 8.0, "original_length": 64}},
        r"model\.attention\.rope_scaling\.low_freq_factor: missing",
    ),
    (
        {"attention.rope_scaling": {"factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}},
        r"model\.attention\.rope_scaling\.original_length: missing",
    ),
    (
        {"attention.rope_scaling": YARN, "attention.rope_theta": 1.0},
        r"model\.attention\.rope_theta=1\.0: must be a number > 1 with YaRN",
    ),
    ({"attention.window": 0}, r"model\.attention\.window=0: must be a number > 0"),
    (
        {"pattern": [{"mixer": "windowed_rope", "ffn": "moe"}], **WITHOUT_INTERVALS},
        r"model\.attention\.window=None: the depth pattern has windowed_rope layers",
    ),
    (
        {"attention.sinks": True, "pattern": [{"mixer": "chunked_rope", "ffn": "moe"}], **WITHOUT_INTERVALS},
        r"model\.attention\.sinks=True: must be false, as the depth pattern has chunked_rope layers",
    ),
    (
        {"moe.experts": "clamped_swiglu", "moe.backend": "sliced"},
        r"model\.moe\.backend='sliced': must be one of auto, loop, padded, grouped with experts=clamped_swiglu",
    ),
    ({"moe.experts": "clamped"}, r"model\.moe\.experts: found 'clamped' .*did you mean clamped_swiglu"),
    ({"moe.swiglu_limit": 0}, r"model\.moe\.swiglu_limit=0\.0: must be a number > 0"),
    (
        {"attention.num_head": 4},
        r"model\.attention\.num_head: unknown key \(did you mean model\.attention\.num_heads\?\)",
    ),
    ({"moe.num_experts": 0}, r"model\.moe\.num_experts=0: must be a number > 0"),
    ({"moe.hidden_dim": 0}, r"model\.moe\.hidden_dim=0: must be a number > 0"),
    ({"moe.top_k": 0}, r"model\.moe\.top_k=0: must be 1 to num_experts=4"),
    ({"moe.top_k": 5}, r"model\.moe\.top_k=5: must be 1 to num_experts=4"),
    ({"moe.normalize_scores": True}, r"model\.moe\.normalize_scores=True: with top_k=1 every score is 1"),
    ({"moe.shared_hidden_dim": -1}, r"model\.moe\.shared_hidden_dim=-1: must be a number >= 0, or null"),
    ({"moe.backend": "fast"}, r"model\.moe\.backend: found 'fast' \(str\); must be auto \| loop \| padded \| grouped"),
    (
        {"moe.score_function": "tanh"},
        r"model\.moe\.score_function: found 'tanh' \(str\); must be sigmoid \| softmax",
    ),
    (
        {"moe.router": "unform"},
        r"model\.moe\.router: found 'unform' \(str\) \(did you mean uniform\?\); must be top_k \| uniform \| .*mapping",
    ),
    (
        {"moe.router": {"type": "quantil"}},
        r"model\.moe\.router\.type='quantil': must be package\.module\.Class, or one of top_k, uniform, .*quantile",
    ),
    (
        {"moe.router": {"scale": 2}},
        r"model\.moe\.router=.*: a custom module needs `type: package\.module\.Class`",
    ),
    (
        {"pattern": [{"mixer": "chunked_rope", "ffn": "moe"}, {"mixer": "ropee", "ffn": "moe"}], **WITHOUT_INTERVALS},
        r"model\.pattern\[1\]\.mixer: found 'ropee' \(str\) \(did you mean rope\?\); must be rope \| chunked_rope",
    ),
    ({"pattern": [{"mixer": "chunked_rope"}], **WITHOUT_INTERVALS}, r"model\.pattern\[0\]\.ffn: missing"),
    (
        {"pattern": [{"mixer": "chunked_rope", "fnn": "moe"}], **WITHOUT_INTERVALS},
        r"model\.pattern\[0\]\.fnn: unknown key \(did you mean model\.pattern\[0\]\.ffn\?\)",
    ),
    (
        {"pattern": [{"mixer": {"width": 3}, "ffn": "moe"}], **WITHOUT_INTERVALS},
        r"model\.pattern\[0\]\.mixer=.*: a custom module needs `type: package\.module\.Class`",
    ),
    (
        {"pattern": "rope", **WITHOUT_INTERVALS},
        r"model\.pattern: found 'rope' \(str\); must be a list of a mapping or null",
    ),
    (
        {"pattern": [{"mixer": "rope", "ffn": "moe"}], **WITHOUT_INTERVALS, "format": None},
        r"model\.format: found None",
    ),
    (
        {
            "attention.attention_chunk_size": None,
            "pattern": [{"mixer": "chunked_rope", "ffn": "moe"}],
            **WITHOUT_INTERVALS,
        },
        r"model\.attention\.attention_chunk_size=None: the depth pattern has chunked_rope layers",
    ),
    ({"attention.mla": MLA}, r"model\.attention\.num_kv_heads=2: must be null beside attention\.mla"),
    ({**WITH_MLA, "attention.qk_norm": True}, r"model\.attention\.qk_norm=True: must be false beside attention\.mla"),
    ({**WITH_MLA, "attention.conv_width": 3}, r"model\.attention\.conv_width=3: must be 0 beside attention\.mla"),
    ({**WITH_MLA, "attention.clip_qkv": 3.0}, r"model\.attention\.clip_qkv=3\.0: must be null beside attention\.mla"),
    ({**WITH_MLA, "nope_layer_interval": 2}, r"model\.attention\.mla: must be null where layers have the mixer nope"),
    (
        {**ALONE, "pattern": [{"mixer": "mla", "ffn": "moe"}], **WITHOUT_INTERVALS},
        r"model\.attention\.mla=None: the depth pattern has mla layers",
    ),
    ({**WITH_MLA, "attention.mla": {**MLA, "qk_rope_head_dim": 3}}, r"mla\.qk_rope_head_dim=3: must be even"),
    ({**WITH_MLA, "attention.mla": {**MLA, "q_lora_rank": 0}}, r"mla\.q_lora_rank=0: must be a number > 0"),
    ({**WITH_MLA, "attention.mla": {"kv_lora_rank": 8}}, r"model\.attention\.mla\.qk_nope_head_dim: missing"),
    ({"first_dense_layers": -1}, r"model\.first_dense_layers=-1: must be a number >= 0"),
    (
        {"first_dense_layers": 1, "pattern": [{"mixer": "chunked_rope", "ffn": "moe"}], **WITHOUT_INTERVALS},
        r"model\.first_dense_layers=1: must be .* 0 beside a pattern",
    ),
    ({"moe.dispatcher": {"scale": 2}}, r"model\.moe\.dispatcher=.*: a custom module needs `type"),
    ({"moe.router": "uniform", "moe.expert_bias": True}, r"model\.moe\.expert_bias=True: router=uniform has no"),
]


def unversioned(**changes: Any) -> dict[str, Any]:
    values = mapping(**changes)
    del values["format"]
    return values


def test_rope_beside_chunks_is_refused_where_the_format_is_not_said() -> None:
    """Before format 2 `rope` meant chunk-local attention: the same words would make another model."""
    pattern = [{"mixer": "rope", "ffn": "moe"}, {"mixer": "nope", "ffn": "dense"}]
    changes = {"pattern": pattern, **WITHOUT_INTERVALS}
    with pytest.raises(
        InputError,
        match=r"model\.pattern: mixer rope .*say chunked_rope for the former, or format: 2 .*\+model\.format=2",
    ):
        from_mapping(DecoderConfig, unversioned(**changes), "model")
    assert from_mapping(DecoderConfig, mapping(**changes)).layers[0].mixer == "rope"
    without_chunks = unversioned(**changes, **{"attention.attention_chunk_size": None})
    assert from_mapping(DecoderConfig, without_chunks).layers[0].mixer == "rope"


def test_the_intervals_say_chunked_where_there_are_chunks() -> None:
    assert llama4_toy().layers[0].mixer == "chunked_rope"
    attention = dataclasses.replace(llama4_toy().attention, attention_chunk_size=None)
    assert llama4_toy(attention=attention).layers[0].mixer == "rope"


@pytest.mark.parametrize(("changes", "message"), BAD, ids=["; ".join(changes) for changes, _ in BAD])
def test_bad_values_name_the_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_mapping(DecoderConfig, mapping(**changes), "model")


def test_the_mapping_used_above_is_good() -> None:
    assert from_mapping(DecoderConfig, mapping(), "model") == llama4_toy()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LayerConfig(mixer="ropee", ffn="moe"), "mixer='ropee'"),  # type: ignore[arg-type]
        (lambda: LayerConfig(mixer="chunked_rope", ffn="mo"), "ffn='mo'"),  # type: ignore[arg-type]
        (lambda: MoEConfig(num_experts=2, hidden_dim=4, router="unform"), "router='unform'"),  # type: ignore[arg-type]
        (lambda: MoEConfig(num_experts=2, hidden_dim=4, top_k=3), "top_k=3"),
        (lambda: AttentionConfig(num_heads=3, num_kv_heads=2), "num_heads=3"),
    ],
    ids=["mixer", "ffn", "router", "top_k", "num_heads"],
)
def test_a_typo_in_python_is_refused_too(make: Any, message: str) -> None:
    """Otherwise "ropee" would silently build a layer without positions, and "mo" a dense FFN."""
    with pytest.raises(ValueError, match=message):
        make()


def test_odd_head_dim_is_fine_without_positions() -> None:
    attention = dataclasses.replace(llama4_toy().attention, head_dim=7)
    assert llama4_toy(attention=attention, nope_layer_interval=1).head_dim == 7


def test_custom_modules_do_not_need_moe() -> None:
    own = LayerConfig(mixer="chunked_rope", ffn={"type": "somewhere.Part"})
    assert llama4_toy(moe=None, pattern=(own,), **WITHOUT_INTERVALS).moe is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe.router": {"type": "capacity", "capacity": 2}}, r"unknown argument 'capacity'; must be one of .*factor"),
        ({"moe.router": {"type": "capacity", "capacity_factor": 0.0}}, r"capacity_factor=0.0: must be a number > 0"),
        ({"moe.router": {"type": "group_limited", "num_groups": 3, "top_groups": 1}}, r"num_groups=3: must divide"),
        (
            {"moe.router": "group_limited"},
            r"needs num_groups, top_groups; must be {type: group_limited, num",
        ),
        (
            {"moe.router": "quantile", "moe.expert_bias": True},
            r"quantile has no expert_bias; moe.expert_bias=True",
        ),
        ({"moe.router": "relu", "moe.score_function": "softmax"}, r"moe.router=relu has no score_function"),
    ],
)
def test_arguments_of_a_built_in_router_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    config = from_mapping(DecoderConfig, mapping(**changes), "model")
    with pytest.raises(InputError, match=f"layer 1 router: .*{message}"):
        build_decoder(config, device="meta")


@pytest.mark.parametrize("router", ROUTERS)
def test_shapes_of_every_router_are_those_that_are_built(router: str) -> None:
    own: dict[str, Any] = {"group_limited": {"num_groups": 2, "top_groups": 1}, "mlp": {"router_dim": 5}}
    arguments = own.get(router, {})
    changes: dict[str, Any] = {"moe.router": {"type": router, **arguments}, "moe.top_k": 2}
    if router == "top_p":
        changes["moe.score_function"] = "softmax"
    config = from_mapping(DecoderConfig, mapping(**changes), "model")
    built = build_decoder(config, device="meta")
    assert num_parameters(config) == sum(p.numel() for p in built.parameters())
    assert account(config, 16).parameters == num_parameters(config)
    assert not uncounted(config) and not custom_modules(config)
