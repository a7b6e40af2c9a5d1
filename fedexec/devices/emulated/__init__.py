"""Everything EMULATED: accelerators of which only the memory exists, for machines that have no real ones."""
