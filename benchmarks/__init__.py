"""Programs that measure; a package, so that no other of this name is found instead."""
