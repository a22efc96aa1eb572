"""scipy's minimisers on a problem with an inner product of its own."""
