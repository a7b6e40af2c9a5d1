"""Flower's private names: all in one file, and when a release moves one, this says which."""

import ast
import importlib
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import fedexec.flower

FOLDER = Path(fedexec.flower.__file__).parent
PRIVATE = FOLDER / "flower_internals.py"
PUBLIC = (
    "flwr.app", "flwr.client", "flwr.clientapp", "flwr.common", "flwr.server", "flwr.serverapp",
    "flwr.server.client_manager", "flwr.server.client_proxy", "flwr.server.strategy",
    "flwr.serverapp.strategy",
)  # fmt: skip


def imports(file):
    """Return (module, name) of everything that a file imports from Flower."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "flwr":
            found += [(node.module, alias.name) for alias in node.names]
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names if alias.name.split(".")[0] == "flwr"]
    return found


def test_one_file_imports_private_names():
    for file in FOLDER.parent.rglob("*.py"):
        if file != PRIVATE:
            private = [entry for entry in imports(file) if entry[0] not in PUBLIC]
            assert not private, f"{file} imports {private}: put it into {PRIVATE.name}"


@pytest.mark.parametrize(("module", "name"), imports(PRIVATE))
def test_each_name_is_where_it_was(module, name):
    try:
        getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        pytest.fail(f"flwr {version('flwr')} has moved {module}.{name}: mend {PRIVATE.name}")


def test_the_underscored_names_do_what_they_did():
    from flwr.app import ConfigRecord, Message, Metadata, RecordDict
    from flwr.serverapp import ServerApp

    from fedexec.flower import flower_internals

    flower_internals.become_server(5)
    message = Message(RecordDict(), dst_node_id=3, message_type="train")
    where = f"in flwr {version('flwr')}"
    assert message.metadata.run_id == 5, f"TaskIdentity no longer tells a message its run {where}"
    identifier = flower_internals.stamp(message)
    assert message.metadata.message_id == identifier, f"metadata._message_id is gone {where}"
    reply = Message(RecordDict(), reply_to=message)
    assert reply.metadata.reply_to_message_id == identifier
    metadata = Metadata(1, "id", 1, 2, "", "", 0.0, 1.0, "train")
    content = RecordDict({"config": ConfigRecord({"a": 1})})
    assert flower_internals.arrived(content, metadata).content == content, (
        f"Message(metadata=) is gone {where}"
    )
    app = ServerApp()
    assert not flower_internals.has_main(app)
    app.main()(lambda grid, context: None)
    assert flower_internals.has_main(app), f"ServerApp._main is gone {where}"
    assert flower_internals.empty_run(5).run_id == 5


def test_every_name_of_the_package_is_found_and_a_worker_imports_little():
    for name in fedexec.flower.__all__:
        assert getattr(fedexec.flower, name) is not None
    code = (
        "import sys, fedexec.flower.simulation.client_app\n"
        "assert not {'fedexec.flower.grpc', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
