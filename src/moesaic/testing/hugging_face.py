"""The mixture-of-experts blocks of transformers 5, as `MoEUnderTest`s. Nothing is imported before it is asked for.

`describe_transformers` recognizes them; `TRANSFORMERS` makes small ones.
"""

import copy
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.errors import InputError
from moesaic.testing.adapter import MoEUnderTest, NotApplicable
from moesaic.testing.reference import Expert, ReferenceScore, dense_moe, gated_expert

__all__ = ["DIM", "HIDDEN", "TRANSFORMERS", "describe_transformers", "load"]

DIM, HIDDEN = 16, 24

SIZES = {
    **dict.fromkeys(("hidden_size", "d_model"), DIM),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "d_ff", "moe_intermediate_size", "expert_ffn_hidden_size"), HIDDEN
    ),
    **dict.fromkeys(("ffn_hidden_size", "shared_expert_intermediate_size", "shared_intermediate_size"), HIDDEN),
    "moe_shared_expert_intermediate_size": HIDDEN,
    "moe_hidden_size": 12,
    **dict.fromkeys(("num_shared_experts", "n_shared_experts", "n_group", "topk_group", "num_expert_groups"), 1),
}
NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
TOP_K = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k", "num_experts_per_token", "moe_top_k")
"""What configurations call these; each gets those that it has."""

REQUIREMENT = "transformers>=5.23,<6"

HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}
"""For configurations that check the attention as well."""

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Block:
    """One block: where it is, and how its router scores; without `score` no reference of it is known here."""

    package: str
    config: str
    name: str
    score: ReferenceScore | None = None
    normalizes: bool = False
    """Unless the block says so itself, by norm_topk_prob."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Values of its configuration, beyond sizes."""
    layer: int = 1
    """Which layer of the model, where that is asked for."""


BLOCKS: dict[str, Block] = {
    "afmoe": Block("afmoe", "AfmoeConfig", "AfmoeSparseMoeBlock", "sigmoid", normalizes=True),
    "aria": Block("aria", "AriaTextConfig", "AriaTextMoELayer", arguments=HEADS),
    "axk1": Block("axk1", "AXK1Config", "AXK1MoE"),
    "axk2": Block("axk2", "AXK2Config", "AXK2MoE", "sigmoid", normalizes=True),
    "bailing-hybrid": Block("bailing_hybrid", "BailingHybridConfig", "BailingHybridMoE", "sigmoid", normalizes=True),
    "beam": Block("beam", "BeamConfig", "BeamMoE", "sigmoid", normalizes=True),
    "cohere2-moe": Block("cohere2_moe", "Cohere2MoeConfig", "Cohere2MoeSparseMoeBlock"),
    "dbrx": Block("dbrx", "DbrxConfig", "DbrxFFN"),
    "deepseek-ocr2": Block("deepseek_ocr2", "DeepseekOcr2TextConfig", "DeepseekOcr2TextMoe", arguments=HEADS),
    "deepseek-v2": Block("deepseek_v2", "DeepseekV2Config", "DeepseekV2Moe", arguments=HEADS),
    "deepseek-v3": Block("deepseek_v3", "DeepseekV3Config", "DeepseekV3MoE", "sigmoid", normalizes=True),
    "deepseek-v32": Block("deepseek_v32", "DeepseekV32Config", "DeepseekV32MoE", "sigmoid", normalizes=True),
    "deepseek-v4": Block(
        "deepseek_v4", "DeepseekV4Config", "DeepseekV4SparseMoeBlock", "sqrt_softplus", normalizes=True, layer=5
    ),
    "doge": Block("doge", "DogeConfig", "DogeCDMoE"),
    "dots1": Block("dots1", "Dots1Config", "Dots1MoE", "sigmoid"),
    "dots3-note": Block("dots3_note", "Dots3NoteTextConfig", "Dots3NoteTextMoE"),
    "ernie4-5-moe": Block(
        "ernie4_5_moe", "Ernie4_5_MoeConfig", "Ernie4_5_MoeSparseMoeBlock", "softmax", normalizes=True
    ),
    "exaone-moe": Block("exaone_moe", "ExaoneMoeConfig", "ExaoneMoeSparseMoEBlock", "sigmoid", normalizes=True),
    "flex-olmo": Block("flex_olmo", "FlexOlmoConfig", "FlexOlmoSparseMoeBlock", "softmax"),
    "flint": Block("flint", "FlintConfig", "FlintSparseMoeBlock", "sigmoid", normalizes=True),
    "glm4-moe": Block("glm4_moe", "Glm4MoeConfig", "Glm4MoeMoE", "sigmoid", normalizes=True),
    "glm4-moe-lite": Block("glm4_moe_lite", "Glm4MoeLiteConfig", "Glm4MoeLiteMoE", "sigmoid", normalizes=True),
    "glm4v-moe": Block("glm4v_moe", "Glm4vMoeTextConfig", "Glm4vMoeTextMoE", "sigmoid", normalizes=True),
    "glm5-next": Block("glm5_next", "Glm5NextTextConfig", "Glm5NextTextMoE"),
    "glm-moe-dsa": Block("glm_moe_dsa", "GlmMoeDsaConfig", "GlmMoeDsaMoE", "sigmoid", normalizes=True),
    "gpt-oss": Block("gpt_oss", "GptOssConfig", "GptOssMLP", "softmax", normalizes=True),
    "granitemoe": Block("granitemoe", "GraniteMoeConfig", "GraniteMoeMoE", "softmax", normalizes=True),
    "granitemoe-swa": Block("granitemoe_swa", "GraniteMoeSWAConfig", "GraniteMoeSWAMoE", "softmax", normalizes=True),
    "granitemoehybrid": Block(
        "granitemoehybrid", "GraniteMoeHybridConfig", "GraniteMoeHybridMoE", arguments={"mamba_n_heads": 4}
    ),
    "granitemoeshared": Block(
        "granitemoeshared", "GraniteMoeSharedConfig", "GraniteMoeSharedMoE", "softmax", normalizes=True
    ),
    "hunyuan-v1-moe": Block("hunyuan_v1_moe", "HunYuanMoEV1Config", "HunYuanMoEV1Moe", "softmax", normalizes=True),
    "hy-v3": Block("hy_v3", "HYV3Config", "HYV3MoE", "sigmoid", normalizes=True),
    "hy-v4": Block("hy_v4", "HYV4Config", "HYV4MoE", "sigmoid", normalizes=True),
    "inkling": Block("inkling", "InklingTextConfig", "InklingMoE"),
    "inkling2": Block("inkling2", "Inkling2TextConfig", "Inkling2SparseMoeBlock"),
    "jamba": Block("jamba", "JambaConfig", "JambaSparseMoeBlock", "softmax"),
    "jetmoe": Block("jetmoe", "JetMoeConfig", "JetMoeMoE"),
    "kimi-linear": Block("kimi_linear", "KimiLinearConfig", "KimiLinearMoE", "sigmoid", normalizes=True),
    "kolibri1": Block("kolibri1", "Kolibri1Config", "Kolibri1SparseMoeBlock"),
    "laguna": Block("laguna", "LagunaConfig", "LagunaSparseMoeBlock", "sigmoid", normalizes=True),
    "lfm2-moe": Block("lfm2_moe", "Lfm2MoeConfig", "Lfm2MoeSparseMoeBlock", "sigmoid", normalizes=True),
    "llama4": Block("llama4", "Llama4TextConfig", "Llama4TextMoe", "sigmoid"),
    "longcat-flash": Block(
        "longcat_flash", "LongcatFlashConfig", "LongcatFlashMoE", "softmax", arguments={"zero_expert_num": 2}
    ),
    "mellum": Block("mellum", "MellumConfig", "MellumSparseMoeBlock", "softmax", normalizes=True),
    "mimo-v2-flash": Block("mimo_v2_flash", "MiMoV2FlashConfig", "MiMoV2FlashMoE", "sigmoid", normalizes=True),
    "minimax": Block("minimax", "MiniMaxConfig", "MiniMaxSparseMoeBlock", "softmax", normalizes=True),
    "minimax-m2": Block("minimax_m2", "MiniMaxM2Config", "MiniMaxM2SparseMoeBlock", "sigmoid", normalizes=True),
    "minimax-m3-vl": Block("minimax_m3_vl", "MiniMaxM3VLTextConfig", "MiniMaxM3VLSparseMoeBlock"),
    "mistral4": Block("mistral4", "Mistral4Config", "Mistral4MoE", "softmax", normalizes=True),
    "mistral-large4": Block(
        "mistral_large4", "MistralLarge4TextConfig", "MistralLarge4TextMoE", "softmax", normalizes=True
    ),
    "mixtral": Block("mixtral", "MixtralConfig", "MixtralSparseMoeBlock", "softmax", normalizes=True),
    "muse-spark": Block(
        "muse_spark", "MuseSparkTextConfig", "MuseSparkMoE", "sigmoid", normalizes=True, arguments=HEADS
    ),
    "nemotron-h": Block("nemotron_h", "NemotronHConfig", "NemotronHMoE", "sigmoid", normalizes=True),
    "nllb-moe": Block("nllb_moe", "NllbMoeConfig", "NllbMoeSparseMLP"),
    "olmoe": Block("olmoe", "OlmoeConfig", "OlmoeSparseMoeBlock", "softmax"),
    "openai-privacy-filter": Block("openai_privacy_filter", "OpenAIPrivacyFilterConfig", "OpenAIPrivacyFilterMLP"),
    "phimoe": Block("phimoe", "PhimoeConfig", "PhimoeSparseMoeBlock"),
    "qwen2-moe": Block("qwen2_moe", "Qwen2MoeConfig", "Qwen2MoeSparseMoeBlock", "softmax"),
    "qwen3-5-moe": Block("qwen3_5_moe", "Qwen3_5MoeTextConfig", "Qwen3_5MoeSparseMoeBlock", "softmax", normalizes=True),
    "qwen3": Block("qwen3_moe", "Qwen3MoeConfig", "Qwen3MoeSparseMoeBlock", "softmax"),
    "qwen3-next": Block("qwen3_next", "Qwen3NextConfig", "Qwen3NextSparseMoeBlock", "softmax", normalizes=True),
    "qwen3-omni-moe": Block("qwen3_omni_moe", "Qwen3OmniMoeTextConfig", "Qwen3OmniMoeThinkerTextSparseMoeBlock"),
    "qwen3-vl-moe": Block(
        "qwen3_vl_moe", "Qwen3VLMoeTextConfig", "Qwen3VLMoeTextSparseMoeBlock", "softmax", normalizes=True
    ),
    "qwen4-exp": Block("qwen4_exp", "Qwen4ExpTextConfig", "Qwen4ExpTextSparseMoeBlock", "softmax", normalizes=True),
    "solar-open": Block("solar_open", "SolarOpenConfig", "SolarOpenMoE", "sigmoid", normalizes=True),
    "step3p7": Block("step3p7", "Step3p7TextConfig", "Step3p7SparseMoeBlock", "sigmoid", normalizes=True),
    "switch-transformers": Block("switch_transformers", "SwitchTransformersConfig", "SwitchTransformersSparseMLP"),
    "unlimited-ocr": Block("unlimited_ocr", "UnlimitedOcrTextConfig", "UnlimitedOcrTextMoe", arguments=HEADS),
    "zaya": Block("zaya", "ZayaConfig", "ZayaSparseMoeBlock", arguments={"num_experts_per_tok": 1}),
}


def describe_transformers(module: nn.Module) -> MoEUnderTest | None:
    """What is known of a mixture-of-experts block of transformers 5.x; None for any other module."""
    kind = type(module)
    if not kind.__module__.startswith("transformers."):
        return None
    block = next((block for block in BLOCKS.values() if block.name == kind.__name__), None)
    # before 5.0 the experts were a list of modules: then nothing is known of them
    if block is None or (block.score is not None and not hasattr(module.experts, "down_proj")):
        return None
    return _llama4(module) if block.package == "llama4" else _described(block, module)


def make(name: str, num_experts: int = 4) -> MoEUnderTest:
    """A small block of the name in `BLOCKS`.

    Raises:
        InputError: no transformers, or one without it.
    """
    block = BLOCKS[name]
    models = load(f"transformers.models.{block.package}", REQUIREMENT)
    kind = getattr(models, block.config)
    default = kind()
    wanted = SIZES | dict.fromkeys(NUM_EXPERTS, num_experts) | dict.fromkeys(TOP_K, min(2, num_experts))
    try:
        config = kind(**{key: value for key, value in wanted.items() if hasattr(default, key)} | block.arguments)
    except Exception as error:  # of a library of theirs
        if num_experts > 1:
            raise
        raise NotApplicable(f"its configuration refuses one expert: {error}") from error
    # what their models choose where nothing is asked for; a block by itself would be left without a choice
    config._experts_implementation = "grouped_mm"
    modeling = load(f"transformers.models.{block.package}.modeling_{block.package}", REQUIREMENT)
    made = getattr(modeling, block.name)
    asked = {"layer_idx": block.layer, "ffn_dim": HIDDEN}
    taken = inspect.signature(made).parameters
    described = describe_transformers(made(config, **{key: value for key, value in asked.items() if key in taken}))
    if described is None:
        raise InputError(f"{block.name} of this transformers is not known here: must be {REQUIREMENT}")
    num_found = 0 if described.router_weight is None else described.router_weight(described.module).size(0)
    if num_experts == 1 and num_found != 1:
        raise NotApplicable("it cannot be made with one expert by the usual names")
    return described


TRANSFORMERS: dict[str, Callable[..., MoEUnderTest]] = {f"transformers-{name}": partial(make, name) for name in BLOCKS}
"""Factories of small blocks, by name."""


def load(module: str, requirement: str) -> Any:
    """Raises InputError that says what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{module} cannot be imported ({error}): pip install {requirement}") from error


def _llama4(module: Any) -> MoEUnderTest:
    def reference(w: Weights, x: Tensor) -> Tensor:
        return dense_moe(
            x,
            w["router.weight"],
            gated_expert(w["experts.gate_up_proj"], w["experts.down_proj"], module.experts.act_fn),
            top_k=module.top_k,
            score_function="sigmoid",
            score_before_experts=True,
            shared_expert=_gated_mlp(w, "shared_expert", module.shared_expert.activation_fn),
        )

    def with_one_expert() -> nn.Module:
        one = copy.deepcopy(module)
        one.top_k = one.router.top_k = one.num_experts = one.router.num_experts = one.experts.num_experts = 1
        one.router.out_features = 1
        _keep_first_expert(one, "router.weight")
        return one

    return MoEUnderTest(
        module,
        dim=module.hidden_dim,
        reference=reference,
        router_weight=lambda module: module.router.weight,
        top_k=module.top_k,
        single_expert=with_one_expert,
    )


def _described(block: Block, module: Any) -> MoEUnderTest:
    """A block with a router of one matrix and stacked experts, or the little that is known of another one."""
    modeling: Any = sys.modules[type(module).__module__]
    router = next((getattr(module, name) for name in ("gate", "router") if hasattr(module, name)), None)
    path = _find(module, r"(gate|router)\.(\w+\.)*weight")
    if router is None or path is None:
        return MoEUnderTest(module)
    weight = module.get_parameter(path)
    bias = _find(module, r".*(e_score_correction_bias|expert_bias)")
    top_k = next((getattr(part, key) for part in (router, module) for key in TOP_K if hasattr(part, key)), None)
    grouped = max((getattr(router, name, None) or 1 for name in ("num_group", "n_group")), default=1) > 1

    def balance_loss(module: Any, x: Tensor, valid: Tensor | None) -> Tensor:
        logits = getattr(module, path.partition(".")[0])(x.flatten(0, 1))[0]
        return modeling.load_balancing_loss_func((logits,), logits.size(1), top_k, valid)

    def with_one_expert() -> nn.Module:
        one = copy.deepcopy(module)
        one.gate.top_k = one.gate.num_experts = one.experts.num_experts = 1
        _keep_first_expert(one, path)
        if bias is not None:
            one.gate.e_score_correction_bias = nn.Buffer(_get(one, bias).detach()[:1].clone())
        return one

    is_known = block.score is not None and not grouped
    can_be_cut = path == "gate.weight" and bias in (None, "gate.e_score_correction_bias")
    takes_tokens_alone = len(inspect.signature(router.forward).parameters) == 1
    has_balance = hasattr(modeling, "load_balancing_loss_func") and path == "gate.weight" and takes_tokens_alone
    return MoEUnderTest(
        module,
        dim=weight.size(1),
        reference=partial(_reference, block, module, path, bias, top_k) if is_known and top_k else None,
        router_weight=lambda module: module.get_parameter(path),
        top_k=top_k,
        balance_loss=balance_loss if has_balance else None,
        expert_bias=None if bias is None else lambda module: _get(module, bias).view(-1),
        single_expert=with_one_expert if is_known and can_be_cut else None,
    )


def _reference(block: Block, module: Any, path: str, bias: str | None, top_k: int, w: Weights, x: Tensor) -> Tensor:
    router = getattr(module, path.partition(".")[0])
    parts = (router, module)
    scales = ("routed_scaling_factor", "router_scaling_factor", "route_scale")
    normalizes = (getattr(part, "norm_topk_prob") for part in parts if hasattr(part, "norm_topk_prob"))  # noqa: B009
    assert block.score is not None
    return dense_moe(
        x,
        w[path] * getattr(router, "output_multiplier", 1.0),
        _expert(module, w),
        top_k=top_k,
        score_function=block.score,
        normalize_scores=next(normalizes, block.normalizes),
        scale=next((getattr(part, name) for part in parts for name in scales if hasattr(part, name)), 1.0),
        router_bias=w.get("router.bias"),
        expert_bias=None if bias is None else w[bias].flatten(),
        shared_expert=_shared(module, w),
    )


def _expert(module: Any, w: Weights) -> Expert:
    experts = module.experts
    activation = getattr(experts, "act_fn", F.silu)
    if "experts.gate_up_proj" not in w:  # Nemotron-H: not gated
        up, down = w["experts.up_proj"], w["experts.down_proj"]
        return lambda e, rows: activation(rows @ up[e].T) @ down[e].T
    gate_up, down = w["experts.gate_up_proj"], w["experts.down_proj"]
    if "experts.gate_up_proj_bias" in w:  # gpt-oss: biases, gate and up by turns
        return lambda e, rows: (
            experts._apply_gate(rows @ gate_up[e] + w["experts.gate_up_proj_bias"][e]) @ down[e]
            + w["experts.down_proj_bias"][e]
        )
    if hasattr(experts, "zero_expert_num"):  # LongCat: the last ones are identities
        routed = experts.num_routed_experts
        plain = gated_expert(gate_up.transpose(1, 2), down.transpose(1, 2), activation)
        return lambda e, rows: plain(e, rows) if e < routed else rows
    if (limit := _limit(experts)) is not None:  # DeepSeek-V4: clamped

        def clamped(e: int, rows: Tensor) -> Tensor:
            gate, up = (rows @ gate_up[e].T).chunk(2, dim=-1)
            return (activation(gate.clamp(max=limit)) * up.clamp(-limit, limit)) @ down[e].T

        return clamped
    expert = gated_expert(gate_up.transpose(1, 2), down.transpose(1, 2), activation)
    if "pre_expert_proj.weight" in w:  # Muse Spark: in a narrower width, with norms
        gain = w["experts.post_expert_norm.weight"]

        def between(e: int, rows: Tensor) -> Tensor:
            rows = _normed(rows @ w["pre_expert_proj.weight"].T, module.pre_expert_norm.eps)
            rows = expert(e, rows * (1 + w["pre_expert_norm.weight"]))
            return _normed(rows * (1 + gain), experts.post_expert_norm.eps) @ w["post_expert_proj.weight"].T

        return between
    return expert


def _shared(module: Any, w: Weights) -> Callable[[Tensor], Tensor] | None:
    """The shared expert, gated or not, with a gate of its own or not."""
    for name in ("shared_expert", "shared_experts", "shared_mlp"):
        if f"{name}.down_proj.weight" not in w:
            continue
        shared = getattr(module, name)
        activation = getattr(shared, "act_fn", F.silu)
        if f"{name}.gate_proj.weight" not in w:
            up, down = w[f"{name}.up_proj.weight"], w[f"{name}.down_proj.weight"]
            return lambda x: activation(x @ up.T) @ down.T
        run = _gated_mlp(w, name, activation, _limit(shared))
        return partial(_behind_a_gate, run, w["shared_expert_gate.weight"]) if "shared_expert_gate.weight" in w else run
    return None


def _behind_a_gate(run: Callable[[Tensor], Tensor], gate: Tensor, x: Tensor) -> Tensor:
    return run(x) * (x @ gate.T).sigmoid()


def _gated_mlp(
    w: Weights, prefix: str, activation: Callable[[Tensor], Tensor], limit: float | None = None
) -> Callable[[Tensor], Tensor]:
    gate, up, down = (w[f"{prefix}.{name}_proj.weight"] for name in ("gate", "up", "down"))
    if limit is not None:
        return lambda x: (activation((x @ gate.T).clamp(max=limit)) * (x @ up.T).clamp(-limit, limit)) @ down.T
    return lambda x: (activation(x @ gate.T) * (x @ up.T)) @ down.T


def _limit(part: nn.Module) -> float | None:
    """What clamps gate and up, if anything does."""
    found: float | None = getattr(part, "limit", getattr(part, "swiglu_limit", None))
    return found


def _normed(x: Tensor, eps: float) -> Tensor:
    return x * (x.square().mean(dim=-1, keepdim=True) + eps).rsqrt()


def _find(module: nn.Module, pattern: str) -> str | None:
    """The first parameter or buffer whose whole name fits."""
    names = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    return next((name for name in names if re.fullmatch(pattern, name)), None)


def _get(module: nn.Module, path: str) -> Tensor:
    owner, _, leaf = path.rpartition(".")
    found: Tensor = getattr(module.get_submodule(owner), leaf)
    return found


def _keep_first_expert(module: nn.Module, router: str) -> None:
    for name in (router, "experts.gate_up_proj", "experts.down_proj"):
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, nn.Parameter(_get(module, name).detach()[:1].clone()))
