"""Reading the files that W&B writes offline: LevelDB logs of protobufs. The package has no reader for Python."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path
from typing import Any


def wandb_records(run_dir: Path) -> list[Any]:
    """Read all records of all offline runs under `run_dir`, in order, once each of them has its last record.

    W&B writes the files in a process of its own, which may still be doing so after `finish` has returned.
    """
    deadline = time.monotonic() + 20
    while True:
        runs = [read_wandb_file(path) for path in sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"))]
        if runs and all(records and records[-1].WhichOneof("record_type") == "exit" for records in runs):
            return [record for records in runs for record in records]
        assert time.monotonic() < deadline, "W&B did not finish its files"
        time.sleep(0.05)


def read_wandb_file(path: Path) -> list[Any]:
    """Read the complete records of one file."""
    from wandb.proto import wandb_internal_pb2

    records = []
    data, position, pending = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left_in_block = 32768 - position % 32768
        if left_in_block < 7:
            position += left_in_block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        if position + 7 + length > len(data):
            break  # still being written
        pending += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole record, or its last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(pending)
            records.append(record)
            pending = b""
    return records


def wandb_history(run_dir: Path) -> list[dict[str, Any]]:
    """Return what was logged, in order, each time as values by name."""
    return [
        _values(record.history.item)
        for record in wandb_records(run_dir)
        if record.WhichOneof("record_type") == "history"
    ]


def wandb_summary(run_dir: Path) -> dict[str, Any]:
    """Return the values of the summary that the client has set."""
    summary: dict[str, Any] = {}
    for record in wandb_records(run_dir):
        if record.WhichOneof("record_type") == "summary":
            summary |= _values(record.summary.update)
    return summary


def wandb_ids(run_dir: Path) -> list[str]:
    """Return the id of the run in each session."""
    return [r.run.run_id for r in wandb_records(run_dir) if r.WhichOneof("record_type") == "run"]


def _values(items: Any) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for item in items:
        *outer, name = item.nested_key or [item.key]
        inner = values
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[name] = json.loads(item.value_json)
    return values
