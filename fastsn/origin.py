"""The pip command that reinstalls fastsn from where it was installed, with the C++ kernels."""

from __future__ import annotations

import importlib.metadata
import json
import shlex
from pathlib import Path
from urllib.parse import unquote, urlsplit


def reinstall() -> str:
    """The command. pip caches wheels that it has built, also those without kernels or for another torch, and skips
    installed packages, so its flags force a build; without isolation it builds with the installed torch."""
    flags = "--no-cache-dir --force-reinstall --no-deps --no-build-isolation"
    return f'pip install "setuptools>=77" && pip install {flags} {_source()}'


def _source() -> str:
    """The source that pip installed from, as an argument of pip."""
    root = Path(__file__).parent.parent
    if (root / "setup.py").exists():  # a clone, or an editable installation
        return f"--editable {shlex.quote(str(root))}"
    try:
        package = importlib.metadata.distribution("fastsn")
    except importlib.metadata.PackageNotFoundError:
        return "CLONE_OF_FASTSN"
    text = package.read_text("direct_url.json")
    if text is None:  # by name, from an index
        return f"--no-binary fastsn fastsn=={package.version}"
    origin = json.loads(text)
    url = origin["url"]
    if "vcs_info" in origin:
        return shlex.quote(f"{origin['vcs_info']['vcs']}+{url}@{origin['vcs_info']['commit_id']}")
    if url.startswith("file:"):
        url = unquote(urlsplit(url).path)
        if not Path(url).exists():
            return "CLONE_OF_FASTSN"
    return "CLONE_OF_FASTSN" if url.endswith(".whl") else shlex.quote(url)
