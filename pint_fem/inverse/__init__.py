"""Linear inverse problems: the map from controls to observations, and the Gaussian posterior of the controls."""
