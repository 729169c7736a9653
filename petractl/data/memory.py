"""Batches of a set in memory: picked, augmented and normalised by NumPy in whichever thread asks for them."""

from petractl.data.order import Pick
from petractl.data.preparation import Preparation, augment, normalise
from petractl.data.randomness import Purpose, stream_key
from petractl.data.values import Batch, Samples


class MemorySamples:
    """Prepares batches of `samples`, augmented by (seed, pass, sample) or as they are."""

    def __init__(self, samples: Samples, *, preparation: Preparation, seed: int = 0, augment: bool) -> None:
        self._samples = samples
        self._preparation = preparation
        self._seed = seed
        self._augment = augment and (preparation.pad > 0 or preparation.flip)

    def prepare(self, pick: Pick) -> Batch:
        """Return float32 images, normalised; they share no memory with the set."""
        # Imported here because a set can be named and described without torch, which takes seconds.
        import torch

        how = self._preparation
        images = self._samples.images[pick.samples]
        if self._augment:
            key = stream_key(Purpose.AUGMENTATION, self._seed, pick.pass_number)
            images = augment(images, key=key, samples=pick.samples, pad=how.pad, flip=how.flip)
        pixels = normalise(images, mean=how.mean, std=how.std)
        labels = self._samples.labels[pick.samples]
        return Batch(images=torch.from_numpy(pixels), labels=torch.from_numpy(labels), index=pick.index)
