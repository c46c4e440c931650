"""Starts the worker processes of one node, waits for their end and says how the attempt ended.

The launcher (`command`) and its workers (`worker_process`) talk through small files, `outcome_files`, because an
exit code alone cannot carry a sentence and plain `torchrun` would turn every exit code into 1.
"""
