"""One thread and one Hypothesis profile for every test."""

import torch
from hypothesis import settings

settings.register_profile("default", deadline=None, derandomize=True)
settings.register_profile("thorough", deadline=None, max_examples=2000)
settings.load_profile("default")
torch.set_num_threads(1)
