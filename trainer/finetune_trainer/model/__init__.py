"""The base model and its LoRA layers."""
