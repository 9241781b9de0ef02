"""Base job templates of the work pools that run a site's rounds cold: process, docker and kubernetes.

Whoever can create runs must not get code or mounts into the site's process or container. So the command is `fedpool site run`
with the site's settings as its options, and no variable is left for a deployment or a run to fill in: the server refuses job
variables, and the worker has no place for them. `env` is missing on purpose: where a template has one, Prefect merges the
deployment's `env` into it without being asked to. Our variables stand in the command, for kubernetes in the manifest.

What a template cannot do: keep out someone who may change the work pool itself; and, in a process pool, keep Prefect's worker
from loading the deployment's flow, pull steps and all, for its hooks when a run is cancelled or killed (so Prefect 3.8.8).
Use a process pool only where whoever can create deployments may run code at the site; the `fedpool-site` worker never loads any.
"""

import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from fedpool.errors import ConfigError, RecipeError
from fedpool.paths import check_new_names

Kind = Literal["process", "docker", "kubernetes"]

_DATA = "/data"
_CONFIG_FOLDER = "/etc/fedpool"
_CONFIG_FILE = "site.toml"
_FOLDER = "/tmp/fedpool-site"
_KEPT = f"{_FOLDER}/kept"
_JOB_KEPT_S = 3600

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


def base_job_template(
    kind: Kind,
    *,
    name: str,
    image: str | None = None,
    data: str | None = None,
    keep: str | None = None,
    config: str | None = None,
    env: Mapping[str, str] | None = None,
    env_secret: str | None = None,
    memory: str | None = None,
    cpus: float | None = None,
    namespace: str | None = None,
    program: str = "fedpool",
) -> dict[str, Any]:
    """The template of a site's work pool, for `prefect work-pool create --type KIND --base-job-template FILE POOL`.

    Args:
        kind: type of the work pool.
        name: of the site; a run for another one is refused.
        image: with fedpool and what scripts import; one whose entrypoint, if any, runs its arguments.
        data: the site's data: an absolute path, for kubernetes the name of a claim. Mounted read-only at `/data`.
        keep: where what scripts keep stays from round to round: an absolute path, for kubernetes the name of a claim.
        config: the site's TOML file, an absolute path; for kubernetes the name of a secret that has the key `site.toml`.
        env: variables of the command. They can be read on the server: secrets belong into `config` or `env_secret`.
        env_secret: name of a kubernetes secret whose keys are variables, e.g. the store's credentials.
        memory: limit; docker: bytes with the unit b, k, m or g; kubernetes: a quantity such as 4Gi.
        cpus: limit, in processors.
        namespace: of kubernetes; default: `default`.
        program: what runs fedpool where the round runs; for a process pool e.g. the path of the environment's `bin/fedpool`.

    Raises:
        ConfigError: a value does not fit, or this type of pool has no such thing.
    """
    _check_kind(
        kind,
        {
            "image": image,
            "keep": keep,
            "memory": memory,
            "cpus": cpus,
            "env_secret": env_secret,
            "namespace": namespace,
        },
    )
    variables = dict(env or {})
    _check_env(variables)
    _check_texts({"image": image, "data": data, "keep": keep, "config": config, "program": program})
    try:
        check_new_names("site", [name])
    except RecipeError as error:
        raise ConfigError(str(error)) from None
    if memory is not None:
        _check_memory(kind, memory)
    if cpus is not None and not 0 < cpus < 10_000:
        raise ConfigError(f"cpus is {cpus!r}: give a number of processors such as 2 or 0.5")
    run = [*_words(program), "site", "run", "--name", name]
    if kind == "kubernetes":
        names = {"data": data, "keep": keep, "config": config, "env_secret": env_secret, "namespace": namespace}
        for option, value in names.items():
            _check_kubernetes_name(option, value)
    else:
        for option, value in {"data": data, "keep": keep, "config": config}.items():
            _check_path(kind, option, value)
    if kind == "process":
        run += _options(data=data, config=config)
        configuration: dict[str, Any] = {"command": shlex.join([*_with_env(variables), *run])}
    else:
        run += _options(data=data and _DATA, config=config and f"{_CONFIG_FOLDER}/{_CONFIG_FILE}", folder=_FOLDER)
        if kind == "docker":
            run = [*_with_env(variables), *run]
            configuration = _docker(run, image=image, data=data, keep=keep, config=config, memory=memory, cpus=cpus)
        else:
            configuration = _kubernetes(run, image=image, data=data, keep=keep, config=config, memory=memory, cpus=cpus)
            configuration["namespace"] = namespace or "default"
            container = configuration["job_manifest"]["spec"]["template"]["spec"]["containers"][0]
            container["env"] = [{"name": key, "value": value} for key, value in variables.items()]
            if env_secret is not None:
                container["envFrom"] = [{"secretRef": {"name": env_secret}}]
    return {
        "job_configuration": configuration,
        "variables": {"type": "object", "properties": {}, "additionalProperties": False},
    }


def _words(program: str) -> list[str]:
    try:
        return shlex.split(program)
    except ValueError as error:  # what shlex raises
        raise ConfigError(f"program {program!r} cannot be split into words ({error}): balance its quotes") from None


def parse_env(entries: Iterable[str]) -> dict[str, str]:
    """The variables of some `NAME=VALUE`.

    Raises:
        ConfigError: one has no "=".
    """
    found = {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        if not equals:
            raise ConfigError(f"env {entry!r} is not of the form NAME=VALUE")
        found[name] = value
    return found


def _docker(
    command: list[str],
    *,
    image: str | None,
    data: str | None,
    keep: str | None,
    config: str | None,
    memory: str | None,
    cpus: float | None,
) -> dict[str, Any]:
    """The job configuration of a docker pool; an engine that lacks the image gets it from its registry."""
    # init ends what a script leaves behind, and hands SIGTERM on.
    container: dict[str, Any] = {"init": True, "security_opt": ["no-new-privileges"]}
    if cpus is not None:
        container["nano_cpus"] = round(cpus * 1e9)
    mounts = {_DATA: data, f"{_CONFIG_FOLDER}/{_CONFIG_FILE}": config}
    configuration: dict[str, Any] = {
        "command": shlex.join(command),
        "image": image,
        "volumes": [
            *(f"{source}:{target}:ro" for target, source in mounts.items() if source is not None),
            *([f"{keep}:{_KEPT}:rw"] if keep is not None else []),
        ],
        "auto_remove": True,
        "privileged": False,
        "stream_output": True,
        "container_create_kwargs": container,
    }
    if memory is not None:
        configuration |= {"mem_limit": memory, "memswap_limit": memory}
    return configuration


def _kubernetes(
    command: list[str],
    *,
    image: str | None,
    data: str | None,
    keep: str | None,
    config: str | None,
    memory: str | None,
    cpus: float | None,
) -> dict[str, Any]:
    """The job configuration of a kubernetes pool. A pod that is evicted is not replaced: the round goes on without the site."""
    mounts: list[dict[str, Any]] = []
    volumes: list[dict[str, Any]] = []
    if data is not None:
        mounts.append({"name": "data", "mountPath": _DATA, "readOnly": True})
        volumes.append({"name": "data", "persistentVolumeClaim": {"claimName": data, "readOnly": True}})
    if keep is not None:
        mounts.append({"name": "keep", "mountPath": _KEPT})
        volumes.append({"name": "keep", "persistentVolumeClaim": {"claimName": keep}})
    if config is not None:
        mounts.append({"name": "config", "mountPath": _CONFIG_FOLDER, "readOnly": True})
        volumes.append({"name": "config", "secret": {"secretName": config}})
    resources = {} if memory is None else {"memory": memory}
    if cpus is not None:
        resources["cpu"] = f"{round(cpus * 1000)}m"
    container = {
        "name": "prefect-job",
        "image": image,
        "args": command,
        "volumeMounts": mounts,
        "resources": {"limits": resources, "requests": resources},
        "securityContext": {"privileged": False, "allowPrivilegeEscalation": False},
    }
    pod = {
        "parallelism": 1,  # Prefect wants these two here too
        "completions": 1,
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "securityContext": {"seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [container],
        "volumes": volumes,
    }
    job = {"backoffLimit": 0, "ttlSecondsAfterFinished": _JOB_KEPT_S, "template": {"spec": pod}}
    return {
        "job_manifest": {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"generateName": "fedpool-site-", "labels": {}, "annotations": {}},
            "spec": job,
        },
        "stream_output": True,
    }


def _options(**given: str | None) -> list[str]:
    return [word for option, value in given.items() if value is not None for word in (f"--{option}", value)]


def _with_env(variables: Mapping[str, str]) -> list[str]:
    return ["env", *(f"{name}={value}" for name, value in variables.items())] if variables else []


def _check_kind(kind: str, given: Mapping[str, object]) -> None:
    if kind not in ("process", "docker", "kubernetes"):
        raise ConfigError(f"there is no template of type {kind!r}: give process, docker or kubernetes")
    for option, value in given.items():
        if value is not None and kind not in _ONLY_IN[option]:
            raise ConfigError(f"a {kind} pool has no {option} (it was {value!r}): leave it out")
    if kind in _ONLY_IN["image"] and not given["image"]:
        raise ConfigError(f"a {kind} pool needs an image: one with fedpool and what scripts import")


def _check_texts(given: Mapping[str, str | None]) -> None:
    for option, value in given.items():
        if value is not None:
            _check_no_placeholder(option, value)
            if not value or value != value.strip():
                raise ConfigError(f"{option} is {value!r}: it must not be empty, nor begin or end with a space")


def _check_env(variables: Mapping[str, str]) -> None:
    for name, value in variables.items():
        if not _VARIABLE_NAME.fullmatch(name):
            raise ConfigError(f"env {name!r} is not the name of a variable")
        _check_no_placeholder(f"env {name}", value)


def _check_no_placeholder(option: str, value: str) -> None:
    if "{{" in value:
        raise ConfigError(f"{option} is {value!r}: '{{{{' would be a placeholder, which deployments fill in")


def _check_memory(kind: str, memory: str) -> None:
    pattern, examples = _MEMORY[kind]
    if not pattern.fullmatch(memory):
        raise ConfigError(f"memory {memory!r} is not a limit that {kind} understands: write, for example, {examples}")


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
        raise ConfigError(f"{option} {name!r} cannot be the name of {what} of kubernetes")
