"""Who holds how much memory: of the host, of its devices, of torch's allocator.

What was not measured is None, never 0; what an emulated device says begins with EMULATED.
"""
