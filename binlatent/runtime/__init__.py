"""Used by all other packages: devices, processes, weight files, errors, command-line helpers."""
