"""The built-in backends, one file each; only the registry imports them, when a backend is used."""
