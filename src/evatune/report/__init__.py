"""Tables, plots and one HTML page from results. A leaf: nothing but the command line imports it."""
