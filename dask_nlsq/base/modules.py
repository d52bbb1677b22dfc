"""Functions by the names that files keep of them: which may be imported, since importing a module runs its code."""

import site
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module, invalidate_caches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

Trust = bool | str | Path  # whose modules may be imported: of packages alone, of all, or of a directory as well

_INSTALLED = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")} | {
    *site.getsitepackages(),
    site.getusersitepackages(),
    str(Path(__file__).parent.parent),
}


def is_installed(file: str) -> bool:
    """Whether it is of Python, of an installed package or of this one, and not the user's own."""
    return any(Path(file).is_relative_to(root) for root in _INSTALLED)


class UntrustedError(ValueError):
    """A file names code or an address that is imported or opened only with the user's consent."""


def import_name(f) -> list[str] | None:
    """Module and name by which another process can import ``f``; None where it cannot: a lambda, a notebook's function."""
    module, qualname = getattr(f, "__module__", None), getattr(f, "__qualname__", "<>")
    return None if module in (None, "__main__") or "<" in qualname else [module, qualname]


@contextmanager
def _searched(trust: Trust) -> Iterator[None]:
    """Within, modules are found in the directory ``trust`` as well, after all others: it hides no installed package."""
    directory = None if isinstance(trust, bool) else str(Path(trust).resolve())
    if directory is None or directory in sys.path:
        yield
        return
    sys.path.append(directory)
    invalidate_caches()  # of files that are younger than the last look
    try:
        yield
    finally:
        if directory in sys.path:
            sys.path.remove(directory)


def origin(module: str, trust: Trust) -> str:
    """Where a module comes from, before its code runs; that of its parents may, once they have passed.

    A module that this process has imported already is there whatever a file says.

    Raises
    ------
    UntrustedError
        Where it is neither of Python, nor of an installed package, nor in the directory ``trust``.
    ImportError
        The module does not exist; the message says where it was looked for.
    """
    with _searched(trust):
        return _origin(module, trust)


def _origin(module, trust):
    names, found = module.split("."), ""
    for name in (".".join(names[: k + 1]) for k in range(len(names))):
        if name in sys.modules:
            found = getattr(sys.modules[name], "__file__", None) or "built-in"
            continue
        spec: Any = find_spec(name) if all(name.split(".")) else None
        if spec is None:
            places = [str(Path(each).resolve()) for each in sys.path]
            looked = ", ".join(each for each in places if not is_installed(each))
            raise ModuleNotFoundError(f"no module {name!r} among the installed packages and in {looked}", name=name)
        found = spec.origin or ""
        own = trust if isinstance(trust, bool) else Path(found).resolve().is_relative_to(Path(trust).resolve())
        if spec.origin not in (None, "built-in", "frozen") and not (own or is_installed(found)):
            raise UntrustedError(
                f"the module {name} ({found}) does not belong to an installed package, and importing it runs its code"
            )
    return found


def directory_of(module: str) -> str:
    """Where a module is that ``trust`` has to name, "." for the current directory; "" for one of an installed package."""
    here, top = Path().resolve(), module.partition(".")[0]
    with _searched(here):
        spec: Any = find_spec(top) if top else None
    if spec is None:
        return "DIR"
    if spec.origin in (None, "built-in", "frozen") or is_installed(spec.origin):
        return ""
    parent = Path(spec.origin).resolve().parent
    parent = parent.parent if spec.submodule_search_locations else parent
    return "." if parent == here else str(parent)


def import_by(name: list[str], trust: Trust):
    """What `import_name` has named.

    Raises
    ------
    UntrustedError
        As `origin`.
    ImportError, AttributeError
        Where it is not there any more.
    """
    module, qualname = name
    with _searched(trust):
        origin(module, trust)
        found = import_module(module)
    for part in qualname.split("."):
        found = getattr(found, part)
    return found
