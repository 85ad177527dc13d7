"""Speculation (Janus): a call without its Python. See `docs/design/0004-speculation.md`."""
