"""Settings of the whole test run: one thread per worker, and the same hypothesis examples every time."""

import hypothesis
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("fixed", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("fixed")
