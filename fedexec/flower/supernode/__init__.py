"""Flower's SuperNode, whose ClientApps start in warm processes.

A SuperNode starts ``flwr-clientapp`` for each message, by name from ``PATH``. ``bin/flwr-clientapp`` stands
there first, and runs :mod:`launcher`, which hands its arguments over to the :class:`LaunchHost` of
``fedexec supernode``. That runs Flower's own command in a worker of an executor.
"""
