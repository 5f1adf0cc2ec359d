"""The configuration that ships with the core: one folder per config group."""
