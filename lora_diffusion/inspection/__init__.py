"""Looking at adapters and pictures: coverage, spectra, conflicts, style."""
