"""A Slurm controller on loopback that answers `sbatch --test-only`: no daemon on nodes, no munge, no accounts.

The programs are those on the PATH, or in packages unpacked below the folder named by HETIS_SLURM:

    apt-get download slurmctld slurm-client slurm-wlm-basic-plugins libmunge2 libhwloc15 liblua5.1-0
    for package in *.deb; do dpkg -x $package slurm; done
"""

from __future__ import annotations

import getpass
import os
import shutil
import subprocess
import threading
from collections.abc import Mapping
from pathlib import Path

from examples.processes import free_ports

_LIBRARIES = Path("usr/lib/x86_64-linux-gnu")
_READY = "Running as primary controller"
# Cloud nodes that are powered down count as usable, although no slurmd answers there.
_CONFIGURATION = """ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmdPort={slurmd_port}
AuthType=auth/none
CredType=cred/none
SlurmUser={user}
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
PlugStackConfig={folder}/plugstack.conf
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SuspendProgram=/bin/true
ResumeProgram=/bin/true
SuspendTime=600
{plugins}
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Programs:
    """The programs of Slurm, and the environment that they need.

    Attributes:
        missing: the names of missing programs.
    """

    def __init__(self) -> None:
        unpacked = os.environ.get("HETIS_SLURM")
        self._root = Path(unpacked).resolve() if unpacked else None
        path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin"])
        if self._root:
            path = os.pathsep.join(str(self._root / folder) for folder in ("usr/bin", "usr/sbin"))
        found = {name: shutil.which(name, path=path) for name in ("sbatch", "scontrol", "slurmctld")}
        found["slurmctld"] = found["slurmctld"] or shutil.which("slurmctld-wlm", path=path)  # Debian's name of it
        self._paths = {name: program for name, program in found.items() if program}
        self.missing = sorted(found.keys() - self._paths.keys())

    def __getitem__(self, name: str) -> str:
        return self._paths[name]

    @property
    def plugins(self) -> str:
        """Return the line with the folder of plugins, if it is not the one compiled in."""
        return f"PluginDir={self._root / _LIBRARIES / 'slurm-wlm'}" if self._root else ""

    @property
    def environment(self) -> dict[str, str]:
        if self._root is None:
            return dict(os.environ)
        libraries = (self._root / _LIBRARIES, self._root / _LIBRARIES / "slurm-wlm")
        return {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(map(str, libraries))}


class Controller:
    """A `slurmctld` with these nodes and their numbers of GPUs, as a context manager."""

    def __init__(self, programs: Programs, folder: Path, gpus: Mapping[str, int]) -> None:
        self._programs, self._folder, self._gpus = programs, folder, gpus
        (folder / "state").mkdir()
        (folder / "plugstack.conf").touch()
        port = free_ports(2)
        nodes = (f"NodeName={name} NodeAddr=127.0.0.1 CPUs=64 Gres=gpu:{n} State=CLOUD" for name, n in gpus.items())
        configuration = folder / "slurm.conf"
        configuration.write_text(
            _CONFIGURATION.format(
                port=port,
                slurmd_port=port + 1,
                user=getpass.getuser(),
                folder=folder,
                plugins=programs.plugins,
                nodes="\n".join(nodes),
            )
        )
        self._environment = programs.environment | {"SLURM_CONF": str(configuration)}

    def __enter__(self) -> Controller:
        self._daemon = subprocess.Popen(
            [self._programs["slurmctld"], "-D", "-c", "-f", self._environment["SLURM_CONF"]],
            env=self._environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        said = []
        for line in self._daemon.stderr:
            said.append(line)
            if _READY in line:
                break
        else:
            self._daemon.wait()
            raise AssertionError("".join(said))
        # A pipe that is not read would block the controller when it is full.
        self._reader = threading.Thread(target=self._daemon.stderr.read, daemon=True)
        self._reader.start()
        for name, num_gpus in self._gpus.items():
            # As a node reports when it wakes; until then the controller assumes that it has no GPUs.
            done = self._run("scontrol", "update", f"NodeName={name}", f"Gres=gpu:{num_gpus}")
            assert done.returncode == 0, done.stderr
        return self

    def __exit__(self, *_: object) -> None:
        self._daemon.kill()
        self._daemon.wait()
        self._reader.join()
        self._daemon.stderr.close()

    def tested(self, script: Path) -> tuple[int, str]:
        """Return the exit code of `sbatch --test-only`, and its output."""
        done = self._run("sbatch", "--test-only", str(script))
        return done.returncode, done.stdout + done.stderr

    def _run(self, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self._programs[name], *arguments], env=self._environment, capture_output=True, text=True, timeout=120
        )
