"""What every room uses: devices, processes, files of weights, errors, commands."""
