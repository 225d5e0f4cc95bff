"""APP on the command line: from ``module:attribute`` to the app that it names."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType

from conveyor import config
from conveyor.app import Conveyor
from conveyor.core.settle import describe
from conveyor.errors import ConfigurationError


class AppNotFound(ConfigurationError):
    """APP does not lead to an app; the text says where the way ended."""


def load_app(path: str, *, broker: str | None = None, database: str | None = None) -> Conveyor:
    """The app that ``module:attribute`` names; a module alone stands for the only app in it.

    The current directory is searched first, as ``python -m`` does. A flag overrules what the app says.

    Parameters:
        broker: the flag --broker; None where it was not given.
        database: the flag --database; None where it was not given.

    Raises:
        AppNotFound: it does not import, or is no app.
    """
    app = _find(path)
    if broker is not None:
        app.broker_url, app._given_broker = broker, None
    if database is not None:
        app.database_url = database
    return app


def broker_url(app: Conveyor) -> str:
    """The URL of an app's broker.

    Raises:
        ConfigurationError: it was given as an object, which only its own process can use; or the settings make no sense.
    """
    if app._given_broker is not None:
        raise ConfigurationError(f"the broker of {app.name} is an object made in code; say which one with --broker URL")
    return config.broker_url(app.name, app.broker_url)


def _find(path: str) -> Conveyor:
    name, colon, attribute = path.partition(":")
    if name.endswith(".py") or "/" in name or os.sep in name:
        dotted = ".".join(part for part in Path(name.removesuffix(".py")).parts if part not in (".", "/"))
        raise AppNotFound(f"APP is a module, not a file: write {dotted}:{attribute or 'app'} instead of {path}")
    if not name or not all(part.isidentifier() for part in name.split(".")) or (colon and not attribute):
        raise AppNotFound(f"{path!r} is no APP; write module:attribute, for example shop:app")
    module = _imported(name)
    return _attribute(module, attribute) if attribute else _only(module)


def _imported(name: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except KeyboardInterrupt:
        raise
    except ModuleNotFoundError as error:
        if (
            error.name is not None
            and (name == error.name or name.startswith(error.name + "."))
            and _own_frame(error) is None
        ):
            raise AppNotFound(f"there is no module {error.name!r} in {here}{_suggestion(error.name)}") from error
        raise AppNotFound(_broken(name, error)) from error
    except SystemExit as error:
        raise AppNotFound(
            f"{name} ended the program while it was imported (sys.exit({error.code!r})); "
            'put that under if __name__ == "__main__":'
        ) from error
    except BaseException as error:
        raise AppNotFound(_broken(name, error)) from error


def _broken(name: str, error: BaseException) -> str:
    if isinstance(error, SyntaxError):
        place, line = f"{error.filename}, line {error.lineno}", error.text
    else:
        frame = _own_frame(error)
        place, line = (f"{frame.filename}, line {frame.lineno}", frame.line) if frame else (name, "")
    shown = f"\n    {line.strip()}" if line and line.strip() else ""
    return f"{name} does not import. {place}:{shown}\n{describe(error)}"


def _own_frame(error: BaseException) -> traceback.FrameSummary | None:
    """The user's line where it happened: the last one that is neither in a library nor in Conveyor itself."""
    libraries = (
        "site-packages",
        "dist-packages",
        str(Path(os.__file__).parent),
        str(Path(__file__).parent.parent),
        "<frozen",
    )
    frames = traceback.extract_tb(error.__traceback__)
    return next((frame for frame in reversed(frames) if not any(part in frame.filename for part in libraries)), None)


def _suggestion(name: str) -> str:
    *parents, last = name.split(".")
    folder = Path.cwd().joinpath(*parents)
    found = [p.stem for p in folder.glob("*.py")] + [p.parent.name for p in folder.glob("*/__init__.py")]
    near = difflib.get_close_matches(last, found, 1)
    return (
        f"; did you mean {'.'.join([*parents, near[0]])}?"
        if near
        else "; run it in the directory that holds the module, or install it"
    )


def _apps(module: ModuleType) -> dict[str, Conveyor]:
    return {name: value for name, value in vars(module).items() if isinstance(value, Conveyor)}


def _attribute(module: ModuleType, path: str) -> Conveyor:
    found: object = module
    for part in path.split("."):
        if not hasattr(found, part):
            known = _apps(module)
            near = difflib.get_close_matches(path, known, 1) or list(known)
            hint = (
                f"; did you mean {module.__name__}:{near[0]}?" if near else '; it holds no app (app = Conveyor("name"))'
            )
            raise AppNotFound(f"{module.__name__} has no attribute {path!r}{hint}")
        found = getattr(found, part)
    if not isinstance(found, Conveyor):
        apps = list(_apps(module))
        hint = f"; did you mean {module.__name__}:{apps[0]}?" if apps else ""
        raise AppNotFound(f"{module.__name__}:{path} is a {type(found).__name__}, not a Conveyor{hint}")
    return found


def _only(module: ModuleType) -> Conveyor:
    apps = _apps(module)
    different = {id(app): app for app in apps.values()}
    if len(different) == 1:
        return next(iter(different.values()))
    name = module.__name__
    if not apps:
        raise AppNotFound(f'{name} holds no app; it needs a line such as app = Conveyor("{name.rpartition(".")[2]}")')
    choices = ", ".join(f"{name}:{attribute}" for attribute in sorted(apps))
    raise AppNotFound(f"{name} holds several apps; say which: {choices}")
