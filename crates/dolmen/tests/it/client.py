"""Drives the daemon with the public client: arguments are the monitor socket and a
path for the NBD server."""

import asyncio
import sys

from qemu.qmp import QMPClient
from qemu.qmp.error import QMPError
from qemu.qmp.qmp_client import ExecuteError


async def refused(qmp, command, arguments, text):
    try:
        await qmp.execute(command, arguments)
    except ExecuteError as e:
        assert e.error_class == "GenericError", e.error_class
        assert text in str(e), str(e)
    else:
        raise AssertionError(f"{command} was not refused")


async def main(socket, nbd):
    qmp, second = QMPClient("first"), QMPClient("second")
    await qmp.connect(socket)
    await second.connect(socket)
    version = await qmp.execute("query-version")
    assert version["qemu"]["major"] == 10, version
    commands = {c["name"] for c in await qmp.execute("query-commands")}
    schema = await qmp.execute("query-qmp-schema")
    assert commands == {e["name"] for e in schema if e["meta-type"] == "command"}

    await qmp.execute("blockdev-add", {"driver": "null-co", "node-name": "n", "size": 1 << 20})
    await refused(qmp, "blockdev-add", {"driver": "null-co", "node-name": "n"}, "Duplicate nodes")
    addr = {"type": "unix", "data": {"path": nbd}}
    await qmp.execute("nbd-server-start", {"addr": addr})
    await qmp.execute("block-export-add", {"type": "nbd", "id": "e", "node-name": "n", "writable": True})
    assert [e["id"] for e in await second.execute("query-block-exports")] == ["e"]
    await refused(second, "blockdev-del", {"node-name": "n"}, "in use")

    with second.listener("BLOCK_EXPORT_DELETED") as events:
        await qmp.execute("block-export-del", {"id": "e"})
        event = await asyncio.wait_for(events.get(), 30)
        assert event["data"] == {"id": "e"}, event
    # Several commands at once: each gets its own reply.
    replies = await asyncio.gather(*(qmp.execute("query-named-block-nodes", {"flat": True}) for _ in range(20)))
    assert all([n["node-name"] for n in r] == ["n"] for r in replies)
    await qmp.execute("quit")
    for client in (qmp, second):
        try:
            await client.disconnect()
        except (QMPError, OSError, EOFError):
            pass  # the daemon hung up first
    print("all is well")


asyncio.run(main(sys.argv[1], sys.argv[2]))
