"""Whether an adapter, on this machine or behind a server, still answers as it was trained."""
