"""HTML pages, one per thing: a calibration, a training run, a comparison."""
