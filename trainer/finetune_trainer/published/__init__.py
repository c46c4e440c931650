"""Adapters that were published, as chat, merge and verify open them."""
