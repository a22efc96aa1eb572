"""What follows from a Gaussian posterior: the weight of the prior, sensors, streams of readings and predictions."""
