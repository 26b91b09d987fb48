"""Entry points: what people run. They may print, read flags and write run directories."""
