"""Python imports this file first in every process of a watched command.

It costs a process without torch one empty file; where torch is imported, normtune is let in.
"""

# mypy: ignore-errors
# No typing and no pathlib here: every Python process of a command would pay for them.
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
FOLDER = os.environ.get("NORMTUNE_RUN", "")


def _mark(kind, text=""):
    """Tell the parent; False where its folder is out of reach (a container, another machine)."""
    try:
        with open(os.path.join(FOLDER, "%s-%d" % (kind, os.getpid())), "w") as file:
            file.write(text)
    except OSError:
        return False
    return True


class _TorchFinder:
    """Waits on sys.meta_path for the one import that matters."""

    def find_spec(self, name, path=None, target=None):
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        from importlib.util import find_spec

        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            _call_after(spec.loader)
        return spec


def _call_after(loader):
    """Let normtune in when the loader has finished its module; then it is as it was."""
    load = loader.exec_module

    def exec_module(module):
        del loader.exec_module
        load(module)
        _enter()

    loader.exec_module = exec_module


def _enter():
    try:
        _load_normtune()
        from normtune import automatic

        automatic.start()
    except Exception as error:
        _mark("failed", "%s: %s" % (type(error).__name__, error))


def _load_normtune():
    """Load the normtune that this file belongs to: the command may run in another environment."""
    if "normtune" in sys.modules:
        return
    from importlib.util import module_from_spec, spec_from_file_location

    home = os.path.dirname(HERE)
    spec = spec_from_file_location(
        "normtune", os.path.join(home, "__init__.py"), submodule_search_locations=[home]
    )
    module = sys.modules["normtune"] = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules["normtune"]
        raise


def _chain():
    """Run the sitecustomize that Python would have found without this one."""
    sys.path[:] = [p for p in sys.path if os.path.abspath(p) != HERE]
    from importlib.machinery import PathFinder

    spec = PathFinder.find_spec("sitecustomize", sys.path)
    if spec is None or spec.loader is None:
        return
    from importlib.util import module_from_spec

    module = sys.modules["sitecustomize"] = module_from_spec(spec)
    spec.loader.exec_module(module)


if FOLDER and _mark("python"):
    if sys.version_info >= (3, 10):
        sys.meta_path.insert(0, _TorchFinder())
    else:
        _mark("failed", "Python %d.%d is too old, normtune needs 3.10" % sys.version_info[:2])
_chain()
