"""Fast implementations that are made of a library's calls rather than of kernels of our own."""
