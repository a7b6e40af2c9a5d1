"""A Flower app in a directory: its ``pyproject.toml`` names the app's two parts and its run config."""

import difflib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedexec._system.error_text import message_of
from fedexec.errors import FedexecError
from fedexec.flower.flower_internals import flatten_dict, fuse_dicts, get_project_config, parse_config_args

__all__ = ["AppDirectoryError", "FlowerApp", "read_app"]


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
    """

    server: str
    client: str
    run_config: dict[str, Any] = field(default_factory=dict)
    num_nodes: int | None = None

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


def read_app(directory: str | Path) -> FlowerApp:
    """Read a Flower app, and add its directory to ``sys.path`` so that Python finds its modules.

    Parameters
    ----------
    directory : str or Path

    Returns
    -------
    FlowerApp

    Raises
    ------
    AppDirectoryError
        The directory has no ``pyproject.toml``, or the file describes no app; ``__cause__`` is Flower's
        exception.
    """
    path = Path(directory).resolve()
    try:
        project = get_project_config(path)
        app = project["tool"]["flwr"]["app"]
        config = flatten_dict(app.get("config", {}))
        num_nodes = _num_supernodes(project["tool"]["flwr"])
    except (OSError, ValueError, KeyError) as exc:
        raise AppDirectoryError(f"{str(directory)!r} is not a Flower app: {message_of(exc)}") from exc
    components = app["components"]
    lies_under_src = any(_is_in(path / "src", each) for each in components.values())
    # An app under src/ need not be installed.
    for root in [path / "src", path] if lies_under_src else [path]:
        if str(root) not in sys.path:
            sys.path.insert(0, str(root))
    return FlowerApp(components["serverapp"], components["clientapp"], dict(config), num_nodes)


def _num_supernodes(settings: Mapping[str, Any]) -> int | None:
    """Return ``options.num-supernodes`` of the default federation; None if it is not a simulation."""
    default = settings.get("federations", {}).get("default")
    number: Any = settings
    for key in ("federations", default, "options", "num-supernodes"):
        number = number.get(key, {}) if isinstance(number, Mapping) else {}
    if number == {}:
        return None
    if type(number) is not int or number < 1:
        raise ValueError(f"options.num-supernodes must be an integer of at least 1, got {number!r}")
    return number


def _is_in(root: Path, component: str) -> bool:
    """Return whether a directory contains the package or module of an app's part."""
    name = component.partition(":")[0].partition(".")[0]
    return (root / name).is_dir() or (root / f"{name}.py").is_file()
