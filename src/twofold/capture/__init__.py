"""See every tensor operation of a unit as it happens, and merge what was seen into paths."""
