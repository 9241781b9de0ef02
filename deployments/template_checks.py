"""The options of a work pool's template, and their checks; see `fedpool.deployments.templates`."""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fedpool.errors import ConfigError, RecipeError
from fedpool.paths import check_new_names
from fedpool.sites.sandbox import Sandboxing

Kind = Literal["process", "docker", "kubernetes"]

_STORE = "FEDPOOL_SITE_STORE"
_VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_KUBERNETES_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_MEMORY = {
    "docker": (re.compile(r"[1-9][0-9]*[bkmg]"), "512m, 4g"),
    "kubernetes": (re.compile(r"[1-9][0-9]*([kMGT]|[KMGT]i)?"), "512Mi, 4Gi"),
}
_ONLY_IN = {
    "image": ("docker", "kubernetes"),
    "keep": ("docker", "kubernetes"),
    "memory": ("docker", "kubernetes"),
    "cpus": ("docker", "kubernetes"),
    "env_secret": ("kubernetes",),
    "namespace": ("kubernetes",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SitePool:
    """The options of a template, as described in `templates.base_job_template`."""

    kind: Kind
    name: str
    store: str | None
    image: str | None
    data: str | None
    keep: str | None
    config: str | None
    env: Mapping[str, str]
    env_secret: str | None
    memory: str | None
    cpus: float | None
    namespace: str | None
    program: str
    sandbox: Sandboxing | None


def check_pool(pool: SitePool) -> None:
    """Raise `ConfigError` if a value is invalid, or this type of pool lacks the option."""
    _check_kind(pool.kind, {option: getattr(pool, option) for option in _ONLY_IN})
    _check_env(pool.env)
    _check_texts({option: getattr(pool, option) for option in ("store", "image", "data", "keep", "config", "program")})
    try:
        check_new_names("site", [pool.name])
    except RecipeError as error:
        raise ConfigError(str(error)) from None
    if pool.memory is not None:
        _check_memory(pool.kind, pool.memory)
    if pool.cpus is not None and not 0 < pool.cpus < 10_000:
        raise ConfigError(f"cpus is {pool.cpus!r}: give a number of processors, such as 2 or 0.5")
    words(pool.program)
    if pool.kind != "process" and not (pool.store or pool.config or pool.env_secret or _STORE in pool.env):
        raise ConfigError(
            f"a {pool.kind} pool needs the store that the site uses: give store, such as s3://fl-jobs, or config"
        )
    if pool.kind == "kubernetes":
        for option in ("data", "keep", "config", "env_secret", "namespace"):
            _check_kubernetes_name(option, getattr(pool, option))
    else:
        for option in ("data", "keep", "config"):
            _check_path(pool.kind, option, getattr(pool, option))


def _check_kind(kind: str, given: Mapping[str, object]) -> None:
    if kind not in ("process", "docker", "kubernetes"):
        raise ConfigError(f"there is no template of type {kind!r}: give process, docker or kubernetes")
    for option, value in given.items():
        if value is not None and kind not in _ONLY_IN[option]:
            raise ConfigError(f"a {kind} pool has no option {option} (it is {value!r}): leave it out")
    if kind in _ONLY_IN["image"] and not given["image"]:
        raise ConfigError(
            f"a {kind} pool needs an image: one that contains fedpool and the packages that scripts import"
        )


def _check_texts(given: Mapping[str, str | None]) -> None:
    for option, value in given.items():
        if value is not None:
            _check_no_placeholder(option, value)
            if not value or value != value.strip():
                raise ConfigError(f"{option} is {value!r}: it must not be empty, or begin or end with a space")


def _check_env(variables: Mapping[str, str]) -> None:
    for name, value in variables.items():
        if not _VARIABLE_NAME.fullmatch(name):
            raise ConfigError(f"env {name!r} is not a valid variable name")
        _check_no_placeholder(f"env {name}", value)


def _check_no_placeholder(option: str, value: str) -> None:
    if "{{" in value:
        raise ConfigError(f"{option} is {value!r}: '{{{{' would begin a placeholder, which deployments could fill in")


def _check_memory(kind: str, memory: str) -> None:
    pattern, examples = _MEMORY[kind]
    if not pattern.fullmatch(memory):
        raise ConfigError(f"memory {memory!r} is not a valid limit for {kind}: write, for example, {examples}")


def _check_path(kind: str, option: str, path: str | None) -> None:
    if path is not None and (not path.startswith("/") or (kind == "docker" and ":" in path)):
        raise ConfigError(f"{option} {path!r} is not an absolute path{' without a colon' if ':' in path else ''}")


def _check_kubernetes_name(option: str, name: str | None) -> None:
    if name is not None and not _KUBERNETES_NAME.fullmatch(name):
        what = {
            "data": "a persistent volume claim",
            "keep": "a persistent volume claim",
            "namespace": "a namespace",
        }.get(option, "a secret")
        raise ConfigError(f"{option} {name!r} is not a valid name for {what} in Kubernetes")


def words(program: str) -> list[str]:
    """Split a command line into words.

    Raises:
        ConfigError: its quotes do not balance.
    """
    try:
        return shlex.split(program)
    except ValueError as error:  # raised by shlex
        raise ConfigError(f"program {program!r} cannot be split into words ({error}): balance its quotes") from None
