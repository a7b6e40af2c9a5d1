"""An engine of the tests: its machines are processes, which tests kill, cut off and bring back."""

import asyncio
import itertools
import threading
from concurrent.futures import Future
from typing import Any

from fedexec.cluster import Agent, AgentProcess, ClusterBackend, Engine, Place


class Machine:
    """A machine with at most one node agent.

    Attributes
    ----------
    is_cut : bool
        Whether calls and answers do not get through.
    calls : list of str
        Names of the methods that were called on its node agents.
    """

    def __init__(self, name, cores):
        self.name, self.cores = name, cores
        self.is_cut = False
        self.answers = threading.Event()  # until it is set, the engine creates no node agent there
        self.answers.set()
        self.agents = []
        self.calls = []
        self.held_up = []  # answers that wait until the cut is over

    def kill(self):
        """End the process of its node agent."""
        for agent in self.agents:
            agent.node_agent.hang_up()

    def reconnect(self):
        """End a cut: what was held up arrives."""
        self.is_cut = False
        for send in self.held_up:
            send()


class Machines:
    """What the engine knows; tests add and remove machines."""

    def __init__(self):
        self._numbers = itertools.count(1)
        self.up = {}
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def add(self, cores=2):
        machine = Machine(f"toy-{next(self._numbers)}", cores)
        self.up[machine.name] = machine
        return machine

    def remove(self, machine):
        """Take a machine away, as an engine does that knows it to be gone."""
        machine.kill()
        del self.up[machine.name]


MACHINES = Machines()


class ToyAgent(Agent):
    def __init__(self, machine):
        self.machine = machine
        self.node_agent = AgentProcess()
        machine.agents.append(self)

    def call(self, method, *args):
        answer: Future[Any] = Future()
        self.machine.calls.append(method)

        def send():
            done = asyncio.run_coroutine_threadsafe(getattr(self.node_agent, method)(*args), MACHINES.loop)
            done.add_done_callback(lambda done: self._when_connected(lambda: _copy(done, answer)))

        self._when_connected(send)
        return answer

    def _when_connected(self, act):
        if self.machine.is_cut:
            self.machine.held_up.append(act)
        else:
            act()

    def discard(self):
        if not self.machine.is_cut:
            self.node_agent.hang_up()


def _copy(done, answer):
    if not answer.done():
        answer.set_result(done.result())


class ToyEngine(Engine):
    def connect(self):
        pass

    def places(self):
        return [Place(machine.name, machine.name, machine.cores) for machine in MACHINES.up.values()]

    def create_agent(self, place):
        MACHINES.up[place.id].answers.wait()
        return ToyAgent(MACHINES.up[place.id])

    def disconnect(self):
        pass


class ToyBackend(ClusterBackend):
    engine_class = ToyEngine
