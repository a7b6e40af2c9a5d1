"""Runs tasks on the nodes of a cluster: everything that a backend for an engine such as Ray or Dask needs.

An engine knows which machines there are, carries calls to them, and notices if one is gone. All else is here.
A backend inherits from :class:`ClusterBackend` and brings an :class:`Engine` and an :class:`Agent`:

1. The engine lists its places. On each place it creates one :class:`NodeAgent`.
2. The node agent holds an ordinary executor of its machine, so isolation, time limits, admission by memory
   and measurements are those of one machine.
3. The caller pickles a task once. The node passes it on without unpickling it. Large buffers go to a node
   once.
4. The caller and its node agents send each other a sign of life twice a second. A node agent that hears
   nothing for a while (``node_timeout``) ends its workers; only after that does the caller give the node up
   and run its tasks elsewhere. So no task runs twice because a network was cut.
"""

from fedexec._system.lazy_names import importer

TYPE_CHECKING = False  # type checkers know this name; importing it from typing would take long
if TYPE_CHECKING:
    from fedexec.cluster.agent_process import AgentProcess
    from fedexec.cluster.backend import ClusterBackend
    from fedexec.cluster.engine import Agent, Blob, Engine, Place
    from fedexec.cluster.node_agent import NodeAgent

__all__ = ["Agent", "AgentProcess", "Blob", "ClusterBackend", "Engine", "NodeAgent", "Place"]

__getattr__ = importer(
    __name__,
    {
        "agent_process": ("AgentProcess",),
        "backend": ("ClusterBackend",),
        "engine": ("Agent", "Blob", "Engine", "Place"),
        "node_agent": ("NodeAgent",),
    },
)
