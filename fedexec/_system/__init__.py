"""What this machine and its operating system offer, asked in one place. Knows no executor."""
