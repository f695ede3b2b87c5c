"""Models of torch: calling them, leaving them as found, looking through wrappers. Nothing of
EVA."""
