"""What an installation and a machine can do, and what not, and why."""
