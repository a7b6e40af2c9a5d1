"""Everything that is EMULATED: an accelerator of which only the memory exists, for machines without one."""
