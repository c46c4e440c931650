"""The contract of finetune-operator: what users write, and what operator and trainer say to each other."""
