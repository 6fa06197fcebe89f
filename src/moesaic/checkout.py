"""Where this package comes from: a checkout of the repository, or an installed wheel."""

import subprocess
from pathlib import Path

__all__ = ["CONFIG_DIR", "checkout", "git"]

PACKAGE = Path(__file__).resolve().parent


def checkout() -> Path | None:
    """The root of the checkout that this package is imported from; None for an installed wheel."""
    root = PACKAGE.parents[1]
    is_checkout = PACKAGE.parent.name == "src" and (root / "pyproject.toml").is_file() and (root / "conf").is_dir()
    return root if is_checkout else None


CONFIG_DIR = (checkout() or PACKAGE) / "conf"
"""The YAML files of the commands: those of the checkout, or those that came with the wheel."""


def git(*arguments: str) -> str | None:
    """What git says about this package's checkout; None without one, so that nobody else's repository is asked."""
    root = checkout()
    if root is None or not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
