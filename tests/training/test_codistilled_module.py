"""Codistillation inside the training module: a teacher that trains along, one that looks on, and the weight policy."""

import copy
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import distributed

from moesaic.config import from_mapping, to_mapping
from moesaic.data import with_step_counts
from moesaic.distillation import FrozenTeacher, weights_hash
from moesaic.distillation.config import DistillationConfig, teacher_mapping
from moesaic.errors import InputError
from moesaic.losses import SoftWeightConfig
from moesaic.models import Decoder, DecoderConfig, MoEConfig, build_decoder, llama4_toy
from moesaic.training.config import BalanceConfig, OptimizerConfig, RunConfig, ScheduleConfig, TrainingConfig
from moesaic.training.module import Diverged, LanguageModel

Batch = dict[str, torch.Tensor]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`.*"),
]

STUDENT = llama4_toy(moe=MoEConfig(num_experts=4, hidden_dim=32, expert_bias=True))
TEACHER = {"dim": 48, "num_layers": 2, "moe": {"num_experts": 8}}
CONSTANT = SoftWeightConfig(value=0.5)


def batches(count: int, size: int = 2, length: int = 16) -> list[Batch]:
    draw = torch.Generator().manual_seed(1)
    tokens = [torch.randint(0, 512, (size, length + 1), generator=draw) for _ in range(count)]
    return [{"tokens": t[:, :-1], "labels": t[:, 1:]} for t in tokens]


def make(
    model: DecoderConfig,
    distillation: DistillationConfig | None,
    teacher: Decoder | None = None,
    *,
    optimizer: OptimizerConfig | None = None,
    accumulate: int = 1,
    clip: float = 0.05,
    steps: int = 4,
    scope: str = "micro_batch",
) -> LanguageModel:
    config = RunConfig(
        name="test",
        model=to_mapping(model),
        training=TrainingConfig(
            steps=steps, batch_size=2, seq_len=16, accumulate=accumulate, log_every=1, gradient_clip=clip
        ),
        balance=BalanceConfig(
            load_balance_loss_weight=0.1,
            load_balance_scope=scope,  # type: ignore[arg-type]
            router_z_loss_weight=0.01,
            expert_bias_update_rate=0.01,
        ),
        optimizer=optimizer or OptimizerConfig(),
        schedule=ScheduleConfig(warmup_steps=2),
        distillation=distillation,
        seed=3,
    )
    torch.manual_seed(3)
    return LanguageModel(
        to_mapping(config), to_mapping(model), targets=None if teacher is None else FrozenTeacher(teacher)
    )


class Shared:
    """Batches that the ranks of a process group take in turn."""

    def __init__(self, data: list[Batch]) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Batch]:
        ranks = distributed.get_world_size() if distributed.is_initialized() else 1
        return iter(self.data[distributed.get_rank() :: ranks] if ranks > 1 else self.data)


def fit(
    module: LanguageModel, data: list[Batch], validation: list[Batch] | None = None, *, ranks: int = 1
) -> list[dict[str, float]]:
    """Train; returns the logged rows, none of more than one rank."""
    rows: list[dict[str, float]] = []

    class Keep(DummyLogger):
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            rows.append(dict(metrics))

    class Log(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
            module.log_step()

    trainer = pl.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="auto" if ranks == 1 else "ddp_fork",
        max_steps=len(data) // (module.config.training.accumulate * ranks),
        accumulate_grad_batches=module.config.training.accumulate,
        val_check_interval=1 if validation else None,
        num_sanity_val_steps=0,
        logger=Keep(),
        callbacks=[Log()],
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    accumulate = module.config.training.accumulate
    if accumulate > 1:
        steps = [data[i : i + accumulate] for i in range(0, len(data), accumulate)]
        data = [batch for step in steps for batch in with_step_counts(step)]
    trainer.fit(module, Shared(data), None if validation is None else Shared(validation))
    return rows


def frozen(policy: SoftWeightConfig = CONSTANT, **settings: Any) -> DistillationConfig:
    return DistillationConfig(source="frozen", teacher="somewhere", soft_weight=policy, **settings)


def joint(**settings: Any) -> DistillationConfig:
    return DistillationConfig(source="joint", **{"teacher_model": TEACHER, "soft_weight": CONSTANT, **settings})


def some_teacher(seed: int = 9) -> Decoder:
    torch.manual_seed(seed)
    return build_decoder(llama4_toy(moe=MoEConfig(num_experts=8, hidden_dim=32, expert_bias=True)))


# ---- ranks


@pytest.mark.slow_but_for("frozen")
@pytest.mark.parametrize("source", ["joint", "frozen"])
def test_two_ranks_train_as_one(source: str) -> None:
    """Gradients, running losses of the gap control, and expert biases of student and teacher are those of all ranks."""
    data = batches(6)
    policy = SoftWeightConfig(value=0.9, gap=0.5, ema=0.5)
    distillation = joint(soft_weight=policy) if source == "joint" else frozen(policy)
    teacher = some_teacher() if source == "frozen" else None
    optimizer = OptimizerConfig(eps=1e-4)  # AdamW would divide gradients that are rounding by rounding
    one, two = (make(STUDENT, distillation, teacher, optimizer=optimizer) for _ in range(2))
    begin = copy.deepcopy(one.state_dict())
    shared = zip(data[::2], data[1::2], strict=True)
    fit(one, [{name: torch.cat((value, other[name])) for name, value in each.items()} for each, other in shared])
    fit(two, data, ranks=2)
    expected, found = one.state_dict(), two.state_dict()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    moved = [name for name, value in begin.items() if not torch.equal(value, expected[name])]
    assert {"soft_weight.student_loss", "soft_weight.teacher_loss"} < set(moved)
    assert sum("expert_bias" in name for name in moved) == sum("expert_bias" in name for name in begin)


# ---- a teacher that trains along


@pytest.mark.slow_but_for("micro_batch-1-muon", "global_batch-2-adamw")
@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("scope", ["micro_batch", "global_batch"])
def test_a_teacher_that_trains_along_ends_bit_equal_to_training_alone(name: Any, accumulate: int, scope: str) -> None:
    optimizer = OptimizerConfig(name=name, learning_rate=1e-2, muon_learning_rate=1e-2)
    data = batches(4 * accumulate)
    options: dict[str, Any] = {"optimizer": optimizer, "accumulate": accumulate, "scope": scope}
    both = make(STUDENT, joint(), **options)
    assert both.teacher is not None
    begin = copy.deepcopy(both.teacher.state_dict())
    fit(both, data)
    alone = make(from_mapping(DecoderConfig, teacher_mapping(to_mapping(STUDENT), TEACHER)), None, **options)
    for key, value in alone.decoder.state_dict().items():
        assert torch.equal(value, begin[key]), key
    fit(alone, data)
    trained = both.teacher.state_dict()
    assert any("expert_bias" in key and value.abs().sum() > 0 for key, value in trained.items())
    for key, value in alone.decoder.state_dict().items():
        assert torch.equal(value, trained[key]), key
        assert not torch.equal(value, begin[key]) or "conv" in key, key


@pytest.mark.slow
def test_the_teacher_can_have_learning_rates_of_its_own() -> None:
    settings = {"teacher_learning_rate": 2e-3, "teacher_muon_learning_rate": 5e-3}
    both = make(STUDENT, joint(**settings), optimizer=OptimizerConfig(name="muon"))
    fit(both, batches(4))
    own = OptimizerConfig(name="muon", learning_rate=2e-3, muon_learning_rate=5e-3)
    alone = make(from_mapping(DecoderConfig, teacher_mapping(to_mapping(STUDENT), TEACHER)), None, optimizer=own)
    fit(alone, batches(4))
    assert both.teacher is not None
    for key, value in alone.decoder.state_dict().items():
        assert torch.equal(value, both.teacher.state_dict()[key]), key


def test_the_student_of_a_joint_run_learns_from_the_teacher_before_its_update() -> None:
    """One step of it is a step with that teacher frozen as it was."""
    both = make(STUDENT, joint(soft_weight=SoftWeightConfig(value=0.9)))
    assert both.teacher is not None
    as_it_was = copy.deepcopy(both.teacher)
    fit(both, batches(1))
    one = make(STUDENT, frozen(SoftWeightConfig(value=0.9)), as_it_was)
    fit(one, batches(1))
    plain = make(STUDENT, None)
    fit(plain, batches(1))
    differs = False
    for (key, a), b, c in zip(
        both.decoder.state_dict().items(),
        one.decoder.state_dict().values(),
        plain.decoder.state_dict().values(),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=key)
        differs |= not torch.allclose(a, c, atol=1e-5)
    assert differs


@pytest.mark.slow
def test_the_teacher_is_validated_and_its_passes_are_counted() -> None:
    both = make(STUDENT, joint())
    rows = fit(both, batches(4), batches(1))
    losses = [row["validation/teacher_loss"] for row in rows if "validation/teacher_loss" in row]
    assert len(losses) == 4
    assert 0 < losses[-1] < 8
    assert both.teacher_account is not None
    assert both.teacher_flops == 4 * 32 * both.teacher_account.training_flops
    one = make(STUDENT, frozen(), some_teacher())
    fit(one, batches(4))
    assert one.teacher_account is not None
    assert one.teacher_flops == 4 * 32 * one.teacher_account.forward_flops
    assert one.training_flops_per_token == make(STUDENT, None).training_flops_per_token


def test_a_teacher_that_diverges_is_named() -> None:
    both = make(STUDENT, joint(teacher_learning_rate=0.5))
    assert both.teacher is not None
    layer = both.teacher.layers[1]
    with torch.no_grad():
        layer.ffn_norm.weight.fill_(math.inf)
    why = r"the loss of the teacher that trains along is nan; layers.1 is the .* "
    with pytest.raises(Diverged, match=why + "Likely cause: the model itself: .* no step was made"):
        fit(both, batches(1))
    both = make(STUDENT, joint(teacher_learning_rate=1e30))
    with pytest.raises(
        Diverged, match=r"teacher that trains along.*Likely cause: distillation.teacher_learning_rate=1e"
    ):
        fit(both, batches(4))
    broken = some_teacher()
    with torch.no_grad():
        broken.layers[1].ffn_norm.weight.fill_(math.inf)
    with pytest.raises(Diverged, match=r"step 0: the loss is 6\.\d+; the loss of the teacher is nan"):
        fit(make(STUDENT, frozen(), broken), batches(1))


# ---- a teacher that looks on


def test_a_frozen_teacher_is_not_touched_and_not_kept() -> None:
    teacher = some_teacher().train()
    before = weights_hash(teacher)
    module = make(STUDENT, frozen(), teacher)
    fit(module, batches(3))
    assert weights_hash(teacher) == before, "its selection biases included"
    assert not teacher.training
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    names = {name.split(".")[0] for name in module.state_dict()}
    assert names == {"decoder", "soft_weight"}
    grouped = sum(p.numel() for g in module.trainer.optimizers[0].param_groups for p in g["params"])
    assert grouped == sum(p.numel() for p in module.decoder.parameters())
    assert set(module.logged_load) == {"layers.1.ffn", "layers.3.ffn"}
    assert all(load.numel() == 4 for load in module.logged_load.values()), "the student's experts"
    bias = module.decoder.get_buffer("layers.1.ffn.router.expert_bias")
    assert bias.abs().sum() > 0


def test_weight_zero_is_plain_training() -> None:
    module = make(STUDENT, frozen(SoftWeightConfig(value=0.0)), some_teacher())
    rows = fit(module, batches(4))
    plain = make(STUDENT, None)
    expected = fit(plain, batches(4))
    for (key, a), b in zip(plain.decoder.state_dict().items(), module.decoder.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5, msg=key)
    for row, other in zip(rows, expected, strict=True):
        assert row["train/loss"] == pytest.approx(other["train/loss"], rel=1e-5)
        assert row["distillation/hard"] == row["train/loss"]


@pytest.mark.slow_but_for("reverse_kl")
@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_the_settings_of_the_loss_arrive(divergence: str) -> None:
    weights = {}
    for settings in ({}, {"divergence": divergence}, {"divergence": divergence, "temperature": 3.0}):
        module = make(STUDENT, frozen(**settings), some_teacher())
        fit(module, batches(2))
        weights[str(settings)] = weights_hash(module.decoder)
    assert len(set(weights.values())) == 3


# ---- the weight policy


def test_the_schedule_follows_the_steps_and_the_row_says_so() -> None:
    policy = SoftWeightConfig(schedule="linear", start=0.8, end=0.0)
    rows = fit(make(STUDENT, frozen(policy), some_teacher(), accumulate=2), batches(8))
    assert [row["distillation/soft_weight"] for row in rows] == pytest.approx([0.8, 0.6, 0.4, 0.2])
    measures = ("soft_weight", "loss_gap", "hard", "soft", "teacher_loss", "agreement")
    assert all(math.isfinite(row[f"distillation/{name}"]) for row in rows for name in measures)


def test_the_gap_sees_means_over_the_global_batch_once_per_step() -> None:
    """A micro-batch with few labels counts for few; padding does not count."""
    first, second = batches(2)
    labels = second["labels"].clone()
    labels[:, 4:] = -100
    second = {**second, "labels": labels}
    module = make(STUDENT, frozen(SoftWeightConfig(value=0.5, gap=0.1)), some_teacher(), accumulate=2, steps=1)
    begin = copy.deepcopy(module.decoder)
    assert module.soft_weight is not None
    fit(module, [first, second])
    assert int(module.soft_weight.updates) == 1
    with torch.no_grad():
        both = [begin(batch["tokens"]).logits.flatten(0, 1) for batch in (first, second)]
        theirs = [some_teacher()(batch["tokens"]).logits.flatten(0, 1) for batch in (first, second)]
    all_labels = torch.cat((first["labels"].flatten(), second["labels"].flatten()))
    gap = torch.nn.functional.cross_entropy(torch.cat(both), all_labels) - torch.nn.functional.cross_entropy(
        torch.cat(theirs), all_labels
    )
    torch.testing.assert_close(module.soft_weight.loss_gap(), gap, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_gap_control_ignores_a_teacher_that_knows_less() -> None:
    module = make(STUDENT, frozen(SoftWeightConfig(value=0.9, gap=0.1, ema=0.0)), some_teacher(), steps=12, clip=1.0)
    rows = fit(module, batches(1) * 12)
    assert rows[-1]["distillation/hard"] < rows[-1]["distillation/teacher_loss"]
    assert rows[0]["distillation/soft_weight"] == 0, "nothing is known before the first step"
    assert rows[-1]["distillation/soft_weight"] == 0
    assert rows[-1]["distillation/loss_gap"] < 0


# ---- configuration


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "frozen"}, r"distillation.teacher=None: source=frozen needs one"),
        ({"source": "cached"}, r"distillation.cache=None: source=cached needs one"),
        ({"source": "joint", "teacher": "x"}, r"distillation.teacher='x': source=joint takes none"),
        ({"source": "frozen", "teacher": "x", "cache": "y"}, r"distillation.cache='y': source=frozen takes none"),
        ({"source": "frozen", "teacher": "x", "teacher_model": {"dim": 8}}, r"distillation.teacher_model=.*built"),
        ({"source": "joint", "teacher_model": {"vocab_size": 9}}, r"distillation.teacher_model.vocab_size: "),
        ({"source": "joint", "divergence": "kl"}, r"distillation.divergence='kl': must be forward_kl, "),
        ({"source": "joint", "coefficient": 1}, r"distillation.coefficient=1.0: must be 0 < value < 1"),
        ({"source": "joint", "temperature": 0}, r"distillation.temperature=0.0: must be a number > 0"),
        ({"source": "joint", "teacher_learning_rate": -1}, r"distillation.teacher_learning_rate=-1.0: must be"),
        ({"source": "joint", "soft_weight": {"value": 2}}, r"distillation.soft_weight.value=2.0: must be"),
        ({"source": "online"}, r"distillation.source: found 'online' \(str\); must be frozen \| joint \| cached"),
    ],
    ids=lambda x: "" if isinstance(x, str) else str(x),
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_mapping(DistillationConfig, settings, "distillation")


def test_teacher_model_is_merged_below_the_first_level() -> None:
    merged = teacher_mapping({"dim": 8, "moe": {"num_experts": 4, "top_k": 1}}, {"dim": 9, "moe": {"top_k": 2}})
    assert merged == {"dim": 9, "moe": {"num_experts": 4, "top_k": 2}}
    assert dataclasses.asdict(joint().weight_policy)["value"] == 0.5
