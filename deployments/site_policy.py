"""The S3 policy of a site: what of the store its keys may read and write, and nothing else.

In a policy `*` and `?` also stand for a slash, so a pattern for one place matches deeper ones as
well. Without more, `*/rounds/?????/sites/A/*` would match a name below the folder of another site.
Further statements deny such names: those in which `rounds` is not the second part, those in which
`sites` occurs twice, and those with more than a number between `attempts` and `sites`.
"""

from collections.abc import Sequence
from typing import Any

from fedpool.backend import normal_url
from fedpool.errors import ConfigError, RecipeError
from fedpool.paths import JobPaths, check_new_names

_JOB = "JOB"
_SHA256 = "0" * 64
_ATTEMPTS = {"1": "?", "10": "??", "100": "???"}
_AMBIGUOUS = ("rounds", "sites", "attempts")
_TOO_DEEP = ("*/*/rounds/*", "*/sites/*/sites/*", "*/attempts/*/*/sites/*")
_VERSION = "2012-10-17"


def site_policy(site: str, store: str) -> dict[str, Any]:
    """The policy for the keys of a site, as S3 servers take it for a user.

    Args:
        site: the site's name.
        store: URL of the store, `s3://bucket` or `s3://bucket/prefix`.

    Raises:
        ConfigError: the store is not on S3, or the site's name is one of the store's own words.
    """
    bucket, prefix = _place(store)
    try:
        check_new_names("site", [site])
    except RecipeError as error:
        raise ConfigError(str(error)) from None
    if site in _AMBIGUOUS:
        raise ConfigError(
            f"site {site!r} has the name of a folder in every job: no policy can tell them apart, so rename it"
        )
    objects = f"arn:aws:s3:::{bucket}/{prefix}"
    own = _own_folders(site)
    return {
        "Version": _VERSION,
        "Statement": [
            {
                "Sid": "ReadJobs",
                "Effect": "Allow",
                "Action": ["s3:GetObject"],
                "Resource": [objects + each for each in (*_read(), *_looked_for(site))],
            },
            {
                "Sid": "ReadAndWriteOwnFolders",
                "Effect": "Allow",
                "Action": ["s3:GetObject", "s3:PutObject", "s3:AbortMultipartUpload"],
                "Resource": [objects + each for each in own],
            },
            {
                "Sid": "LookForOneName",
                "Effect": "Allow",
                "Action": ["s3:ListBucket"],
                "Resource": [f"arn:aws:s3:::{bucket}"],
                "Condition": {"StringLike": {"s3:prefix": [prefix + each for each in (*_looked_for(site), *own)]}},
            },
            {
                "Sid": "WriteNoDeeper",
                "Effect": "Deny",
                "Action": ["s3:PutObject"],
                "Resource": [f"{objects}{each}" for each in _TOO_DEEP],
            },
            {
                # On servers without these keys, the second condition never holds.
                "Sid": "OverwriteNothing",
                "Effect": "Deny",
                "Action": ["s3:PutObject"],
                "Resource": [f"{objects}*"],
                "Condition": {"Null": {"s3:if-none-match": "true"}, "Bool": {"s3:ObjectCreationOperation": "true"}},
            },
        ],
    }


def _place(store: str) -> tuple[str, str]:
    """The bucket and the prefix of a store; the prefix is empty or ends with a slash."""
    protocol, _, path = normal_url(store).partition("://")
    bucket, _, prefix = path.partition("/")
    if protocol != "s3" or not bucket or "*" in path or "?" in path:
        raise ConfigError(
            f"store {store!r} is not on S3: only such stores have policies. Write it as s3://bucket/prefix"
        )
    return bucket, f"{prefix}/" if prefix else ""


def _read() -> Sequence[str]:
    """What every site reads without looking for it first."""
    paths = JobPaths(_JOB)
    hashed = (paths.bundle(_SHA256), paths.code(_SHA256))
    named = (paths.job, *(path.replace(_SHA256, "*") for path in hashed), paths.global_model(0), paths.state(0))
    return [_pattern(path) for path in named]


def _looked_for(site: str) -> Sequence[str]:
    """What a site looks for, and then reads."""
    paths = JobPaths(_JOB)
    assignments = [paths.assignment(0, site, attempt) for attempt in (0, *map(int, _ATTEMPTS))]
    return [_pattern(path) for path in (paths.result, paths.tracked, paths.record(0), *assignments)]


def _own_folders(site: str) -> Sequence[str]:
    paths = JobPaths(_JOB)
    return [_pattern(f"{paths.sites(0, attempt)}/{site}/*") for attempt in (0, *map(int, _ATTEMPTS))]


def _pattern(path: str) -> str:
    """The pattern of a path's like in all jobs, rounds and attempts."""
    path = path.replace(_JOB, "*", 1).replace("/rounds/00000/", "/rounds/?????/", 1)
    for number, marks in _ATTEMPTS.items():
        path = path.replace(f"/attempts/{number}/", f"/attempts/{marks}/", 1)
    return path
