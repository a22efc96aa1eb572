"""Controls with one value per step: block Toeplitz products, the spectrum of their posterior, a sliding window."""
