"""The sessions of simulated sites, and the sites' folders."""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedpool.bundle import unpack_bundle
from fedpool.messages import ClientJob
from fedpool.refusals import explained
from fedpool.site_order import in_order
from fedpool.sites.scratch import Scratch
from fedpool.sites.script_process import ProcessLauncher
from fedpool.sites.script_session import ScriptSession
from fedpool.sites.session import Session, Work
from fedpool.sites.sockets import make_socket_folder
from fedpool.sites.zygote import Zygote


class LocalSessions:
    """Starts the sessions of a simulation's sites, and keeps track of them.

    The arguments are those of `LocalSites`.

    Attributes:
        living: site -> its running session.
    """

    __slots__ = (
        "_commands",
        "_folder",
        "_gpus",
        "_imports",
        "_index",
        "_job",
        "_launchers",
        "_names",
        "_origin",
        "_scratch",
        "_sockets",
        "_workdir",
        "_zygote",
        "living",
    )

    def __init__(
        self,
        names: Sequence[str],
        *,
        threads: int,
        gpus: Sequence[str],
        workspace: Path,
        workdir: Path,
        imports: Sequence[str],
        commands: Mapping[str, str],
        origin: str,
    ) -> None:
        self.living: dict[str, Session] = {}
        self._names = tuple(names)
        self._index = {name: index for index, name in enumerate(in_order(names))}
        self._gpus = tuple(gpus)
        self._workdir = workdir
        self._sockets = make_socket_folder()
        self._scratch = Scratch(workspace, ".fedpool-sites-")
        self._folder = self._scratch.path
        self._imports = tuple(imports)
        self._origin = origin
        self._commands = dict(commands)
        self._launchers = {
            command: ProcessLauncher(
                command, threads=threads, imports=imports, environment=os.environ, beside=Path.cwd()
            )
            for command in set(commands.values())
        }
        self._zygote = None if commands.keys() >= set(names) else Zygote(threads=threads)
        self._job: ClientJob | None = None

    def preload(self) -> None:
        """See `LocalSites.preload`."""
        if self._zygote is not None:
            self._zygote.preload(self._imports)

    def open(self, job: ClientJob, bundle: bytes) -> None:
        """Prepare for a job with this bundle."""
        unpack_bundle(bundle, self._folder / "bundle", sha256=job.bundle_sha256)
        self._job = job

    def folder_of(self, site: str) -> Path:
        """A site's folder."""
        return self._folder / "sites" / site

    def session_of(self, site: str, slot: int) -> Session:
        """The site's session; if none is running, a new one on the slot's device."""
        return self.living.get(site) or self._new(site, slot)

    def kill(self) -> None:
        """Kill every session. From any thread."""
        for session in list(self.living.values()):
            session.kill()

    def close(self) -> None:
        """After all sessions have ended, end the zygote and remove the folders."""
        self.living.clear()
        if self._zygote is not None:
            self._zygote.close()
        self._scratch.remove()
        shutil.rmtree(self._sockets, ignore_errors=True)

    def _new(self, site: str, slot: int) -> Session:
        assert self._job is not None, "open() comes first"
        folder, sockets = self.folder_of(site), self._sockets / str(self._names.index(site))
        for made in (folder, sockets):
            with explained(made):
                made.mkdir(parents=True, exist_ok=True)
        environment = {"CUDA_VISIBLE_DEVICES": self._gpus[slot % len(self._gpus)]} if self._gpus else {}
        work = Work(
            job_id=self._job.job_id,
            site=site,
            script=self._folder / "bundle" / self._job.entry,
            arguments=self._job.site_arguments.get(site, self._job.arguments),
            config={**self._job.config, **self._job.site_config.get(site, {})},
            environment=environment,
            site_index=self._index[site],
            num_sites=len(self._names),
            origin=self._origin,
        )
        launcher = self._launchers[self._commands[site]] if site in self._commands else self._zygote
        assert launcher is not None
        session = ScriptSession(work, launcher, folder=sockets, workdir=self._workdir)
        self.living[site] = session
        return session
