"""The user's function, ready models and their guesses, losses and likelihoods."""
