"""Base job templates for process, docker and kubernetes pools, which run a site's rounds cold.

People who can create runs must not get code or mounts into the site's process or container. So the
command is `fedpool site run` with the site's settings as its options, and no variable is left for a
deployment or a run to fill in: the server refuses job variables, and the worker has no place for
them. `env` is missing on purpose: if a template has it, Prefect merges the deployment's `env` into
it. Our variables are in the command, and for kubernetes in the manifest.

A template cannot keep out someone who may change the work pool itself. In a process pool it also
cannot keep Prefect's worker from loading the deployment's flow, with its pull steps, for its hooks
when a run is cancelled or killed (Prefect 3.8.8). So use a process pool only if everyone who can
create deployments may run code at the site. The `fedpool-site` worker never loads any.
"""

import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from fedpool.deployments.template_checks import Kind, SitePool, check_pool, words
from fedpool.errors import ConfigError
from fedpool.sites.sandbox import Sandboxing

_DATA = "/data"
_CONFIG_FOLDER = "/etc/fedpool"
_CONFIG_FILE = "site.toml"
_FOLDER = "/tmp/fedpool-site"
_KEPT = f"{_FOLDER}/kept"
_JOB_KEPT_S = 3600


def base_job_template(
    kind: Kind,
    *,
    name: str,
    store: str | None = None,
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
    sandbox: Sandboxing | None = None,
) -> dict[str, Any]:
    """A template for `prefect work-pool create --type KIND --base-job-template FILE POOL`.

    Args:
        kind: type of the work pool.
        name: the site's name; a run for another site is refused.
        store: URL of the only store that the site uses, if `config`, `env` or `env_secret` does not
            give it.
        image: image with fedpool and the packages that scripts import. If it has an entrypoint,
            that must run its arguments.
        data: the site's data: an absolute path; for kubernetes the name of a volume claim. It is
            mounted read-only at `/data`.
        keep: folder for tensors that scripts keep between rounds: an absolute path; for kubernetes
            the name of a volume claim.
        config: the site's TOML file: an absolute path; for kubernetes the name of a secret with the
            key `site.toml`.
        env: variables of the command. They are visible on the server: put secrets in `config` or
            `env_secret`.
        env_secret: name of a kubernetes secret whose keys are variables, e.g. the store's
            credentials.
        memory: limit; docker: bytes with the unit b, k, m or g; kubernetes: a quantity such as 4Gi.
        cpus: limit, in processors.
        namespace: kubernetes namespace; default: `default`.
        program: command that runs fedpool at the site, e.g. for a process pool the path of the
            environment's `bin/fedpool`.
        sandbox: how the site isolates scripts; default: in a container not at all, because engines
            forbid namespaces inside theirs; in a process as the site's settings say.

    Raises:
        ConfigError: a value is invalid, or this type of pool lacks the option.
    """
    pool = SitePool(
        kind=kind,
        name=name,
        store=store,
        image=image,
        data=data,
        keep=keep,
        config=config,
        env=dict(env or {}),
        env_secret=env_secret,
        memory=memory,
        cpus=cpus,
        namespace=namespace,
        program=program,
        sandbox=sandbox or (None if kind == "process" else "none"),
    )
    check_pool(pool)
    return {
        "job_configuration": {"process": _process, "docker": _docker, "kubernetes": _kubernetes}[kind](pool),
        "variables": {"type": "object", "properties": {}, "additionalProperties": False},
    }


def parse_env(entries: Iterable[str]) -> dict[str, str]:
    """Parse entries of the form `NAME=VALUE` into variables.

    Raises:
        ConfigError: an entry has no "=".
    """
    found = {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        if not equals:
            raise ConfigError(f"env {entry!r} is not of the form NAME=VALUE")
        found[name] = value
    return found


def _command(pool: SitePool, **options: str | None) -> list[str]:
    given = (word for option, value in options.items() if value is not None for word in (f"--{option}", value))
    own = ["--name", pool.name, *(["--store", pool.store] if pool.store is not None else [])]
    own += ["--sandbox", pool.sandbox] if pool.sandbox is not None else []
    return [*words(pool.program), "site", "run", *own, *given]


def _command_in_container(pool: SitePool) -> list[str]:
    config = pool.config and f"{_CONFIG_FOLDER}/{_CONFIG_FILE}"
    return _command(pool, data=pool.data and _DATA, config=config, folder=_FOLDER)


def _process(pool: SitePool) -> dict[str, Any]:
    """The job configuration of a process pool."""
    return {"command": shlex.join([*_with_env(pool.env), *_command(pool, data=pool.data, config=pool.config)])}


def _docker(pool: SitePool) -> dict[str, Any]:
    """The job configuration of a docker pool. A missing image is pulled from its registry."""
    # init ends processes that a script leaves behind, and forwards SIGTERM.
    container: dict[str, Any] = {"init": True, "security_opt": ["no-new-privileges"]}
    if pool.cpus is not None:
        container["nano_cpus"] = round(pool.cpus * 1e9)
    mounts = {_DATA: pool.data, f"{_CONFIG_FOLDER}/{_CONFIG_FILE}": pool.config}
    configuration: dict[str, Any] = {
        "command": shlex.join([*_with_env(pool.env), *_command_in_container(pool)]),
        "image": pool.image,
        "volumes": [
            *(f"{source}:{target}:ro" for target, source in mounts.items() if source is not None),
            *([f"{pool.keep}:{_KEPT}:rw"] if pool.keep is not None else []),
        ],
        "auto_remove": True,
        "privileged": False,
        "stream_output": True,
        "container_create_kwargs": container,
    }
    if pool.memory is not None:
        configuration |= {"mem_limit": pool.memory, "memswap_limit": pool.memory}
    return configuration


def _kubernetes(pool: SitePool) -> dict[str, Any]:
    """The job configuration of a kubernetes pool. An evicted pod is not replaced.

    The round then goes on without the site.
    """
    mounts, volumes = _volumes(pool)
    resources = {} if pool.memory is None else {"memory": pool.memory}
    if pool.cpus is not None:
        resources["cpu"] = f"{round(pool.cpus * 1000)}m"
    container: dict[str, Any] = {
        "name": "prefect-job",
        "image": pool.image,
        "args": _command_in_container(pool),
        "env": [{"name": key, "value": value} for key, value in pool.env.items()],
        "volumeMounts": mounts,
        "resources": {"limits": resources, "requests": resources},
        "securityContext": {"privileged": False, "allowPrivilegeEscalation": False},
    }
    if pool.env_secret is not None:
        container["envFrom"] = [{"secretRef": {"name": pool.env_secret}}]
    pod = {
        "parallelism": 1,  # Prefect requires these two here as well
        "completions": 1,
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "securityContext": {"seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [container],
        "volumes": volumes,
    }
    job = {"backoffLimit": 0, "ttlSecondsAfterFinished": _JOB_KEPT_S, "template": {"spec": pod}}
    return {
        "namespace": pool.namespace or "default",
        "job_manifest": {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"generateName": "fedpool-site-", "labels": {}, "annotations": {}},
            "spec": job,
        },
        "stream_output": True,
    }


def _volumes(pool: SitePool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A container's mounts and their volumes: the site's data, kept tensors and settings."""
    mounts: list[dict[str, Any]] = []
    volumes: list[dict[str, Any]] = []
    if pool.data is not None:
        mounts.append({"name": "data", "mountPath": _DATA, "readOnly": True})
        volumes.append({"name": "data", "persistentVolumeClaim": {"claimName": pool.data, "readOnly": True}})
    if pool.keep is not None:
        mounts.append({"name": "keep", "mountPath": _KEPT})
        volumes.append({"name": "keep", "persistentVolumeClaim": {"claimName": pool.keep}})
    if pool.config is not None:
        mounts.append({"name": "config", "mountPath": _CONFIG_FOLDER, "readOnly": True})
        volumes.append({"name": "config", "secret": {"secretName": pool.config}})
    return mounts, volumes


def _with_env(variables: Mapping[str, str]) -> list[str]:
    return ["env", *(f"{name}={value}" for name, value in variables.items())] if variables else []
