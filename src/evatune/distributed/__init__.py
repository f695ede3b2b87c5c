"""Several processes: a group that fails clearly, and sketches that they refresh together."""
