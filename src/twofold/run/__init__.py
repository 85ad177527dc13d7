"""Everything that happens during a unit."""
