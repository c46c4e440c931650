"""A process that turns blocks of lines into arrays: `python -m finetune_trainer.data.worker FD`.

FD is its end of a connection. It receives the source, then a block at a time, and answers each with a TokenizedBlock
or with the exception that ended it. When the other end is closed, by whatever end of the parent, it ends too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from multiprocessing.connection import Connection


def main(connection: Connection) -> None:
    """Serve until the parent closes the connection."""
    # Imported late: a Ctrl-C, which the whole group of processes receives, is the parent's business from the start.
    from finetune_trainer.data.block import BlockTokenizer, TokenizedBlock

    with contextlib.suppress(EOFError, ConnectionError):
        tokenizer = BlockTokenizer(connection.recv())
        while True:
            block, outcome_is_decided = connection.recv()
            answer: TokenizedBlock | Exception
            try:
                answer = tokenizer(block, outcome_is_decided=outcome_is_decided)
            except Exception as error:  # The parent raises it as its own.
                error.add_note(traceback.format_exc())
                answer = error
            connection.send(answer)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main(Connection(int(sys.argv[1])))
    # Nothing is left to be tidied up, and freeing a tokenizer takes its time.
    os._exit(0)
