"""What to do about a job, decided from what was read: no client, no clock, no I/O."""
