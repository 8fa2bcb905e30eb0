"""What a run's figures depend on beside its configuration: machine, packages, git state, variables, command, ranks.

Every start writes `environment.json`, and appends the same as one line to `environments.jsonl`, so that a run that was
resumed on other machines or by other code tells so. Changes to the code that no commit has are kept beside them.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from nitscale.files import atomic_write, disk_errors
from nitscale.train.process import Process

SOURCE = Path(__file__).resolve().parents[2]
"""Where this package was imported from: a git checkout, or site-packages."""
VARIABLES = re.compile(
    r"(SLURM|NCCL|TORCH|PYTORCH|TRITON|CUDA|CUBLAS|OMP|MKL|GLOO|UCX|FI|MALLOC|DS|NITSCALE|PYTHON)_.+"
    r"|RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT|LD_PRELOAD|LD_LIBRARY_PATH|HF_HOME"
)
"""Environment variables that numbers or speed may depend on. All others stay out: they may be secrets …"""
SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|JWT|API_?KEY|ACCESS_?KEY", re.IGNORECASE)
"""… and so may these, in whatever name they occur."""
PASSWORD_IN_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")
LONGEST_DIFF = 1 << 20
"""Characters of the uncommitted changes that are kept."""
MOST_CHANGED_FILES = 100


def write_environment(run: Path, process: Process) -> None:
    """Describe this start of the run in its folder. All ranks must call it. UserError, on all, if it cannot be
    written."""
    hosts = process.gather(socket.gethostname())
    with process.together(f"write {run}"):
        if process.is_main:
            diff = uncommitted_changes(SOURCE)
            environment = describe_environment(process, hosts)
            if diff:
                name = f"uncommitted-{hashlib.sha256(diff.encode()).hexdigest()[:12]}.diff"
                atomic_write(run / name, diff.encode())
                environment["git"]["diff"] = name
            atomic_write(run / "environment.json", json.dumps(environment, indent=1).encode())
            history = run / "environments.jsonl"
            with disk_errors(history), history.open("a") as file:
                file.write(json.dumps(environment) + "\n")


def describe_environment(process: Process, hosts: Sequence[str]) -> dict[str, Any]:
    """JSON of all of it; `hosts` is the host's name of every rank."""
    ranks_of_host: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        ranks_of_host.setdefault(host, []).append(rank)
    return {
        "machine": machine(),
        "versions": versions(),
        "git": git_state(SOURCE),
        "gpu": gpu_software(),
        "command": [without_password(argument) for argument in (sys.orig_argv or sys.argv)],
        "folder": os.getcwd(),
        "ranks": {
            "world_size": process.world_size,
            "data_parallel": process.data_size,
            "tensor_parallel": process.tensor_size,
            "device": str(process.device.type),
            "hosts": ranks_of_host,
        },
        "variables": relevant_variables(os.environ),
        "packages": packages(),
    }


def machine() -> dict[str, Any]:
    """The machine that a figure belongs to, and when."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": gpu,
        "system": platform.platform(),
        "python": platform.python_version(),
        "time": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    }


def versions() -> dict[str, str]:
    """Of nitscale and of the packages that a figure depends on."""
    return {name: importlib.metadata.version(name) for name in ("nitscale", "torch", "deepspeed", "numpy")}


def packages() -> dict[str, str]:
    """Every installed distribution and its version, by name."""
    found = {}
    for distribution in importlib.metadata.distributions():
        with suppress(KeyError, TypeError):  # a half-removed package has no metadata
            found[distribution.metadata["Name"]] = distribution.version
    return dict(sorted((name, version) for name, version in found.items() if name))


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def gpu_software() -> dict[str, Any]:
    """Versions of CUDA, cuDNN, NCCL and the driver; empty without a GPU."""
    if not torch.cuda.is_available():
        return {}
    driver = None
    with suppress(OSError, IndexError):
        driver = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None
    return {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "nccl": nccl, "driver": driver}


def git_state(folder: Path) -> dict[str, Any]:
    """Commit, branch and changed files of the checkout that holds nitscale; empty if it is not in one."""
    if git(folder, "ls-files", "--error-unmatch", "nitscale/__init__.py") is None:
        return {}  # no checkout, no git, or a checkout of something else around our installation
    changed = (git(folder, "status", "--porcelain") or "").splitlines()
    return {
        "commit": (git(folder, "rev-parse", "HEAD") or "").strip() or None,
        "branch": (git(folder, "symbolic-ref", "--short", "-q", "HEAD") or "").strip() or None,
        "dirty": bool(changed),
        "changed": changed[:MOST_CHANGED_FILES],
    }


def uncommitted_changes(folder: Path) -> str:
    """The difference of tracked files from the commit, cut at LONGEST_DIFF; empty if there is none."""
    if git(folder, "ls-files", "--error-unmatch", "nitscale/__init__.py") is None:
        return ""
    diff = git(folder, "diff", "HEAD") or ""
    return diff if len(diff) <= LONGEST_DIFF else diff[:LONGEST_DIFF] + f"\n[cut: {len(diff):,} characters in all]\n"


def git(folder: Path, *arguments: str) -> str | None:
    """What git says, None if it fails, is slow or is not there. Without locks: others may work in the checkout."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=20,
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def relevant_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Those of VARIABLES, without secrets."""
    return {
        name: without_password(value)
        for name, value in sorted(environment.items())
        if VARIABLES.fullmatch(name) and not SECRET.search(name)
    }


def without_password(text: str) -> str:
    """The text without the user and password of a URL in it."""
    return PASSWORD_IN_URL.sub("…", text)
