"""Commands: thin entry points that compose stages and services."""
