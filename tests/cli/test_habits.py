"""What hands trained on other tools type, and what each answers: the key it meant, before anything is done."""

import pytest

from moesaic.cli.arguments import as_additions, check_overrides, complete, read_flags
from moesaic.errors import InputError

HABITS = {
    # Hydra templates
    "optimizer.lr=1e-3": "did you mean optimizer.learning_rate?",
    "lr=1e-3": "did you mean optimizer.learning_rate?",
    "trainer.gpus=1": "did you mean trainer.devices?",
    "data.batch_size=4": "did you mean training.batch_size?",
    "batch_size=4": "did you mean training.batch_size?",
    "modle=small": "did you mean model?",
    "optimizer=adamw": "did you mean optimizer.name=adamw?",
    "experiment=balanceing": "did you mean balancing?",
    "debug=fdr": "did you mean debug=smoke?",
    "debug=overfit": "did you mean trainer.overfit_batches=1?",
    "trainer=ddp": "did you mean trainer.strategy=ddp trainer.devices=2?",
    "trainer=mps": "did you mean trainer.accelerator=mps?",
    "logger=wanddb": "did you mean wandb?",
    "callbacks=default": "did you mean callbacks=none?",
    "task_name=x": "did you mean name?",
    "ckpt=last.ckpt": "did you mean ckpt_path?",
    "train=false": "did you mean trainer?",
    "data.dir=texts": "did you mean data.path?",
    "exp=x": "did you mean experiment?",
    "gpu=1": "did you mean trainer.devices?",
    "wandb=true": "did you mean logger?",
    "SEED=1": "did you mean seed?",
    "random_state=1": "did you mean seed?",
    "debug=1": "did you mean debug=smoke?",
    "model=tiny": "did you mean model=study?",
    "logger=tb": "did you mean logger=tensorboard?",
    "new=my.parts:Router": "did you mean moesaic compare new=...?",
    "sample.temp=1": "did you mean sample.temperature?",
    # transformers
    "max_steps=10": "did you mean training.steps?",
    "num_train_epochs=3": "did you mean training.steps?",
    "per_device_train_batch_size=4": "did you mean training.batch_size?",
    "gradient_accumulation_steps=2": "did you mean training.accumulate?",
    "training.max_grad_norm=1": "did you mean training.gradient_clip?",
    "resume_from_checkpoint=x": "did you mean ckpt_path?",
    "model.hidden_size=64": "did you mean model.dim?",
    "model.num_hidden_layers=2": "did you mean model.num_layers?",
    "model.num_attention_heads=4": "did you mean model.attention.num_heads?",
    "model.num_key_value_heads=2": "did you mean model.attention.num_kv_heads?",
    "model.intermediate_size=64": "did you mean model.hidden_dim?",
    "model.num_local_experts=4": "did you mean model.moe.num_experts?",
    "model.moe.num_experts_per_tok=2": "did you mean model.moe.top_k?",
    "model.router_aux_loss_coef=0.1": "did you mean balance.load_balance_loss_weight?",
    # nanoGPT and its kin
    "n_layer=2": "did you mean model.num_layers?",
    "n_head=4": "did you mean model.attention.num_heads?",
    "n_embd=64": "did you mean model.dim?",
    "model.mixer={type: my.Mixer}": "did you mean model.pattern?",
    "block_size=64": "did you mean training.seq_len?",
    "grad_clip=1": "did you mean training.gradient_clip?",
    "max_iters=10": "did you mean training.steps?",
    "eval_interval=10": "did you mean training.validate_every?",
    "warmup_iters=10": "did you mean schedule.warmup_steps?",
    "dataset=stdlib": "did you mean data.source?",
    # near misses of our own names
    "model.moe.topk=2": "did you mean model.moe.top_k?",
    "model.num_experts=4": "did you mean model.moe.num_experts?",
    "training.stpes=5": "did you mean training.steps?",
    "data=stdlibs": "did you mean stdlib?",
    "data=my/code": "did you mean data=files data.path=my/code?",
    "data=my text.txt": "did you mean data=files 'data.path=my text.txt'?",
    "optimizer.warmup_steps=10": "did you mean schedule.warmup_steps?",
    # values
    "optimizer.name=adam": "did you mean optimizer.name=adamw?",
    "optimizer.name=sgd,adam": "did you mean optimizer.name=adamw?",
    "schedule.name=linear": "did you mean schedule.name=wsd schedule.decay_fraction=1?",
    "trainer.precision=bf16": "did you mean trainer.precision=bf16-mixed, or bf16-true?",
    "trainer.precision=16": "did you mean trainer.precision=bf16-mixed?",
    "trainer.accelerator=cuda": "did you mean trainer.accelerator=gpu?",
    "data.name=stdlib": "did you mean data.source?",
    "+experiment=balancing": "must be experiment=balancing, without +",
    # commands
    "budget=3m": "did you mean moesaic compare budget=...?",
    "eval_only=true": "did you mean moesaic evaluate CHECKPOINT?",
    # other tools again
    "optimizer.type=adamw": "did you mean optimizer.name?",
    "optimizer.momentum=0.9": "did you mean optimizer.beta1?",
    "model.num_shared_experts=1": "did you mean model.moe.shared_hidden_dim?",
    "checkpoint.every=10": "did you mean training.checkpoint_every?",
    # a value with signs that Hydra reads otherwise
    "data.path=my texts/a, b = ü": "a text with special signs must be in quotes inside quotes",
    "data.path=[a b,c": "a text with special signs must be in quotes inside quotes",
    "model.moe.router={type:x": "a text with special signs must be in quotes inside quotes",
}


@pytest.mark.parametrize("typed", HABITS)
def test_a_habit_is_answered_with_the_key_it_meant(typed: str) -> None:
    with pytest.raises(InputError) as refused:
        check_overrides("train", as_additions(complete("train", [typed])))
    assert HABITS[typed] in str(refused.value)


FLAGS = {
    "--lr 1e-3": "moesaic train --help lists the flags",
    "--config x": "moesaic train --help lists the flags",
    "--batch-size=4": "moesaic train --help lists the flags",
}


@pytest.mark.parametrize("typed", FLAGS)
def test_flags_of_other_tools_are_answered_with_where_ours_stand(typed: str) -> None:
    with pytest.raises(InputError, match=FLAGS[typed]):
        read_flags("train", typed.split())


WORK = [
    "hydra/launcher=joblib",
    "hydra/sweeper=optuna",
    "hydra.sweep.dir=elsewhere",
    "data.path=my texts",
    "data.path=täxte",
    "data.path=/a=b/c",
    "+trainer.fast_dev_run=true",
    "trainer.limit_val_batches=2",
    "optimizer.name=adamw",
    "sample.prompt=it's (not) so, is it",
]


@pytest.mark.parametrize("typed", WORK)
def test_habits_that_work_are_let_through(typed: str) -> None:
    check_overrides("train", as_additions(complete("train", [typed])))
