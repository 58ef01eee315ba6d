"""The cases of `model_zoo.py`, and the processes that train them."""
