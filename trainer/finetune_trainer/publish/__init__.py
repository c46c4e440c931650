"""What a finished job leaves behind."""
