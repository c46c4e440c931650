"""The operator: the only part that talks to Kubernetes."""
