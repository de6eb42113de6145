"""Drives jobs with the public client: arguments are the monitor socket and a directory with
base.qcow2 <- top.qcow2 and an empty t1.qcow2."""

import asyncio
import sys

from qemu.qmp import QMPClient
from qemu.qmp.error import QMPError
from qemu.qmp.qmp_client import ExecuteError

NAMES = ["JOB_STATUS_CHANGE", "BLOCK_JOB_READY", "BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED"]


def node(directory, name, backing):
    return {
        "driver": "qcow2",
        "node-name": name,
        "backing": backing,
        "file": {"driver": "file", "node-name": name + "-f", "filename": f"{directory}/{name}.qcow2"},
    }


async def until_gone(events, job):
    """The states of a job until it is gone, and the other events about it."""
    states, others = [], []
    while not states or states[-1] != "null":
        event = await asyncio.wait_for(events.get(), 30)
        data = event["data"]
        if event["event"] == "JOB_STATUS_CHANGE":
            if data["id"] == job:
                states.append(data["status"])
        elif data["device"] == job:
            others.append(event["event"])
    return states, others


async def main(socket, directory):
    qmp = QMPClient("jobs")
    await qmp.connect(socket)
    for name, backing in (("base", None), ("top", "base"), ("t1", None)):
        await qmp.execute("blockdev-add", node(directory, name, backing))

    with qmp.listener(NAMES) as events:
        # A mirror that is asked what it does, then pivots.
        await qmp.execute("blockdev-mirror", {"job-id": "m", "device": "top", "target": "t1", "sync": "full"})
        while (await asyncio.wait_for(events.get(), 30))["event"] != "BLOCK_JOB_READY":
            pass
        jobs = await qmp.execute("query-block-jobs")
        assert [(j["device"], j["type"], j["status"], j["ready"]) for j in jobs] == [
            ("m", "mirror", "ready", True)
        ], jobs
        assert [j["id"] for j in await qmp.execute("query-jobs")] == ["m"]
        try:
            await qmp.execute("blockdev-backup", {"job-id": "b", "device": "base", "target": "t1", "sync": "full"})
        except ExecuteError as e:
            conflict = e.error.get("data", {}).get("conflict") if isinstance(e.error, dict) else None
            assert "'m'" in str(e) and "'b'" in str(e), (str(e), conflict)
        else:
            raise AssertionError("two jobs write to one target")
        await qmp.execute("job-complete", {"id": "m"})
        states, others = await until_gone(events, "m")
        assert states == ["waiting", "pending", "concluded", "null"], states
        assert others == ["BLOCK_JOB_COMPLETED"], others

        # A job that waits to be finalized and dismissed.
        await qmp.execute(
            "block-stream", {"job-id": "s", "device": "top", "auto-finalize": False, "auto-dismiss": False}
        )
        for verb, state in (("job-finalize", "pending"), ("job-dismiss", "concluded")):
            while True:
                event = await asyncio.wait_for(events.get(), 30)
                if event["event"] == "JOB_STATUS_CHANGE" and event["data"] == {"id": "s", "status": state}:
                    break
            await qmp.execute(verb, {"id": "s"})
        assert await qmp.execute("query-jobs") == []

    commands = {c["name"] for c in await qmp.execute("query-commands")}
    if "transaction" in commands:
        actions = [
            {"type": "blockdev-backup", "data": {"job-id": "b1", "device": "top", "target": "t1", "sync": "full"}},
            {"type": "abort", "data": {}},
        ]
        try:
            await qmp.execute("transaction", {"actions": actions})
        except ExecuteError:
            pass
        else:
            raise AssertionError("a transaction with an abort was carried out")
        assert await qmp.execute("query-jobs") == []
    await qmp.execute("quit")
    try:
        await qmp.disconnect()
    except (QMPError, OSError, EOFError):
        pass  # the daemon hung up first
    print("all is well")


asyncio.run(main(sys.argv[1], sys.argv[2]))
