"""Names that other tools have for our keys, so that a hand trained on them gets the right suggestion."""

__all__ = ["COMMAND_OF", "OPTIONS", "key_known_as"]

_KEYS = {
    "model.dim": "d_model n_embd embed_dim embedding_dim hidden_size width model_dim emb_dim",
    "model.num_layers": "n_layer n_layers layers depth num_hidden_layers num_blocks",
    "model.hidden_dim": "intermediate_size d_ff ffn_dim mlp_dim ffn_hidden_size feedforward_dim",
    "model.attention.num_heads": "n_head n_heads heads num_attention_heads",
    "model.attention.num_kv_heads": "n_kv_heads kv_heads num_key_value_heads",
    "model.attention.rope_theta": "rope_base theta",
    "model.attention.attention_chunk_size": "chunk_size",
    "model.attention.window": "window_size sliding_window",
    "model.moe.num_experts": "n_experts experts num_local_experts n_routed_experts number_of_experts",
    "model.moe.hidden_dim": "moe_intermediate_size expert_dim expert_hidden_dim d_expert",
    "model.moe.top_k": "k topk num_experts_per_tok num_experts_per_token experts_per_token",
    "model.moe.shared_hidden_dim": "num_shared_experts n_shared_experts shared_experts shared_expert",
    "model.moe.router": "routing gate gating",
    "model.pattern": "mixer token_mixer ffn channel_mixer feed_forward",
    "model.tie_embeddings": "tie_word_embeddings weight_tying",
    "training.steps": "max_steps num_steps train_steps total_steps iterations iters max_iters n_steps epochs "
    "num_epochs max_epochs num_train_epochs",
    "training.batch_size": "batch per_device_train_batch_size micro_batch_size train_batch_size bs",
    "training.seq_len": "block_size context_length max_seq_len max_length sequence_length seq_length ctx_len "
    "max_position_embeddings",
    "training.accumulate": "gradient_accumulation_steps accumulate_grad_batches grad_accum grad_accumulation",
    "training.gradient_clip": "grad_clip gradient_clip_val max_grad_norm clip_grad_norm clip",
    "training.validate_every": "eval_interval val_check_interval eval_steps eval_every check_val_every_n_epoch",
    "training.validation_batches": "limit_val_batches eval_iters",
    "training.log_every": "log_interval log_every_n_steps logging_steps",
    "training.checkpoint_every": "save_steps save_interval save_every every_n_train_steps checkpoint.every",
    "optimizer.learning_rate": "lr learning_rate base_lr max_lr",
    "optimizer.weight_decay": "wd",
    "optimizer.beta1": "betas adam_beta1 momentum",
    "optimizer.beta2": "adam_beta2",
    "optimizer.eps": "epsilon adam_epsilon",
    "optimizer.name": "optim opt optimizer_name optimizer_type optimizer.type optimizer._target_",
    "schedule.warmup_steps": "warmup num_warmup_steps warmup_iters warmup_ratio lr_warmup",
    "schedule.name": "scheduler lr_scheduler lr_scheduler_type lr_schedule",
    "schedule.final_factor": "min_lr final_lr",
    "balance.load_balance_loss_weight": "aux_loss_coef router_aux_loss_coef aux_loss_weight aux_loss load_balancing "
    "aux balance_loss load_balancing_loss_weight",
    "balance.router_z_loss_weight": "z_loss router_z_loss_coef z_loss_weight z_loss_coef",
    "data.path": "dir data_dir root folder file files train_file text",
    "data.source": "dataset dataset_name corpus data.name",
    "data.vocab_size": "vocab",
    "data.validation_fraction": "val_fraction val_split",
    "ckpt_path": "ckpt checkpoint resume_from_checkpoint load_from checkpoint_path init_from",
    "name": "run_name task_name experiment_name exp_name",
    "seed": "random_seed seed_everything random_state manual_seed",
    "experiment": "exp config cfg preset recipe",
    "logger": "wandb use_wandb report_to tb use_tensorboard loggers",
    "debug": "dry_run smoke fast",
    "output_dir": "out_dir output log_dir logdir save_dir",
    "trainer.devices": "gpu gpus num_gpus n_gpus ngpu world_size nproc_per_node",
    "trainer.accelerator": "device",
    "trainer.precision": "dtype amp bf16 fp16 float8",
    "trainer.compile": "torch_compile",
    "trainer.checkpoint_activations": "gradient_checkpointing activation_checkpointing",
    "sample.max_new_tokens": "max_tokens",
    "sample.temperature": "temp",
}

_KNOWN_AS = {word: key for key, words in _KEYS.items() for word in words.split()}

OPTIONS = {
    "debug=fdr": "debug=smoke",
    "debug=default": "debug=smoke",
    "debug=limit": "debug=smoke",
    "debug=true": "debug=smoke",
    "debug=1": "debug=smoke",
    "model=tiny": "model=study",
    "model=default": "model=small",
    "logger=tb": "logger=tensorboard",
    "logger=default": "logger=tensorboard",
    "trainer=auto": "trainer=cpu trainer.accelerator=auto",
    "trainer=ddp_spawn": "trainer.strategy=ddp_spawn trainer.devices=2",
    "debug=overfit": "trainer.overfit_batches=1",
    "debug=profiler": "trainer.profiler=simple",
    "trainer=ddp": "trainer.strategy=ddp trainer.devices=2",
    "trainer=fsdp": "trainer.strategy=fsdp trainer.devices=2",
    "trainer=mps": "trainer.accelerator=mps",
    "trainer=cuda": "trainer=gpu",
    "trainer=default": "trainer=cpu",
    "callbacks=default": "callbacks=none",
    "data=huggingface": "data.source=huggingface data.path=NAME",
    "data=shards": "data=memmap data.path=FOLDER",
    "data=text": "data=files data.path=FOLDER",
    "optimizer.name=adam": "optimizer.name=adamw",
    "optimizer.name=adamw_torch": "optimizer.name=adamw",
    "optimizer.name=muonadamw": "optimizer.name=muon",
    "schedule.name=linear": "schedule.name=wsd schedule.decay_fraction=1",
    "schedule.name=warmup_cosine": "schedule.name=cosine",
    "schedule.name=cosine_with_warmup": "schedule.name=cosine",
    "schedule.name=trapezoidal": "schedule.name=wsd",
    "trainer.accelerator=cuda": "trainer.accelerator=gpu",
    "trainer.precision=bf16": "trainer.precision=bf16-mixed, or bf16-true",
    "trainer.precision=bfloat16": "trainer.precision=bf16-mixed, or bf16-true",
    "trainer.precision=16-mixed": "trainer.precision=bf16-mixed",
    "trainer.precision=fp16": "trainer.precision=bf16-mixed",
    "trainer.precision=16": "trainer.precision=bf16-mixed",
    "trainer.precision=32": "trainer.precision=32-true",
    "trainer.precision=fp32": "trainer.precision=32-true",
    "trainer.precision=float32": "trainer.precision=32-true",
    "trainer.precision=64": "trainer.precision=64-true",
}
"""Options of config groups, and values of keys, that other projects have, and what to type here."""


COMMAND_OF = {
    **{key: f"moesaic compare {key}=..." for key in ("new", "baseline", "rates", "budget", "equal")},
    "study": "moesaic study",
    "eval_only": "moesaic evaluate CHECKPOINT",
    "prompt": "moesaic generate CHECKPOINT PROMPT",
}
"""Keys of one command, which people also give to others."""


def key_known_as(key: str) -> str | None:
    """Our key for one that other tools have, by its name or the last part of it; None if nobody has it."""
    key = key.replace("-", "_").lower()
    return _KNOWN_AS.get(key) or _KNOWN_AS.get(key.rpartition(".")[2])
