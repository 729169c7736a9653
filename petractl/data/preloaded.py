"""What the fork server imports for all data workers: each of them would take a second for it, every epoch."""

import contextlib

import PIL.Image  # noqa: F401
import torch.multiprocessing
import torch.utils.data  # noqa: F401

import petractl.data.photographs  # noqa: F401

# Built beside another torch it raises RuntimeError as it is imported, which would be the server's end.
with contextlib.suppress(Exception):
    import torchvision.io  # noqa: F401
