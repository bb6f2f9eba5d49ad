"""Making the weights that the repository carries; nothing here is part of the installed package."""
