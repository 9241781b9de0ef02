"""Round records, jobs and results for which a test sets only the fields that matter to it."""

import json
from collections.abc import Mapping
from typing import Any

from fedpool.tasks.job_record import JobRecord, JobResult
from fedpool.tasks.record import RECORD_PROTOCOL, RoundRecord

_MODEL = {"sha256": "b" * 64, "size": 10}
_ASKED = {"site": "site-1", "attempt": 0}
_ENTRIES: Mapping[str, Mapping[str, Any]] = {
    "accepted": {
        **_ASKED,
        "sha256": "a" * 64,
        "manifest_sha256": "m" * 64,
        "size": 100,
        "params_type": "FULL",
        "weight": 1.0,
        "metrics": {},
        "logged": {},
        "seconds": 0.5,
    },
    "rejected": {
        **_ASKED,
        "sha256": None,
        "manifest_sha256": None,
        "code": "shape",
        "reason": "w: expected [2], got [3]",
    },
    "failed": {**_ASKED, "cause": "was killed"},
    "probed": {**_ASKED, "sha256": "a" * 64, "manifest_sha256": "m" * 64},
    "late": _ASKED,
    "not_asked": {"site": "site-1", "reason": "no worker online"},
}


def record_of(said: Mapping[str, Any]) -> RoundRecord:
    """A round's record as in `round.json`, with defaults for the fields that a test leaves out."""
    entries = {kind: [{**_ENTRIES[kind], **entry} for entry in said.get(kind, ())] for kind in _ENTRIES}
    number, task = said.get("round", 0), said.get("task", "train")
    sites = dict.fromkeys(entry["site"] for of_kind in entries.values() for entry in of_kind)
    fields = {
        "protocol": RECORD_PROTOCOL,
        "job_id": "job-1",
        "round": number,
        "task": task,
        "sites": list(sites),
        "metrics": {},
        "denominators": {},
        "logged": {},
        "timings": {},
        "model": {"owner": "server", "round": number},
        "global": _MODEL,
        "next_global": _MODEL if task == "train" else None,
        "state": None,
        "previous_sha256": "p" * 64,
        **said,
        **entries,
    }
    fields["timings"] = {"train_s": 1.0, "aggregate_s": 0.1, "round_s": 1.1, **fields["timings"]}
    return RoundRecord.from_bytes(json.dumps(fields).encode(), "a test")


def job_of(said: Mapping[str, Any]) -> JobRecord:
    """A job as in `job.json`, with defaults for the fields that a test leaves out."""
    client = {
        "job_id": "job-1",
        "total_rounds": 1,
        "entry": "client.py",
        "bundle_sha256": "c" * 64,
        "imports": [],
        "arguments": [],
        "site_arguments": {},
        "config": {},
        "site_config": {},
        "transfer": "FULL",
        "exclude": [],
        "restarts": 1,
        "seed": 0,
        "threads": 1,
    }
    fields = {
        "format": 1,
        "job_id": "job-1",
        "parent": None,
        "simulated": True,
        "template": False,
        "client": client,
        "seed": 0,
        "sites": ["site-1"],
        "bundle_sha256": "c" * 64,
        "model": _MODEL,
        "versions": {},
        **said,
        "recipe": {"type": "FedAvgRecipe", "name": "job", **said.get("recipe", {})},
    }
    return JobRecord.from_bytes(json.dumps(fields).encode(), "a test")


def result_of(said: Mapping[str, Any]) -> JobResult:
    """A job's result as in `result.json`, with defaults for the fields that a test leaves out."""
    model = {"round": 0, "path": "job-1/global.safetensors", "metrics": {}, "denominators": {}}
    fields = {
        "format": 1,
        "job_id": "job-1",
        "status": "COMPLETED",
        "error": None,
        "stopped_by": None,
        "num_rounds": 0,
        "num_records": 0,
        "key_metric": "accuracy",
        "key_metric_mode": "max",
        "cross_site": None,
        "last_record_sha256": "p" * 64,
        "sha256": "r" * 64,
        **said,
        **{which: {**model, **said.get(which, {})} for which in ("final", "best")},
    }
    return JobResult.from_bytes(json.dumps(fields).encode(), "a test")
