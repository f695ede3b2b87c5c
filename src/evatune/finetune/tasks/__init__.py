"""One module per domain, each with `prepare(recipe) -> Task`."""
