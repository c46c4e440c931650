"""What is no request, or one that ends in a bug: an answer or the end of the connection, and no more than one line."""

from __future__ import annotations

import pytest

from finetune_operator.serving.admission import Limits
from finetune_operator.serving.port import listening
from tests.operator.serving.clients import (
    REQUEST,
    app,
    ask,
    connection,
    read_all,
    run,
)

MALFORMED = [
    b"\x00\x01\x02\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET /\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nno colon\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nA: b\rfake line\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nExpect: magic\r\n\r\n",
    b"GET http://[::1/ HTTP/1.1\r\nHost: a\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET /%0a%0dfake HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nCookie: \xff\xfe=\xff\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
]


@pytest.mark.parametrize("sent", MALFORMED)
def test_what_is_no_request_is_answered_or_cut_off_and_leaves_no_line_in_the_log(
    sent: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async def use() -> None:
        limits = Limits(request_seconds=0.2)
        async with listening(app(), "127.0.0.1", 0, limits=limits) as port:
            async with connection(port) as (reader, writer):
                writer.write(sent)
                received = await read_all(reader)
                assert received == b"" or received.startswith(b"HTTP/")
            assert (await ask(port)).endswith(b"hello")

    run(use)
    assert [record.getMessage() for record in caplog.records] == []


def test_a_bug_in_what_is_served_is_told(caplog: pytest.LogCaptureFixture) -> None:
    async def use() -> None:
        async with listening(app(), "127.0.0.1", 0) as port, connection(port) as (reader, writer):
            writer.write(REQUEST.replace(b"GET /", b"GET /bug"))
            assert b" 500 " in await read_all(reader)

    run(use)
    (record,) = caplog.records
    assert record.exc_info is not None
    assert record.exc_info[0] is ValueError
