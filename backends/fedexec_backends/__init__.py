"""Where tasks run: one file a backend. Nothing imports these by name but the registry, when one is used."""
