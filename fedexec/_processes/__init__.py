"""How worker processes start, are watched and end: forked from a template, or spawned."""
