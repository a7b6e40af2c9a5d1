"""A Flower app in a directory: its ``pyproject.toml`` names the app's two parts and its run config."""

import difflib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedexec._system.error_text import message_of
from fedexec.errors import FedexecError
from fedexec.flower.flower_internals import flatten_dict, fuse_dicts, get_project_config, parse_config_args

__all__ = ["AppDirectoryError", "FlowerApp", "installed_app", "read_app"]

_APP_NAME = re.compile(r"@?(?P<publisher>[\w-]+)/(?P<app>[\w-]+)(==(?P<version>[\w.-]+))?")


class AppDirectoryError(FedexecError, ValueError):
    """A directory is not a Flower app, or a run config does not fit the app; the message tells which."""


@dataclass(frozen=True, slots=True)
class FlowerApp:
    """Where an app's parts are, and the run config for both.

    Attributes
    ----------
    server, client : str
        ``"module:attribute"``.
    run_config : dict
    num_nodes : int or None
        Number of nodes that the app is meant for; None if the app does not name one.
    resources : dict
        What the app asks for each client of Flower's engine: ``num-cpus`` and ``num-gpus``, if it does.
    """

    server: str
    client: str
    run_config: dict[str, Any] = field(default_factory=dict)
    num_nodes: int | None = None
    resources: dict[str, float] = field(default_factory=dict)

    def configured(self, overrides: Sequence[str]) -> "FlowerApp":
        """Return the app with another run config.

        Parameters
        ----------
        overrides : sequence of str
            As for ``flwr run --run-config``: ``"num-rounds=5 lr=0.1"``, or a TOML file. If the app has a
            config, only its keys can be overridden.

        Returns
        -------
        FlowerApp

        Raises
        ------
        AppDirectoryError
            The overrides cannot be parsed, or do not fit the app.
        """
        try:
            given = parse_config_args(list(overrides))
            if overrides and not given:
                raise ValueError("write it like \"num-rounds=5 name='digits'\"")
            for key in given if self.run_config else ():
                if key not in self.run_config:
                    nearest = difflib.get_close_matches(key, self.run_config, n=1)
                    known = ", ".join(self.run_config)
                    advice = f"did you mean {nearest[0]!r}?" if nearest else f"known: {known}"
                    raise ValueError(f"the app has no key {key!r}; {advice}")
            config: Mapping[str, Any] = fuse_dicts(self.run_config, given) if self.run_config else given
        except Exception as exc:  # Flower's parser raises the exceptions that its command line prints.
            reason = getattr(exc, "message", None) or str(exc)
            raise AppDirectoryError(f"The run config {' '.join(overrides)!r}: {reason}") from exc
        return replace(self, run_config=dict(config))


def installed_app(name: str) -> Path | None:
    """Return the directory of an app that ``flwr install`` has installed.

    Parameters
    ----------
    name : str
        ``"publisher/app"``, with ``"@"`` before it or not, and with ``"==version"`` after it or not.

    Returns
    -------
    Path or None
        None if `name` is not of that form.

    Raises
    ------
    AppDirectoryError
        The app is not installed, or in several versions of which the name chooses none.
    """
    parts = _APP_NAME.fullmatch(name)
    if parts is None:
        return None
    home = Path(os.environ.get("FLWR_HOME") or Path.home() / ".flwr") / "apps"
    version = parts["version"] or "*"
    found = sorted(home.glob(f"{parts['publisher']}.{parts['app']}.{version}.*/pyproject.toml"))
    if len(found) == 1:
        return found[0].parent
    if not found:
        raise AppDirectoryError(f"{name!r} is neither a directory nor an app that is installed in {home}")
    names = ", ".join(each.parent.name for each in found)
    raise AppDirectoryError(
        f"{name!r} is installed more than once: {names}; add ==VERSION, or name a directory"
    )


def read_app(directory: str | Path, federation: str | None = None) -> FlowerApp:
    """Read a Flower app, and add its directory to ``sys.path`` so that Python finds its modules.

    Parameters
    ----------
    directory : str or Path
    federation : str, optional
        Which of the federations in ``pyproject.toml`` says how many nodes there are; default: the one that
        it names as the default.

    Returns
    -------
    FlowerApp

    Raises
    ------
    AppDirectoryError
        The directory has no ``pyproject.toml``, or the file describes no app, or has no such federation;
        ``__cause__`` is Flower's exception.
    """
    path = Path(directory).resolve()
    try:
        project = get_project_config(path)
        app = project["tool"]["flwr"]["app"]
        config = flatten_dict(app.get("config", {}))
        options = _simulation_options(project["tool"]["flwr"], federation)
        num_nodes, resources = _num_supernodes(options), _client_resources(options)
    except (OSError, ValueError, KeyError) as exc:
        raise AppDirectoryError(f"{str(directory)!r} is not a Flower app: {message_of(exc)}") from exc
    components = app["components"]
    lies_under_src = any(_is_in(path / "src", each) for each in components.values())
    # An app under src/ need not be installed.
    for root in [path / "src", path] if lies_under_src else [path]:
        if str(root) not in sys.path:
            sys.path.insert(0, str(root))
    return FlowerApp(components["serverapp"], components["clientapp"], dict(config), num_nodes, resources)


def _simulation_options(settings: Mapping[str, Any], federation: str | None) -> Mapping[str, Any]:
    """Return the options of a simulated federation; nothing if it is not simulated, or does not exist."""
    federations = settings.get("federations", {})
    known = {name: each for name, each in federations.items() if isinstance(each, Mapping)}
    if federation is not None and federation not in known:
        raise ValueError(f"it has no federation {federation!r}; there is: {', '.join(known) or 'none'}")
    options = known.get(federation or federations.get("default", ""), {}).get("options", {})
    return options if isinstance(options, Mapping) else {}


def _num_supernodes(options: Mapping[str, Any]) -> int | None:
    number = options.get("num-supernodes")
    if number is None:
        return None
    if type(number) is not int or number < 1:
        raise ValueError(f"options.num-supernodes must be an integer of at least 1, got {number!r}")
    return number


def _client_resources(options: Mapping[str, Any]) -> dict[str, float]:
    given: Any = options
    for key in ("backend", "client-resources"):
        given = given.get(key, {}) if isinstance(given, Mapping) else {}
    resources = {}
    for key in ("num-cpus", "num-gpus"):
        value = given.get(key, 0) if isinstance(given, Mapping) else 0
        if type(value) not in (int, float) or not 0 <= value < float("inf"):
            raise ValueError(f"options.backend.client-resources.{key} must be a number, got {value!r}")
        if value:
            resources[key] = float(value)
    return resources


def _is_in(root: Path, component: str) -> bool:
    """Return whether a directory contains the package or module of an app's part."""
    name = component.partition(":")[0].partition(".")[0]
    return (root / name).is_dir() or (root / f"{name}.py").is_file()
