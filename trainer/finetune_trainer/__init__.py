"""The trainer: runs in the pod or on a laptop, and knows nothing of Kubernetes."""
