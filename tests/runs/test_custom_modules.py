"""Custom modules through training: what steps them, the record of their source, and what changed code does."""

import copy
import csv
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from torch import Tensor

from moesaic.checkpoints import load_checkpoint, load_model
from moesaic.config import from_mapping
from moesaic.errors import InputError
from moesaic.imports import trusting
from moesaic.layers import Routing, TopKRouter, parameter_kinds
from moesaic.models import DecoderConfig, LayerConfig, account, build_decoder, llama4_toy
from moesaic.models.custom import Source, custom_modules, sources
from moesaic.studies.jobs import config_hash
from moesaic.training.config import OptimizerConfig
from moesaic.training.optimizers import describe_groups, parameter_groups
from moesaic.training.run import run

PARTS = '''
import torch
from torch import nn


class Router(nn.Module):
    """Cosine similarity to a key per expert; the last slot of some tokens has no expert."""

    def __init__(self, dim, num_experts, top_k, layer_index, num_layers, score_function):
        super().__init__()
        assert (layer_index < num_layers) and score_function == "sigmoid"
        self.num_experts, self.top_k = num_experts, top_k
        self.keys = nn.Parameter(torch.randn(num_experts, dim))
        self.register_buffer("expert_bias", torch.zeros(num_experts))

    def forward(self, x):
        logits = 8 * nn.functional.normalize(x, dim=-1) @ nn.functional.normalize(self.keys, dim=-1).T
        ids = (logits + self.expert_bias).topk(self.top_k).indices
        scores = logits.sigmoid().gather(1, ids)
        return logits, scores, ids.masked_fill(scores < 0.8, self.num_experts)


class Scan(nn.Module):
    """A token mixer with the parameters of a selective scan."""

    def __init__(self, dim, norm_eps):
        super().__init__()
        self.proj = nn.Linear(dim, dim, bias=False)
        self.conv1d = nn.Conv1d(dim, dim, 3, groups=dim)
        self.A_log = nn.Parameter(torch.zeros(dim, 2))
        self.A_log._no_weight_decay = True
        self.eps = norm_eps

    def forward(self, x):
        y = self.conv1d(nn.functional.pad(x.mT, (2, 0))).mT
        decay = torch.sigmoid(self.A_log).mean(dim=1)
        return self.proj(y * decay)
'''


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file of a user's own, outside of the package, importable as `users_parts`."""
    folder = tmp_path / "user"
    folder.mkdir()
    (folder / "users_parts.py").write_text(PARTS)
    monkeypatch.syspath_prepend(str(folder))
    yield folder / "users_parts.py"
    sys.modules.pop("users_parts", None)


PATTERN = [{"mixer": {"type": "users_parts.Scan"}, "ffn": "dense"}, {"mixer": "chunked_rope", "ffn": "moe"}]


def model(router: Any = "top_k", **moe: Any) -> DecoderConfig:
    toy = llama4_toy()
    from moesaic.config import to_mapping

    mapping = to_mapping(toy)
    mapping |= {"pattern": PATTERN, "interleave_moe_layer_step": None, "nope_layer_interval": None}
    mapping["moe"] = {**mapping["moe"], "router": router, **moe}
    return from_mapping(DecoderConfig, mapping)


ROUTER = {"type": "users_parts.Router"}


def test_a_custom_router_is_stepped_as_ours(parts: Path) -> None:
    """The same group, so that a comparison of routers compares routers."""
    groups = {}
    for router in ("top_k", ROUTER):
        decoder = build_decoder(model(router))
        names = {id(p): name for name, p in decoder.named_parameters()}
        for group in parameter_groups(decoder, OptimizerConfig()):
            for parameter in group["params"]:
                if ".router." in names[id(parameter)]:
                    groups[names[id(parameter)].rpartition(".")[2]] = {k: v for k, v in group.items() if k != "params"}
    assert (
        groups["weight"]
        == groups["keys"]
        == {
            "name": "outputs",
            "weight_decay": 0.1,
            "muon": False,
            "lr": 1.6e-2,
        }
    )


def test_a_scans_filters_and_rates_are_no_matrices(parts: Path) -> None:
    said = describe_groups(build_decoder(model(ROUTER)), OptimizerConfig())
    matrices, outputs, vectors, _ = said.splitlines()
    assert matrices.startswith("matrices: muon at 0.004, decay 0.1: layers.*.mixer")
    assert matrices.endswith(" other tensors"), "what users wrote is named, however many modules of ours there are"
    assert outputs == "outputs: adamw at 0.016, decay 0.1: layers.*.ffn.router, head"
    assert vectors.startswith("vectors: adamw at 0.016, decay 0: ")
    assert "layers.*.mixer, layers.*.mixer.conv1d" in vectors


def test_flops_of_custom_parts_count(parts: Path) -> None:
    config = model(ROUTER)
    found, ours = account(config, 16), account(model(), 16)
    dim, experts, hidden = config.dim, 4, 32
    scan = found.layers[0]
    assert scan.matmul_flops + scan.attention_flops - 2 * 3 * dim * 64 == pytest.approx(2 * dim * dim + 2 * 3 * dim)
    per_expert = 2 * 3 * dim * hidden
    assert ours.layers[1].matmul_flops - found.layers[1].matmul_flops == pytest.approx(per_expert / 2, rel=0.5), (
        "half of the tokens have no expert"
    )
    assert found.layers[1].ffn.endswith("router users_parts.Router")
    assert found.layers[1].assumed == ()
    assert found.parameters == sum(p.numel() for p in build_decoder(config).parameters())
    assert experts == config.moe.num_experts  # type: ignore[union-attr]


@pytest.fixture
def trained(parts: Path, composed: Callable[..., dict[str, Any]], tmp_path: Path) -> tuple[dict[str, Any], Path]:
    """A run of a model with a custom mixer and router: its config and directory."""
    run_dir = tmp_path / "run"
    config = composed(
        "model.interleave_moe_layer_step=null",
        "model.nope_layer_interval=null",
        "model.pattern=[{mixer: {type: users_parts.Scan}, ffn: dense}, {mixer: chunked_rope, ffn: moe}]",
        "model.moe.router={type: users_parts.Router}",
        "model.moe.expert_bias=true",
        "balance.expert_bias_update_rate=0.01",
        f"run_dir={run_dir}",
    )
    assert run(config, Console(quiet=True))["status"] == "finished"
    return config, run_dir


@pytest.mark.slow
def test_a_run_keeps_the_source_and_refuses_another(trained: tuple[dict[str, Any], Path], parts: Path) -> None:
    config, run_dir = trained
    last = run_dir / "checkpoints" / "last.ckpt"
    checkpoint = load_checkpoint(last)
    assert (run_dir / "sources" / "users_parts.py").read_text() == PARTS
    hashes = {path: source.sha256 for path, source in sources(load_model(last, trust=["users_parts"]).config).items()}
    assert hashes.keys() == {"users_parts.Scan", "users_parts.Router"}
    assert checkpoint["moesaic"]["sources"] == hashes
    biases = [v for k, v in checkpoint["state_dict"].items() if k.endswith("router.expert_bias")]
    with (run_dir / "metrics.csv").open(newline="") as file:
        shares = [float(row["router/layers.1.ffn/no_expert_share"] or "nan") for row in csv.DictReader(file)]
    assert all(0 <= share <= 1 for share in shares if share == share)
    assert any(share > 0 for share in shares), "some tokens have no expert"
    assert biases and all(bool(bias.abs().sum() > 0) for bias in biases), "balancing moved the custom router's bias"
    before = config_hash(config)

    parts.write_text(PARTS + "# changed\n")
    assert config_hash(config) != before, "changed code is another arm of a study"
    with pytest.raises(InputError, match=r"the source file of users_parts\.Scan, users_parts\.Router has") as refused:
        load_model(last, trust=["users_parts"])
    trust = str(refused.value).split("trust=")[1].strip("[]").split(",")
    assert len(load_model(last, trust=trust).decoder.layers) == 4, "what the message says to type works"
    with pytest.raises(InputError, match="must be as it was"):
        load_model(last, trust=["users_parts", f"users_parts.Scan@{'0' * 12}", trust[1]])
    more = {**config, "run_dir": None, "ckpt_path": str(last)}
    more["training"] = {**config["training"], "steps": config["training"]["steps"] + 2}
    with pytest.raises(InputError, match=r"source file of users_parts\.Scan, users_parts\.Router has changed since"):
        run(more, Console(quiet=True))

    parts.write_text(PARTS)
    assert run(more, Console(quiet=True))["status"] == "finished"


def test_helpers_of_the_user_count_as_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "users_package"
    (package / "inner").mkdir(parents=True)
    for name, text in {
        "__init__.py": "",
        "parts.py": "import math\nimport torch\nimport users_other\n"
        "from .inner import gates\nfrom users_package import far\n"
        "class Mixer(torch.nn.Module):\n    def forward(self, x):\n        return gates.gate(x)\n",
        "inner/__init__.py": "",
        "inner/gates.py": "from ..deep import gate\n",
        "deep.py": "def gate(x):\n    return x\n",
        "far.py": "",
        "unused.py": "",
    }.items():
        (package / name).write_text(text)
    (tmp_path / "users_other.py").write_text("")
    single = "import users_other\nfrom users_package.parts import Mixer as Base\nclass Mixer(Base): ...\n"
    (tmp_path / "users_single.py").write_text(single)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)

    def found(path: str) -> Source:
        layer = LayerConfig({"type": path}, "dense")
        toy = llama4_toy(pattern=(layer,), interleave_moe_layer_step=None, nope_layer_interval=None)
        (source,) = sources(toy).values()
        return source

    try:
        inside = found("users_package.parts.Mixer")
        ours = {f"users_package{name}" for name in ("", ".parts", ".inner", ".inner.gates", ".deep", ".far")}
        assert inside.files.keys() == ours, "other packages and what is not imported are left out"
        assert found("users_single.Mixer").files.keys() == ours | {"users_single", "users_other"}
        (package / "deep.py").write_text("def gate(x):\n    return 2 * x\n")
        assert found("users_package.parts.Mixer").sha256 != inside.sha256
    finally:
        for name in set(sys.modules) - before:
            sys.modules.pop(name)


@pytest.mark.slow
def test_the_stored_config_says_its_format(trained: tuple[dict[str, Any], Path]) -> None:
    _, run_dir = trained
    stored = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert stored["model"]["format"] == 2
    raw = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)["hyper_parameters"]
    assert raw["model"]["format"] == raw["config"]["model"]["format"] == 2


class NeedsBias(torch.nn.Module):
    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()


class HalfAMixer(torch.nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()

    def make_cache(self) -> None: ...

    def forward(self, x: torch.Tensor, cache: Any = None) -> torch.Tensor:
        return x


class FaultyRouter(TopKRouter):
    """Its state, or what it observes, is none that its place takes."""

    def __init__(self, dim: int, num_experts: int, fault: str) -> None:
        super().__init__(dim, num_experts)
        self.fault = fault

    def forward(self, x: Tensor) -> Routing:
        routing = super().forward(x)
        faults: dict[str, Any] = {"rows": routing.logits[:1], "flat": routing.logits[:, 0], "word": "state"}
        return routing._replace(state=faults.get(self.fault))

    def observe(self, routing: Routing, valid: Tensor | None) -> Any:
        return None if self.fault == "observes" else routing.tokens_per_expert

    def end_step(self, observed: Tensor) -> None:
        assert self.fault


class AsksForMore(TopKRouter):
    def forward(self, x: Tensor, mood: Tensor) -> Routing:  # type: ignore[override]
        return super().forward(x * mood)


@pytest.mark.parametrize(
    ("router", "message"),
    [
        ("FaultyRouter, fault: rows", r"model.moe.router, layer 1: FaultyRouter: state of shape \(1, 8\); must be"),
        ("FaultyRouter, fault: flat", r"model.moe.router, layer 1: FaultyRouter: state of shape \(\d+,\); must be"),
        ("FaultyRouter, fault: word", "model.moe.router, layer 1: FaultyRouter: state of type str; must be a tensor"),
        ("FaultyRouter, fault: observes", "layer 1: FaultyRouter: observe returned NoneType; must be a tensor"),
        (
            "AsksForMore",
            r"layer 1 router: .*AsksForMore: its forward\(.*missing a required argument: 'mood'; must take",
        ),
    ],
)
def test_a_faulty_router_is_named_before_the_run(
    composed: Callable[..., dict[str, Any]], tmp_path: Path, router: str, message: str
) -> None:
    given = f"model.moe.router={{type: {__name__}:{router}}}"
    with trusting([__name__]), pytest.raises(InputError, match=message):
        run(composed(given, f"run_dir={tmp_path / 'run'}"))
    assert not (tmp_path / "run").exists()


class PlainMixer(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def of_mixer(name: str, **changes: Any) -> DecoderConfig:
    layer = LayerConfig({"type": f"{__name__}.{name}"}, "dense")
    return llama4_toy(pattern=(layer,), interleave_moe_layer_step=None, nope_layer_interval=None, **changes)


def test_a_mixer_without_padding_support_is_refused_when_it_is_built() -> None:
    with pytest.raises(InputError, match=r"layer 0 mixer: .*HalfAMixer: its forward\(.*has no support for padding"):
        build_decoder(of_mixer("HalfAMixer"))
    with pytest.raises(InputError, match=r"PlainMixer: its forward.*must take \(x, cache=None, attention_mask=None\)"):
        build_decoder(of_mixer("PlainMixer", padding_token=0))


def test_a_plain_mixer_refuses_padding_before_any_layer_runs() -> None:
    decoder, tokens = build_decoder(of_mixer("PlainMixer")), torch.zeros(2, 3, dtype=torch.int64)
    assert decoder(tokens, attention_mask=torch.ones(2, 3)).logits.shape == (2, 3, 512)
    with pytest.raises(InputError, match="the mixer of layer 0, PlainMixer, has no support for padding"):
        decoder(tokens, attention_mask=torch.tensor([[0, 1, 1], [1, 1, 1]]))


def test_expert_bias_needs_a_router_that_has_one() -> None:
    from moesaic.models import MoEConfig

    moe = MoEConfig(4, 8, router={"type": f"{__name__}.NeedsBias"}, expert_bias=True)
    with pytest.raises(InputError, match=r"moe\.expert_bias=true, but .*NeedsBias has no buffer `expert_bias`"):
        build_decoder(llama4_toy(moe=moe))


def test_a_marked_parameter_stays_marked_in_copies(parts: Path) -> None:
    decoder = build_decoder(model())
    empty = build_decoder(model(), device="meta").to_empty(device="cpu")
    for one in (decoder, copy.deepcopy(decoder), empty):
        assert parameter_kinds(one)["layers.0.mixer.A_log"] == "vector"


class Counted(PlainMixer):
    built = 0

    def __init__(self) -> None:
        super().__init__()
        type(self).built += 1


def test_layers_that_are_alike_are_measured_once() -> None:
    Counted.built = 0
    account(of_mixer("Counted", num_layers=12), 16)
    assert Counted.built == 2, "without memory, to see how large it is, and then to be run"


def test_custom_modules_are_listed_by_place(parts: Path) -> None:
    assert list(custom_modules(model(ROUTER))) == ["layers.0.mixer", "layers.2.mixer", "moe.router"]
