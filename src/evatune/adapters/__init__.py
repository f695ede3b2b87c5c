"""From a calibration to adapters. The only place that imports `peft`."""
