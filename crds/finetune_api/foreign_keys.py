"""What other tools call what is called otherwise here: Axolotl, LLaMA-Factory, TRL, transformers, Unsloth and OpenAI.

One table, by their key. A key that is unknown here and in the table is answered with what to write; every answer that
names a key names one that exists, which a test holds against the schema.
"""

from __future__ import annotations

from collections.abc import Mapping

_PACKS = "rows are packed by themselves wherever that is exact, without padding: remove it"
_PRECISION = "the precision follows from the device, bfloat16 on GPUs: remove it"
_NOT_DONE = "is not done here: remove it"

FOREIGN_KEYS: Mapping[str, str] = {
    # Model
    "base_model": "write model_id",
    "model": "write model_id",
    "model_name": "write model_id",
    "model_name_or_path": "write model_id",
    "pretrained_model_name_or_path": "write model_id",
    "load_in_4bit": "write quantization: nf4",
    "load_in_8bit": "write quantization: int8",
    "quantization_bit": "write quantization: nf4 (4) or int8 (8)",
    "bnb_4bit_quant_type": "write quantization: nf4",
    "bnb_4bit_compute_dtype": _PRECISION,
    "torch_dtype": _PRECISION,
    "dtype": _PRECISION,
    "bf16": _PRECISION,
    "fp16": _PRECISION,
    "tf32": _PRECISION,
    "attn_implementation": "attention is chosen by the trainer: remove it",
    "flash_attention": "attention is chosen by the trainer: remove it",
    "flash_attn": "attention is chosen by the trainer: remove it",
    "use_liger_kernel": "Liger's kernels are used where they are installed: remove it",
    # Data
    "train_file": "write train_path",
    "training_file": "write train_path",
    "dataset": "write train_path",
    "dataset_name": "write train_path",
    "datasets": "write train_path",
    "validation_file": "write valid_path",
    "eval_path": "write valid_path",
    "eval_dataset": "write valid_path",
    "val_set_size": "write valid_path with a file of its own",
    "max_seq_length": "write context_length",
    "max_seq_len": "write context_length",
    "max_length": "write context_length",
    "sequence_len": "write context_length",
    "cutoff_len": "write context_length",
    "packing": _PACKS,
    "sample_packing": _PACKS,
    "padding_free": _PACKS,
    "group_by_length": _PACKS,
    "chat_template": "write generation_config.prompt_format",
    "template": "write generation_config.prompt_format",
    "train_on_inputs": "write task: causal_lm, if all of the text is to be trained",
    "train_on_prompt": "write task: causal_lm, if all of the text is to be trained",
    "completion_only_loss": "write task: instruction_tuning",
    "assistant_only_loss": "write task: instruction_tuning",
    # LoRA
    "adapter": "an adapter is always trained: write lora_config",
    "finetuning_type": "LoRA is what is trained: write lora_config",
    "use_lora": "LoRA is what is trained: write lora_config",
    "peft_config": "write lora_config",
    "lora": "write lora_config",
    "lora_r": "write lora_config.r",
    "lora_rank": "write lora_config.r",
    "lora_alpha": "write lora_config.lora_alpha",
    "lora_dropout": "write lora_config.lora_dropout",
    "lora_target": "write lora_config.target_modules",
    "lora_target_modules": "write lora_config.target_modules",
    "lora_target_linear": "write lora_config.target_modules: all-linear",
    "target_modules": "write lora_config.target_modules",
    "use_rslora": "write lora_config.use_rslora",
    # Training
    "num_train_epochs": "write num_epochs",
    "n_epochs": "write num_epochs",
    "epochs": "write num_epochs",
    "batch_size": "write train_batch_size_per_device",
    "micro_batch_size": "write train_batch_size_per_device",
    "per_device_train_batch_size": "write train_batch_size_per_device",
    "per_device_eval_batch_size": "write eval_batch_size_per_device",
    "eval_batch_size": "write eval_batch_size_per_device",
    "gradient_accumulation": "write gradient_accumulation_steps",
    "lr": "write learning_rate",
    "learning_rate_multiplier": "write learning_rate",
    "lr_scheduler": "write lr_scheduler_type",
    "warmup_steps": "write num_warmup_steps",
    "warmup_ratio": "write num_warmup_steps, the steps themselves",
    "max_steps": "write num_epochs; a number of steps is not taken",
    "max_gradient_norm": "write max_grad_norm",
    "gradient_clipping": "write max_grad_norm",
    "activation_checkpointing": "write gradient_checkpointing",
    "random_seed": "write seed",
    "optim": f"another optimizer than AdamW {_NOT_DONE}",
    "optimizer": f"another optimizer than AdamW {_NOT_DONE}",
    "early_stopping_patience": f"early stopping {_NOT_DONE}: the best checkpoint is published anyway",
    "neftune_noise_alpha": f"noise on embeddings {_NOT_DONE}",
    # Output
    "hub_model_id": "write output.uri: hf://owner/name",
    "push_to_hub": "write output.uri: hf://owner/name",
    "save_total_limit": "write num_checkpoints_to_keep",
    "merge_adapter": "write output.merged",
    "report_to": "write logger.provider",
    "wandb_project": "write logger.provider: wandb, and the project under logger.provider_config",
    "suffix": "write metadata.name",
    # Machines
    "num_gpus": "write workers.gpusPerNode",
    "num_nodes": "write workers.nodes",
    "nnodes": "write workers.nodes",
    "nproc_per_node": "write workers.gpusPerNode",
    "fsdp": "write sharding: fsdp",
    "fsdp_config": "write sharding: fsdp",
}
"""Their key -> what to do; goes on "... is not a known key: "."""
