"""Measures memory: of the host, of devices, and of torch's allocator.

A value that was not measured is None, never 0. The name of an emulated device begins with EMULATED.
"""
