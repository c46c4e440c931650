"""From files of chat messages to memory-mapped tokens and loss masks."""
