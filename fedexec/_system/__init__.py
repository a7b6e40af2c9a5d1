"""What this machine and its operating system offer. The modules of this package know no executor."""
