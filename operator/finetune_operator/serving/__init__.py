"""HTTP ports of the operator and of `finetune run`: how they are opened, and what probes and Prometheus are told."""
