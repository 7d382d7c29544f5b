"""Printed tables of a benchmark, and the origin of a record: command, commit, date, machine and versions."""

import datetime as dt
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "measurements"


class Record:
    """A record of tables: printed as Markdown, and with ``--record`` written into ``docs/measurements``, too."""

    def __init__(self, name, packages):
        self.path = FOLDER / f"{name}.json" if "--record" in sys.argv[1:] else None
        self.content = {**origin(packages), "load": round(os.getloadavg()[0], 1), "tables": []}
        named = ", ".join(f"{package} {version}" for package, version in self.content["versions"].items())
        print(f"{self.content['machine']}, load {self.content['load']} at the beginning; {named}\n")

    def table(self, title, header, rows):
        """Print a table row by row while the rows are measured, and record it."""
        print(f"{title}\n\n| {' | '.join(header)} |\n|{'---|' * len(header)}", flush=True)
        kept = []
        for row in rows:
            kept.append([str(cell) for cell in row])
            print(f"| {' | '.join(kept[-1])} |", flush=True)
        print()
        self.content["tables"].append({"title": title, "header": list(header), "rows": kept})
        if self.path is not None:
            self.path.parent.mkdir(exist_ok=True)
            self.path.write_text(json.dumps(self.content, indent=1) + "\n")


def origin(packages):
    """Return the command of this process, the commit, the date, the machine, and the versions of packages."""
    program, *arguments = sys.argv
    shown = [Path(own).name if Path(own).is_absolute() else own for own in arguments]
    path = Path(program).resolve()
    versions = {package: version_of(package) for package in ("lqlora", *packages)}
    return {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "command": shlex.join([path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name, *shown]),
        "commit": commit(),
        "machine": f"{os.cpu_count()} cores of {processor()}, {platform.system()}",
        "versions": {package: version for package, version in versions.items() if version},
    }


def commit():
    """Return the commit of the working tree, with a plus if files differ from it, or None outside a repository."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        return None
    head, changes = (
        subprocess.run([git, *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
        for arguments in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
    )
    return f"{head}+" if changes else head or None


def version_of(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor():
    """Return the name of the processor and its widest vector instructions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    known = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    vectors = [
        isa for isa in ("avx512bw", "avx2", "asimd") if isa in known.get("flags", known.get("Features", "")).split()
    ]
    return f"{known.get('model name', platform.machine())} ({vectors[0] if vectors else 'no wide vectors known'})"
