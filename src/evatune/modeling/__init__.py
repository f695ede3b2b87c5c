"""Models of torch: calls them, leaves them as found, looks through wrappers; nothing of EVA."""
