"""Steps of linear evolutions whose operators depend on static controls, and their derivatives."""
